"""Prices are KL divergences, and no other split of a budget is better; tokens that cost more keep more."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from tiny_runs import gating, new_hat, random_blocks, untrained

from hat_lib.calibration import token_sensitivity
from hat_lib.calibration.budget import FLOOR, PROBE_SHARES, STEP, allocate, damage_curves, head_points, site_damage
from hat_lib.calibration.capacity import calibrate
from hat_lib.calibration.quantiles import score_quantiles
from hat_lib.calibration.token_sensitivity import PRIOR, log_linear
from hat_lib.evaluation.perplexity import score_each

pytestmark = pytest.mark.usefixtures("no_grad")
BLOCKS = random_blocks(16, 64)
SITES = 6
prices = st.lists(st.floats(1e-4, 1.0), min_size=SITES, max_size=SITES).map(np.array)
exponents = st.lists(st.floats(2.0, 6.0), min_size=SITES, max_size=SITES).map(np.array)
works = st.lists(st.floats(0.1, 1.0), min_size=SITES, max_size=SITES).map(lambda w: np.array(w) / sum(w))


def power_law(k, p):
    """Prices ``k (1 - s)^p`` of sites, as measured at `PROBE_SHARES`."""
    return damage_curves(k * (1 - np.array(PROBE_SHARES)[:, None, None]) ** p)


@settings(max_examples=60, deadline=None)
@given(prices, works, exponents, st.floats(0.15, 0.9), st.floats(0.01, 0.09))
def test_allocate_meets_the_budget_and_more_of_it_keeps_more_everywhere(k, w, p, budget, more):
    curves, w = power_law(k, p), w[None]
    shares, _ = allocate(curves, w, budget)
    assert abs((w * shares).sum() - budget) < 1e-6
    assert (shares >= FLOOR).all() and (shares <= 1 + 1e-9).all()
    assert (allocate(curves, w, budget + more)[0] >= shares - 1e-9).all()


@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_allocate_does_the_least_damage(budget):
    rng = np.random.default_rng(0)
    k, w, p = rng.uniform(0.01, 1, SITES), rng.dirichlet(np.ones(SITES)), rng.uniform(2.5, 4, SITES)
    damage = lambda s: float((k * np.clip(1 - s, 0, 1) ** p).sum())  # noqa: E731
    met = {"type": "eq", "fun": lambda s: (w * s).sum() - budget}
    how = {"bounds": [(FLOOR, 1)] * SITES, "constraints": met, "options": {"ftol": 1e-12, "maxiter": 500}}
    found = minimize(damage, np.full(SITES, budget), **how)
    assert damage(allocate(power_law(k, p), w[None], budget)[0][0]) <= 1.03 * found.fun


def test_damage_curves_are_convex_and_pass_through_what_was_measured():
    shares = np.array(PROBE_SHARES)
    measured = 0.3 * (1 - shares) ** 3 * np.exp(4 * np.maximum(0.45 - shares, 0))  # a law, and more below 0.45
    curve = damage_curves(measured[:, None, None])[0, 0]
    at = np.round((shares - FLOOR) / STEP).astype(int)
    np.testing.assert_allclose(curve[at], measured, rtol=0.1)
    assert curve[-1] == 0 and (np.diff(curve) <= 0).all() and (np.diff(curve, 2) >= -1e-12).all()
    assert damage_curves(np.zeros((len(shares), 2, 3))).shape == (2, 3, len(curve))


@pytest.mark.slow
def test_site_damage_predicts_small_kl():
    """The Fisher form against the actual KL from skipping in one site, where it is small."""
    hat, share, blocks = untrained(), PROBE_SHARES[-1], random_blocks(24, 64)
    quantiles = score_quantiles(hat, text := [torch.tensor([b]) for b in blocks], progress=False)
    predicted = site_damage(hat, text, quantiles, progress=False)[-1].flatten()
    everything = dict.fromkeys(quantiles.tables, -1.0)  # in the order of the predictions
    alone = [hat.threshold_policy(everything | {key: quantiles.threshold(key, share)}) for key in everything]
    rows = [{"input_ids": ids, "n_context": 0, "doc": ""} for ids in blocks]
    _, found = score_each(hat, rows, [partial(hat.using, policy) for policy in alone], batch_size=24, progress=False)
    ratios = predicted / [at.kl for at in found]
    assert 0.9 < np.median(ratios) < 1.1 and min(ratios) > 0.7 and max(ratios) < 1.5


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
            with hat.changed(shortlist=hat.shortlist(p.threshold, p.margin)):
                found = hat.logits(states).log_softmax(-1)
            assert float((exact.exp() * (exact - found)).sum(-1).mean()) == pytest.approx(p.kl, rel=0.01, abs=1e-5)
    assert head_points(new_hat("channel"), [torch.full((1, 64), 7)], progress=False) == []  # of a uniform base


# Token sensitivity


def test_log_linear_is_at_its_optimum():
    """The gradient by hand: the pull of the prior against that of the data, on standardised columns."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 20, 8)
    x = torch.randn(500, 8, generator=generator) * scale
    price = (x @ (0.2 * torch.randn(8, generator=generator) / scale) - 1).exp()
    x, y = x + 3, price * torch.empty(500).exponential_(generator=generator)
    weight, bias = log_linear(x, y)
    columns, own = (x - x.mean(0)) / x.std(0), weight * x.std(0)
    misfit = 1 - y * (-(x @ weight + bias)).exp()
    pull = columns.T @ misfit / len(x) + own * x.shape[1] / (len(x) * PRIOR**2)
    assert float(pull.abs().max()) < 1e-3 and abs(float(misfit.mean())) < 1e-3


def test_sensitivity_is_half_the_log_of_the_price(monkeypatch):
    hat = untrained()
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(4000, 64, generator=generator) for _ in range(4)]
    direction = torch.randn(64, generator=generator) / 64**0.5
    prices = torch.stack([(x @ direction).exp() for x in inputs])
    monkeypatch.setattr(token_sensitivity, "NEIGHBOURS", 0)  # each layer here has its own tokens
    monkeypatch.setattr(token_sensitivity, "token_prices", lambda *_: (prices, inputs))
    token_sensitivity.fit_token_sensitivity(hat, [], {}, seed=0, progress=False)
    for layer, x in enumerate(inputs):
        found, wanted = hat.routers[f"{layer}_token"].score(x), (x @ direction) / 2
        slope = float((found * wanted).sum() / wanted.square().sum())
        assert 0.85 < slope <= 1.02 and float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) > 0.98


def test_prices_of_tokens_add_up_to_those_of_the_text():
    """For a single site, the mean over tokens is what `calibrate` takes as the site's price."""
    hat, text = untrained(), [torch.tensor([b]) for b in BLOCKS]
    quantiles = score_quantiles(hat, text, progress=False)
    thresholds = {key: -1.0 for key in quantiles.tables} | {(2, "down"): quantiles.threshold((2, "down"), 0.75)}
    prices, inputs = token_sensitivity.token_prices(hat, text, thresholds, seed=0, progress=False)
    whole = site_damage(hat, text, quantiles, progress=False)[PROBE_SHARES.index(0.75), 2, 3]
    assert prices.shape == (4, 16 * 62) and inputs[0].shape == (16 * 62, 64)
    assert not prices[[0, 1, 3]].any() and float(prices[2].sum()) / (16 * 64) == pytest.approx(whole, rel=1e-4)


def test_a_sensitive_token_keeps_more_unless_little_runs():
    hat, ids = untrained(), torch.tensor(BLOCKS[:2])
    calibrate(hat, BLOCKS, token_sensitivity=False, probe_tokens=128, progress=False)
    assert not any(hat.routers[f"{i}_token"].weight.any() for i in range(4))
    calibrate(hat, BLOCKS, probe_tokens=128, progress=False)
    scales = []
    for capacity in (0.35, 0.5, 0.7):
        hat.capacity = capacity
        hat.lm(ids)
        scales.append(float(hat.trace.threshold_scale.log().abs().mean()))
    assert scales[0] == 0 < scales[1] < scales[2]
    before = hat.trace.site_share
    hat.routers["1_token"].bias.add_(0.5)  # takes effect at once
    hat.lm(ids)
    more = hat.trace.site_share - before
    assert (more[1, :, :, 2:].mean((1, 2)) > 0.05).all() and not more[0].any()
