"""The head at less than its full work: likely tokens are exact, on both paths, and the work is counted."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_transformer import base_within, close, stepwise
from tiny_runs import gating, new_hat, peaked, same_after_saving

from hat_lib.calibration.budget import HeadPoint, at_slope, between, head_points, hull
from hat_lib.config import HatError
from hat_lib.model.cost import state_cost

pytestmark = pytest.mark.usefixtures("no_grad")


def final_states(hat, ids):
    return hat.lm.model(ids).last_hidden_state


def test_likely_tokens_are_exact_and_the_others_from_some_channels(ids):
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


def test_the_whole_shortlist_or_all_channels_is_the_head_itself(ids):
    for given in ({"margin": 1e9}, {"threshold": 0.0}):
        hat = gating(**given)
        with hat.at(0.5):
            found = hat.lm(ids).logits
            with hat.shortlisting(None):
                close(found, hat.lm(ids).logits)


def test_the_dense_model_is_the_base(ids):
    base = peaked()
    expected = base.model(ids).logits
    hat = gating(base)
    assert torch.equal(hat.lm(ids).logits, expected)
    base_within(hat, ids, expected)
    assert hat.trace.head_share == 1 and hat.trace.capacity == 1
    assert torch.equal(hat.unload().model(ids).logits, expected) and not base.model.lm_head._forward_hooks


def all_but_one_close(a, b):
    """A logit at the very end of the shortlist may flip by rounding."""
    off = ((a - b).abs() > 1e-5 * max(1.0, float(b.abs().max()))).any(-1)
    assert off.sum() <= 1


@pytest.mark.parametrize("form", ["base", "int8", "q4"])
def test_the_engine_decodes_as_the_reference_path_does(form):
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


def test_any_number_of_threads_reads_alike(ids):
    hat, found, before = gating(), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with hat.at(0.5):
                found.append(stepwise(hat.lm, ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_the_future_never_changes_the_past(ids):
    hat, other = gating(), ids.clone()
    other[:, 8:] = other[:, 8:].flip(1)
    with hat.at(0.5):
        close(hat.lm(ids).logits[:, :8], hat.lm(other).logits[:, :8])


def test_hooks_on_the_head_see_the_values_used(ids):
    hat, seen = gating(), {}
    watch = hat.lm.lm_head.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    with hat.at(0.5):
        logits = hat.lm(ids).logits
        assert "hooks" in hat.decoding
    watch.remove()
    assert torch.equal(seen["out"], logits) and (seen["x"] == 0).any() and hat.decoding.startswith("engine")


def test_work_counts_the_head(ids):
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


def test_padding_and_tokens_that_nobody_asked_for_do_not_count(ids):
    hat = gating()
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with hat.at(0.5):
        hat.lm(ids[1:2, :9])
        alone = hat.trace.head_share
        hat.lm(ids[1:2], attention_mask=mask[1:2])
        assert hat.trace.head_share == pytest.approx(alone, abs=1e-6)
        hat.lm(ids[1:2, :9], logits_to_keep=1)
        last = hat.trace.head_share
        with hat.collect() as states:
            stepwise(hat.lm, ids[1:2, :9])
        assert last == pytest.approx(states[-1].head_share, abs=1e-6)
        assert type(states[0]).cat(states).head_share == pytest.approx(alone, abs=1e-5)
        hat.lm.model(ids)
        assert hat.trace.head_share == 0.5  # nothing was read: the expected value


def test_saved_copied_and_loaded(tmp_path, ids):
    same_after_saving(gating(), peaked(), tmp_path / "c", ids)


def test_a_head_that_peft_copies_decides_as_before_and_not_after_unload(ids):
    import peft  # slow to import

    hat = gating()
    with hat.at(0.5):
        expected, share = hat.lm(ids).logits, hat.trace.head_share
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks for a name that transformers is about to drop
        how = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        tuned = peft.get_peft_model(hat.lm, how)
    hat.capacity = 0.5
    with torch.no_grad():
        assert torch.equal(tuned(ids).logits, expected) and hat.trace.head_share == share < 1
        base = hat.unload().model
        close(base(ids).logits, peaked().model(ids).logits)


def test_bfloat16(ids):
    hat = gating(peaked(torch.bfloat16))
    with hat.dense():  # layers in full: what they keep would differ by rounding
        full = hat.lm(ids).logits
        with hat.shortlisting(hat.shortlist(6.0, 10.0)):
            found, slow = stepwise(hat.lm, ids), hat.lm(ids).logits
            assert hat.trace.head_share < 0.9
    assert found.dtype == slow.dtype == torch.bfloat16
    for made in (found, slow):
        best = made.argmax(-1, keepdim=True)
        close(made.gather(-1, best).float(), full.gather(-1, best).float(), 0.03)


def test_calibration_finds_points_that_keep_the_base():
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


def test_each_block_gives_a_token_even_of_more_blocks_than_tokens(monkeypatch):
    monkeypatch.setattr("hat_lib.calibration.budget.HEAD_TOKENS", 4)
    blocks = list(torch.from_numpy(np.random.default_rng(0).integers(5, 250, (8, 1, 64))))
    assert head_points(gating(), blocks, progress=False)


def test_a_base_that_finds_all_tokens_alike_keeps_its_head():
    assert head_points(new_hat("channel"), [torch.full((1, 64), 7)], progress=False) == []
    assert new_hat("channel").calibration.head_at(0.5) is None


def test_the_hull_and_what_lies_on_it():
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_margins": None}, "head_thresholds, head_margins and head_shares must be all null or all lists"),
        ({"head_thresholds": [1.0, 2.0]}, "head_thresholds must have .* entries, got 2"),
        ({"head_margins": "falling"}, "head_margins must be in rising order"),
    ],
)
def test_tables_that_cannot_be(changes, message):
    hat = gating()
    n = len(hat.calibration.capacities)
    changes = {k: np.linspace(9, 1, n).tolist() if v == "falling" else v for k, v in changes.items()}
    with pytest.raises(HatError, match=message):
        hat.calibration = replace(hat.calibration, **changes)
