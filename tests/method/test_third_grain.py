"""Another grain, whole attention heads, is a class: everything else asks it."""

import pytest
import torch
from test_transformer import close, recorded, stepwise
from tiny_runs import random_blocks, tiny, untrained

from hat_lib.calibration.capacity import calibrate
from hat_lib.evaluation.choices import Random
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method import grain as granularity
from hat_lib.method.cost import state_cost
from hat_lib.method.grain import Grain
from hat_lib.method.routers import ChannelRouter, column_norm

pytestmark = pytest.mark.usefixtures("no_grad")


class HeadRouter(ChannelRouter):
    """One score per attention head: the norm of its output times that of the columns of o_proj that read it."""

    def score(self, x):
        return super().score(self.size(x))

    def keep(self, x, threshold):
        return super().keep(self.size(x), threshold)

    def size(self, x):
        return x.float().view(len(x), len(self.log_scale), -1).norm(dim=-1)


class HeadGrain(Grain):
    """Which attention heads a token adds to its state."""

    name = "heads"
    sites = ("o",)

    def mask_shape(self, lm_config, site):
        return (lm_config.num_attention_heads,)

    def router(self, layer, site):
        columns = column_norm(*self.linears(layer, site)).view(-1, layer.self_attn.head_dim)
        return HeadRouter(columns.norm(dim=-1))


@pytest.fixture
def hat(monkeypatch):
    monkeypatch.setitem(granularity.GRAINS, "heads", HeadGrain())
    return untrained("heads", exit_layers=())


def test_third_grain(hat, ids, tmp_path):
    expected = tiny().model(ids).logits
    close(hat.lm(ids).logits, expected)

    calibrate(hat, random_blocks(), probe_tokens=64, progress=False)
    hat.capacity = 0.6
    hat.lm(torch.tensor(random_blocks(seed=1)))
    assert abs(hat.trace.capacity - 0.6) < 0.08 and state_cost(hat, hat.trace).model_share < 1

    logits, masks = recorded(hat, ids)
    assert masks.keep[1, "o"].shape == (3, 14, 4) and float((logits - expected).abs().max()) > 0.01
    with hat.changed(compact=False):
        close(hat.lm(ids).logits, logits)
    with hat.force(masks):
        close(stepwise(hat, ids), logits)
    assert "does not know the heads grain" in hat.decoding
    with hat.using(Random(0.5)):
        hat.lm(ids)
    assert 0.4 < hat.trace.capacity < 0.75  # two of 14 tokens are protected

    hat.save_pretrained(tmp_path)
    loaded = HierarchicalTransformer.from_pretrained(tmp_path, tiny())
    loaded.capacity = 0.6
    assert torch.equal(loaded.lm(ids).logits, logits)
    with hat.at(1.0):
        close(hat.lm(ids).logits, expected)
