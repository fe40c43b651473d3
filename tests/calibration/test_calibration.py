"""Calibration on a tiny random Llama: the request is realised, prices are KL, and no other split is better."""

import gc
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from tiny_runs import GRAINS, decides, peaked, random_blocks, skipping, untrained

from hat_lib.calibration import capacity as module
from hat_lib.calibration.capacity import (
    allocate,
    calibrate,
    calibrate_learned,
    fit_token_routers,
    recalibrate,
    score_quantiles,
)
from hat_lib.calibration.exits import calibrate_exits
from hat_lib.config import HatError

pytestmark = pytest.mark.filterwarnings("ignore:token grain")


def blocks(n=16, length=64, seed=0):
    return random_blocks(n, length, seed)


@pytest.mark.parametrize(("grain", "capacities"), [("channel", (0.3, 0.5, 0.75, 0.9)), ("token", (0.5, 0.7, 0.9))])
def test_realised_capacity_is_the_requested_one(grain, capacities):
    hat = untrained(grain)
    calibrate(hat, blocks(), probe_tokens=256, progress=False)
    fresh = torch.tensor(blocks(8, 64, seed=9))
    with torch.no_grad():
        for capacity in capacities:
            hat.capacity = capacity
            hat.lm(fresh)
            assert abs(hat.trace.capacity - capacity) < (0.02 if grain == "channel" else 0.06)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tokens():
    """Graphs of finished blocks are freed at once, not when the garbage collector runs."""
    hat = untrained()
    calibrate(hat, blocks(), probe_tokens=64, progress=False)
    gc.collect(), gc.disable()
    try:
        before = sum(type(o) is torch.Tensor for o in gc.get_objects())
        calibrate(hat, blocks(), probe_tokens=768, progress=False)
        assert sum(type(o) is torch.Tensor for o in gc.get_objects()) == before
    finally:
        gc.enable()


@pytest.mark.slow
def test_prices_predict_small_kl():
    """The Fisher form against the actual KL from gating one site, where it is small."""
    hat = untrained()
    text = [torch.tensor([b]) for b in blocks(24)]
    with torch.no_grad():
        quantiles = module.score_quantiles(hat, text, progress=False)
        predicted = module._damage(hat, text, quantiles, seed=0, progress=False)
        share = module.PROBE_SHARES[-1]
        ratios = []
        for layer in range(4):
            for j, site in enumerate(hat.grain.sites):
                router, cut = hat.routers[f"{layer}_{site}"], quantiles.threshold((layer, site), share)

                def only(i, s, x, rows, state, at=(layer, site), router=router, cut=cut):
                    return router.keep(x, cut) if (i, s) == at else None

                kl = []
                for block in text:
                    with hat.dense():
                        teacher = F.log_softmax(hat.lm(block).logits, -1)
                    with hat.using(only):
                        student = F.log_softmax(hat.lm(block).logits, -1)
                    kl.append(float((teacher.exp() * (teacher - student)).sum(-1).mean()))
                ratios.append(predicted[-1, layer, j] / np.mean(kl))
    assert 0.9 < np.median(ratios) < 1.1 and min(ratios) > 0.7 and max(ratios) < 1.5


def test_token_routers_are_fitted_once():
    hat = untrained("token")
    text = [torch.tensor([b]) for b in blocks(4)]
    with torch.no_grad():
        fit_token_routers(hat, text, progress=False)
        first = hat.routers["2_ffn"].weight.clone()
        fit_token_routers(hat, text[:1], progress=False)
    assert first.any() and torch.equal(first, hat.routers["2_ffn"].weight)


def test_routers_that_cannot_tell_tokens_apart_give_no_thresholds():
    with torch.no_grad(), pytest.raises(HatError, match="every router score is equal, .*: train or fit the routers"):
        score_quantiles(untrained("token"), [torch.tensor([b]) for b in blocks(2)], progress=False)


@pytest.mark.parametrize("grain", GRAINS)
def test_the_model_is_left_as_it_was_found(grain):
    """Capacity, exit rate and decisions stay, even with exits on."""
    hat = decides(skipping(grain), {}, [0.0] * 3)
    ids, before = torch.tensor(blocks(2)), hat.calibration
    with pytest.raises(HatError, match="256 tokens"):
        calibrate(hat, blocks(2, 16), progress=False)
    with pytest.raises(HatError, match="split must be damage or uniform, got 'even'"):
        calibrate(hat, blocks(), split="even", progress=False)
    assert hat.calibration is before
    calibrate(hat, blocks(), probe_tokens=128, progress=False)
    assert hat.capacity == 0.7 and hat.exit_rate == 0.2
    found = hat.calibration
    with torch.no_grad():
        hat.lm(ids)
        realised = hat.trace.share
        with hat.using(hat.threshold_policy(found.thresholds_at(0.7))):
            hat.lm(ids)
    assert torch.equal(hat.trace.share, realised)
    assert found.exit_scores == [[[0.0] * 3] * 2]  # exit tables belong to another calibration


@pytest.mark.slow
@pytest.mark.parametrize("grain", GRAINS)
def test_blocks_that_run_together_say_what_each_says_alone(grain, monkeypatch):
    hat = untrained(grain)
    mixed = [ids for pair in zip(blocks(12), blocks(12, 40, seed=1), strict=True) for ids in pair]
    assert max(map(len, module.held_out_parts(hat, mixed)[1])) > 1
    found = calibrate(hat, mixed, probe_tokens=128, progress=False)
    monkeypatch.setattr(module, "TOGETHER", 1)
    alone = calibrate(hat, mixed, probe_tokens=128, progress=False)
    np.testing.assert_allclose(found.capacities, alone.capacities, atol=2e-3)
    np.testing.assert_allclose(found.shares, alone.shares, atol=5e-3)


def test_quantiles_rest_on_all_tokens_of_a_wide_base(monkeypatch):
    """Drawn at random from rows and channels: every token is represented, however few scores are kept."""
    hat, text = untrained(), [torch.tensor([b]) for b in blocks(8)]
    whole = module.score_quantiles(hat, text, progress=False)
    assert whole.tokens == 8 * 62
    monkeypatch.setattr(module, "SAMPLES", 4_000)
    some = module.score_quantiles(hat, text, progress=False)
    assert some.tokens == whole.tokens and 4_000 <= some.scores <= 4_100
    for share in (0.3, 0.5, 0.7):
        a, b = (np.array(list(q.cuts(share).values())) for q in (whole, some))
        assert np.abs(a / b - 1).max() < 0.12
    first, again = (calibrate(hat, blocks(8), probe_tokens=128, text="a text", progress=False) for _ in range(2))
    assert first.text.startswith("a text; quantiles of 4") and first.text.endswith("tokens")
    assert first == again, "the same text gives the same tables"


SITES = 6
prices = st.lists(st.floats(1e-4, 1.0), min_size=SITES, max_size=SITES).map(np.array)
exponents = st.lists(st.floats(2.0, 6.0), min_size=SITES, max_size=SITES).map(np.array)
works = st.lists(st.floats(0.1, 1.0), min_size=SITES, max_size=SITES).map(lambda w: np.array(w) / sum(w))


@settings(max_examples=60, deadline=None)
@given(prices, works, exponents, st.floats(0.15, 0.9), st.floats(0.01, 0.09))
def test_the_budget_is_met_within_bounds_and_more_of_it_keeps_more_everywhere(k, w, p, budget, more):
    shares, _ = allocate(k, w, budget, p, 0.05)
    assert abs((w * shares).sum() - budget) < 1e-6 and (shares >= 0.05).all() and (shares <= 1).all()
    assert (allocate(k, w, budget + more, p, 0.05)[0] >= shares - 1e-9).all()


@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_no_other_split_is_better(budget):
    rng = np.random.default_rng(0)
    k, w, p = rng.uniform(0.01, 1, SITES), rng.dirichlet(np.ones(SITES)), rng.uniform(2.5, 4, SITES)
    damage = lambda s: float((k * np.clip(1 - s, 0, 1) ** p).sum())  # noqa: E731
    met = {"type": "eq", "fun": lambda s: (w * s).sum() - budget}
    how = {"bounds": [(0.05, 1)] * SITES, "constraints": met, "options": {"ftol": 1e-12, "maxiter": 500}}
    found = minimize(damage, np.full(SITES, budget), **how)
    assert damage(allocate(k, w, budget, p, 0.05)[0]) <= found.fun + 1e-6


@pytest.mark.parametrize("exponent", [1.0, 2.5, 5.5, 8.0])
def test_a_power_law_is_found_within_two_and_six(exponent):
    damage = np.array([[[0.3 * (1 - share) ** exponent]] for share in module.PROBE_SHARES])
    k, p = module._fit_damage(damage)
    assert p.item() == pytest.approx(min(max(exponent, 2.0), 6.0), abs=1e-3)
    if 2 <= exponent <= 6:
        assert k.item() == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize(
    ("count", "measured", "checked"),
    [(5, [0, 1, 2, 4], [3]), (9, [0, 1, 2, 4, 5, 6, 8], [3, 7])],
)
def test_every_fourth_block_checks(count, measured, checked):
    blocks = [[n] * (300 + n) for n in range(count)]  # known by what they hold, and of different lengths
    found = module.held_out_parts(untrained("channel"), blocks)
    assert [[int(b[0, 0]) for b in part] for part in found] == [measured, checked]


@pytest.mark.parametrize("lengths", [[256], [512, 8], [300, 301, 302], [512, 512, 512, 8], [512] + [4] * 7])
def test_of_few_or_uneven_blocks_a_part_of_each_checks_and_was_not_measured(lengths):
    ends = np.cumsum(lengths).tolist()
    text = [list(range(end - n, end)) for n, end in zip(lengths, ends, strict=True)]  # no token occurs twice
    fit, check = ([i for b in part for i in b.flatten().tolist()] for part in module.held_out_parts(untrained(), text))
    assert sorted(fit + check) == list(range(sum(lengths)))
    assert len(fit) / 8 < len(check) < len(fit)


@torch.no_grad()
def _mean_capacity(hat, text):
    found = []
    for block in text:
        hat.lm(torch.tensor([block]))
        found.append(hat.trace.capacity)
    return np.mean(found)


def test_the_table_of_trained_routers_rests_on_all_blocks():
    hat, text = untrained(), [*blocks(6), *([token % 8 + 5 for token in block] for block in blocks(2))]
    calibrate(hat, blocks(), probe_tokens=64, head=False, progress=False)
    thresholds = hat.calibration.thresholds_at
    found = calibrate_learned(hat, text, lambda b: thresholds(max(b, 0.1)), lambda b: None, progress=False)
    for row in (5, 10):
        with hat.dense(), hat.using(hat.threshold_policy(thresholds(module.BUDGETS[row]))):
            assert found.capacities[row] == pytest.approx(_mean_capacity(hat, text), abs=1e-4)


@pytest.mark.parametrize("grain", GRAINS)
def test_on_other_text_the_same_thresholds_get_other_capacities(grain):
    hat, other = untrained(grain, peaked(), correction_rank=2), [[token % 2 + 5 for token in b] for b in blocks(6)]
    with torch.no_grad():
        for parameter in hat.hat_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    calibrate(hat, blocks(), probe_tokens=64, progress=False)
    calibrate_exits(hat, blocks(), [1.0], progress=False)
    before = hat.calibration
    found = recalibrate(hat, other, text="other text", progress=False)
    assert hat.calibration is found and found.text == "other text"
    measured = {"text", "capacities", "shares"} | ({"head_shares"} if grain == "channel" else set())
    assert {f.name for f in fields(found) if getattr(found, f.name) != getattr(before, f.name)} == measured
    hat.calibration = before
    for row in (6, 10):
        budget = hat.correcting(hat.correction_strength(module.BUDGETS[row]))
        with hat.dense(), hat.at(before.capacities[row]), budget:
            assert found.capacities[row] == pytest.approx(_mean_capacity(hat, other), abs=1e-3)


def test_only_a_whole_table_is_measured_again():
    hat = decides(skipping("channel"), {}, [0.0] * 3)
    with pytest.raises(HatError, match="expected a calibration of 17 capacities to measure again, got one of 2"):
        recalibrate(hat, blocks(), progress=False)
    with pytest.raises(HatError, match="got none"):
        recalibrate(untrained(), blocks(), progress=False)


def test_a_part_of_the_blocks_reaches_from_the_first_to_the_last():
    blocks = [torch.full((1, 4), n) for n in range(9)]
    assert [int(b[0, 0]) for b in module._spread(blocks, 12)] == [0, 4, 8]
    assert [int(b[0, 0]) for b in module._spread(blocks, 1)] == [0] and len(module._spread(blocks, 1_000)) == 9
