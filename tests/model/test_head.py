"""The head at less than its full work: likely tokens are exact, on both paths, and the work is counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_transformer import base_within, close, stepwise
from tiny_runs import gating, new_hat, peaked, same_after_saving

from hat_lib.calibration.budget import HeadPoint, at_slope, between, head_points, hull
from hat_lib.model.cost import state_cost

pytestmark = pytest.mark.usefixtures("no_grad")


def final_states(hat, ids):
    return hat.lm.model(ids).last_hidden_state


def test_shortlist(ids):
    hat = gating()
    weight = hat.lm.lm_head.weight
    with hat.at(0.5):
        x, found = final_states(hat, ids), hat.lm(ids).logits
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
        with hat.shortlisting(all_of_it):
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
        assert hat.decoding.startswith("engine")
        with hat.collect() as states:
            found = stepwise(hat.lm, ids)
        assert all(state.executed is not None for state in states)
        with hat.reference(), hat.collect() as slow:
            expected = stepwise(hat.lm, ids)
        if form == "base":
            all_but_one_close(found, expected)
            assert [s.head_share for s in states] == pytest.approx([s.head_share for s in slow], abs=2e-3)
        else:  # other weights give another shortlist, of about the same length
            shares, exact = ([s.head_share for s in of] for of in (states, slow))
            assert shares != exact and np.mean(shares) == pytest.approx(np.mean(exact), abs=0.08)
        # A row alone, and then one shifted right by padding.
        close(stepwise(hat.lm, ids[1:2]), found[1:2])
    if form == "base":
        padded, mask = (torch.nn.functional.pad(t, (4, 0)) for t in (ids, torch.ones_like(ids)))
        with hat.at(0.5):
            all_but_one_close(hat.lm(padded, attention_mask=mask).logits[:, 4:], found)
            assert hat.trace.head_share == pytest.approx(np.mean([s.head_share for s in states]), abs=2e-4)


def test_the_future_never_changes_the_past(ids):
    hat, other = gating(), ids.clone()
    other[:, 8:] = other[:, 8:].flip(1)
    with hat.at(0.5):
        close(hat.lm(ids).logits[:, :8], hat.lm(other).logits[:, :8])


def test_work(ids):
    hat = gating()
    with hat.at(0.5):
        hat.lm(ids)
    state, cost = hat.trace, state_cost(hat, hat.trace)
    head = hat.lm.config.vocab_size * hat.lm.config.hidden_size
    assert cost.flops["head"] == pytest.approx(2 * head * state.head_share)
    assert cost.dense_flops["head"] == pytest.approx(2 * head)
    layers = hat.config.n_layers * head / hat.head_work
    expected = (state.layer_capacity * layers + state.head_share * head) / (layers + head)
    assert state.capacity == pytest.approx(expected, abs=1e-6)
    uneven = replace(hat.calibration, shares=(np.asarray(hat.calibration.shares) * [[0.5], [1], [1], [1]]).tolist())
    left = (uneven.shares_at(0.5) @ hat.site_work).mean()
    assert left < 0.49 and uneven.layer_capacity_at(0.5, hat.site_work) == pytest.approx(left)


def test_saved_copied_and_loaded(tmp_path, ids):
    same_after_saving(gating(), peaked(), tmp_path / "c", ids)


def test_head_points():
    hat = gating()
    blocks = list(torch.from_numpy(np.random.default_rng(0).integers(5, 250, (8, 1, 64))))
    points = head_points(hat, blocks, progress=False)
    shares, damage = [p.share for p in points], [p.kl for p in points]
    assert shares == sorted(shares) and damage == sorted(damage, reverse=True) and shares[0] > 0 and shares[-1] < 1
    with hat.dense():
        states = torch.cat([hat.lm.model(b).last_hidden_state for b in blocks])
        exact = hat.lm.lm_head(states).log_softmax(-1)
        for p in points:
            with hat.shortlisting(hat.shortlist(p.threshold, p.margin)):
                found = hat.lm.lm_head(states).log_softmax(-1)
            assert float((exact.exp() * (exact - found)).sum(-1).mean()) == pytest.approx(p.kl, rel=0.01, abs=1e-5)


def test_head_points_of_a_uniform_base():
    assert head_points(new_hat("channel"), [torch.full((1, 64), 7)], progress=False) == []
    assert new_hat("channel").calibration.head_at(0.5) is None


def test_hull():
    tried = [
        (0.2, 0.5, 3.0, 7.0),
        (0.3, 0.2, 2.0, 7.0),
        (0.4, 0.19, 2.5, 9.0),
        (0.5, 0.05, 1.0, 9.0),
        (0.4, 0.18, 2, 8),
    ]
    points = hull([HeadPoint(*p) for p in tried])
    assert [p.share for p in points] == [0.2, 0.3, 0.5]  # the others lie above the line
    assert at_slope(points, 10.0) == 0.2 and at_slope(points, 1.0) == 0.3 and at_slope(points, 0.1) == 0.5
    assert between(points, 0.4) == pytest.approx((0.4, 0.125, 1.5, 8.0))
    assert between(points, 0.9) == points[-1] and between(points, 0.0) == points[0]
