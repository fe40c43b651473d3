"""A handful of equalities on the real model."""

import pytest
import torch
from four_bits_read import packed_and_read
from test_transformer import close, stepwise

from hat_lib.backbone.base import exact_hash
from hat_lib.config import DATA, HatConfig
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.blocks import load_text

CHECKPOINT = DATA / "checkpoints" / "calibrated"


@pytest.fixture
def hat(bundled):
    model = HierarchicalTransformer.from_pretrained(CHECKPOINT, bundled)
    with torch.no_grad():
        yield model
    model.unload()


def prompt(base):
    return base.tokenizer("The future of AI is", return_tensors="pt")


@pytest.mark.parametrize("grain", ["channel", "token"])
@torch.no_grad()
def test_untrained_equals_base_and_unload_restores(bundled, grain):
    inputs, before = prompt(bundled), exact_hash(bundled.model)
    expected = bundled.model(**inputs).logits
    model = HierarchicalTransformer(bundled, HatConfig.default(bundled, granularity=grain))
    close(model.lm(**inputs).logits, expected)
    assert exact_hash(model.unload().model) == before


def test_q4_is_near_the_file_s_own_numbers(bundled):
    for name, layer, own, read in packed_and_read(bundled.model):
        assert float((own - read).norm() / own.norm()) < 0.01, (name, layer)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "nats"), [("base", 1e-6), ("int8", 0.01), ("q4", 0.01)])
def test_the_engine_changes_nothing_and_fewer_bits_little(hat, form, nats):
    ids = torch.tensor([load_text("addresses", hat.base.tokenizer, max_tokens=96)[0]["input_ids"]])
    hat.weight_format = form
    with hat.dense():
        found, expected = stepwise(hat, ids).log_softmax(-1), hat.lm(ids).logits.log_softmax(-1)
    assert abs(float((expected.exp() * (expected - found)).sum(-1).mean())) < nats
