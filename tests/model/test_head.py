"""The head at less than its full work: likely tokens are exact, on both paths, and the work is counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_transformer import base_within, close, stepwise
from tiny_runs import gating, peaked, same_after_saving

from hat_lib.model.cost import state_cost

pytestmark = pytest.mark.usefixtures("no_grad")


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


def test_dense_equals_base(ids):
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
def test_engine_equals_reference(form):
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


def test_work(ids):
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


def test_saved_copied_and_loaded(tmp_path, ids):
    same_after_saving(gating(), peaked(), tmp_path / "c", ids)
