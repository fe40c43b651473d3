"""Corrections: no effect until trained, never in the dense model, the same definition on both paths."""

import pytest
import torch
from test_transformer import apart, base_within, close, stepwise
from tiny_runs import new_hat, same_after_saving, skipping, tiny, untrained

from hat_lib.backbone.families import LINEARS
from hat_lib.config import HatError
from hat_lib.model.checkpoint import read_checkpoint
from hat_lib.model.cost import state_cost


def randomised(hat):
    with torch.no_grad():
        for correction in hat.corrections.values():
            correction.up.normal_(0, 0.2), correction.shift.normal_(0, 0.2)
    return hat


def corrected(rank=2):
    """Calibrated, with random corrections."""
    torch.manual_seed(0)
    hat = untrained("channel", correction_rank=rank)
    hat.calibration = new_hat("channel").calibration
    return randomised(hat)


def merged(hat, strength=1.0):
    """A plain base with the corrections merged into its linear layers."""
    lm = tiny().model
    with torch.no_grad():
        for i, layer in enumerate(lm.model.layers):
            for site, names in LINEARS.items():
                correction = hat.corrections[f"{i}_{site}"]
                sizes = correction.outputs
                parts = (correction.up @ correction.down).split(sizes), correction.shift.split(sizes)
                for name, update, shift in zip(names, *parts, strict=True):
                    linear = layer.get_submodule(name)
                    linear.weight += strength * update
                    linear.bias = torch.nn.Parameter(strength * shift)
    return lm


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@torch.no_grad()
def test_equal_an_update_of_the_weights_and_a_bias(rank, ids):
    hat = corrected(rank)
    expected = merged(hat)(ids).logits
    with hat.correcting():
        close(hat.lm(ids).logits, expected)
        close(stepwise(hat, ids), expected)
        assert hat.lm(ids[:1]).logits.shape == hat.lm(ids[:1], use_cache=False).logits.shape
    assert apart(expected, tiny().model(ids).logits)


@torch.no_grad()
def test_strength(ids):
    hat = corrected()
    assert [hat.correction_strength(c) for c in (1.0, 0.89, 0.725, 0.45, 0.4)] == pytest.approx([0, 0.04, 0.25, 1, 1])
    with hat.correcting(0.3):
        close(hat.lm(ids).logits, merged(hat, 0.3)(ids).logits)
        close(stepwise(hat, ids), hat.lm(ids).logits)
    base_within(hat, ids, tiny().model(ids).logits)
    with pytest.raises(HatError, match="no corrections"):
        new_hat("channel").correcting()


@torch.no_grad()
def test_saved_copied_and_loaded(tmp_path, ids):
    same_after_saving(corrected(), tiny(), tmp_path / "c", ids)
    with pytest.raises(HatError, match="corrections"):
        new_hat("channel").load_adapter(read_checkpoint(tmp_path / "c"))


@pytest.mark.filterwarnings("ignore:token grain")
@torch.no_grad()
def test_stand_in_for_an_ffn(ids):
    """Token grain: routers that skip about a third of the FFNs, on every path, and the work."""
    how = {"bar": 0.6, "vectors": 1.0, "translator_rank": 2}
    hat, plain = randomised(skipping("token", **how, correction_rank=3)), skipping("token", **how)
    hat.calibration = plain.calibration
    assert list(hat.corrections) == [f"{i}_ffn" for i in range(1, hat.config.n_layers)]
    expected = hat.lm(ids).logits
    assert apart(expected, plain.lm(ids).logits) and 0.3 < hat.trace.capacity < 0.95
    with hat.changed(compact=False):
        close(hat.lm(ids).logits, expected)
    with hat.collect() as states:
        close(stepwise(hat, ids), expected)
        close(stepwise(hat, ids[1:2]), expected[1:2])
    assert all(state.executed is not None and state.corrected for state in states)
    with hat.dense():
        assert torch.equal(hat.lm(ids).logits, tiny().model(ids).logits)
    with hat.at(exit_rate=0.0):
        hat.lm(ids)
        cost, skipped = state_cost(hat, hat.trace).flops["corrections"], 1 - hat.trace.site_share[:, 0]
    assert torch.allclose(cost, skipped.sum(0).double() * 2 * 2 * 3 * hat.lm.config.hidden_size)
    with hat.correcting(0.0):
        close(hat.lm(ids).logits, plain.lm(ids).logits)
        assert not state_cost(hat, hat.trace).flops["corrections"].any()
    hat.corrections["1_ffn"].shift += 1  # the engine follows
    close(stepwise(hat, ids), hat.lm(ids).logits)
