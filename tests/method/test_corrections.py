"""Corrections, and a head at less than its full work: the same definition on both paths, nothing in the dense model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_transformer import apart, base_within, close, stepwise
from tiny_runs import gating, new_hat, peaked, same_after_saving, skipping, tiny, untrained

from hat_lib.base.families import LINEARS
from hat_lib.checkpoint import read_checkpoint
from hat_lib.config import HatError
from hat_lib.method.cost import state_cost

pytestmark = pytest.mark.usefixtures("no_grad")


def randomised(hat):
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
def test_equal_an_update_of_the_weights_and_a_bias(rank, ids):
    hat = corrected(rank)
    expected = merged(hat)(ids).logits
    with hat.correcting():
        close(hat.lm(ids).logits, expected)
        close(stepwise(hat, ids), expected)
        assert hat.lm(ids[:1]).logits.shape == hat.lm(ids[:1], use_cache=False).logits.shape
    assert apart(expected, tiny().model(ids).logits)


def test_strength(ids):
    hat = corrected()
    assert [hat.correction_strength(c) for c in (1.0, 0.89, 0.725, 0.45, 0.4)] == pytest.approx([0, 0.04, 0.25, 1, 1])
    with hat.correcting(0.3):
        close(hat.lm(ids).logits, merged(hat, 0.3)(ids).logits)
        close(stepwise(hat, ids), hat.lm(ids).logits)
    base_within(hat, ids, tiny().model(ids).logits)
    with pytest.raises(HatError, match="no corrections"):
        new_hat("channel").correcting()


def test_saved_copied_and_loaded(tmp_path, ids):
    same_after_saving(corrected(), tiny(), tmp_path / "c", ids)
    with pytest.raises(HatError, match="corrections"):
        new_hat("channel").load_adapter(read_checkpoint(tmp_path / "c"))


@pytest.mark.filterwarnings("ignore:token grain")
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


# The head: likely tokens are exact


def test_shortlist(ids):
    hat, other = gating(), ids.clone()
    weight, other[:, 8:] = hat.lm.lm_head.weight, ids[:, 8:].flip(1)
    with hat.at(0.5):
        x = hat.lm.model(ids).last_hidden_state
        close(hat.lm(other).logits[:, :8], hat.lm(ids).logits[:, :8])  # the future never changes the past
        found = hat.lm(ids).logits
    keep = x.abs() * weight.norm(dim=0) > 6
    preview, full = (x * keep) @ weight.T, x @ weight.T
    wanted = preview >= preview.amax(-1, keepdim=True) - 10
    close(found, torch.where(wanted, full, preview))
    assert 0.05 < wanted.float().mean() < 0.95 and 0.1 < keep.float().mean() < 0.9
    share = keep.float().mean() + wanted.float().mean()
    assert hat.trace.head_share == pytest.approx(float(share), abs=1e-5)


def test_head_dense_equals_base(ids):
    base = peaked()
    expected = base.model(ids).logits
    hat = gating(base)
    base_within(hat, ids, expected)
    assert hat.trace.head_share == 1 and hat.trace.capacity == 1
    for all_of_it in (hat.shortlist(6.0, 1e9), hat.shortlist(0.0, 10.0)):
        with hat.changed(shortlist=all_of_it):
            close(hat.lm(ids).logits, expected)
    assert torch.equal(hat.unload().model(ids).logits, expected)


def all_but_one_close(a, b):
    """A logit at the very end of the shortlist may flip by rounding."""
    off = ((a - b).abs() > 1e-5 * max(1.0, float(b.abs().max()))).any(-1)
    assert off.sum() <= 1


@pytest.mark.parametrize("form", ["base", "int8", "q4"])
def test_head_on_the_engine_equals_reference(form):
    ids = torch.from_numpy(np.random.default_rng(2).integers(5, 250, (3, 14)))  # no score is at its threshold
    hat = gating()
    hat.weight_format = form
    with hat.at(0.5):
        with hat.collect() as states:
            found = stepwise(hat, ids)
        assert all(state.executed is not None for state in states)
        with hat.reference(), hat.collect() as slow:
            expected = stepwise(hat, ids)
        shares, exact = ([s.head_share for s in of] for of in (states, slow))
        close(stepwise(hat, ids[1:2]), found[1:2])  # a row alone
        if form != "base":  # other weights give another shortlist, of about the same length
            assert shares != exact and np.mean(shares) == pytest.approx(np.mean(exact), abs=0.08)
            return
        all_but_one_close(found, expected)
        assert shares == pytest.approx(exact, abs=2e-3)
        padded, mask = (torch.nn.functional.pad(t, (4, 0)) for t in (ids, torch.ones_like(ids)))
        all_but_one_close(hat.lm(padded, attention_mask=mask).logits[:, 4:], found)
        assert hat.trace.head_share == pytest.approx(np.mean(shares), abs=2e-4)


def test_head_work(ids):
    hat = gating()
    with hat.at(0.5):
        hat.lm(ids)
    state, cost = hat.trace, state_cost(hat, hat.trace)
    head = hat.lm.config.vocab_size * hat.lm.config.hidden_size
    assert cost.flops["head"].mean() == pytest.approx(2 * head * state.head_share)
    assert cost.dense_flops["head"] == pytest.approx(2 * head)
    layers = hat.config.n_layers * head / hat.head_work
    expected = (state.layer_capacity * layers + state.head_share * head) / (layers + head)
    assert state.capacity == pytest.approx(expected, abs=1e-6)
    uneven = replace(hat.calibration, shares=(np.asarray(hat.calibration.shares) * [[0.5], [1], [1], [1]]).tolist())
    assert uneven.layer_capacity_at(0.5, hat.site_work) == pytest.approx((uneven.shares_at(0.5) @ hat.site_work).mean())


def test_head_saved_copied_and_loaded(tmp_path, ids):
    same_after_saving(gating(), peaked(), tmp_path / "c", ids)
