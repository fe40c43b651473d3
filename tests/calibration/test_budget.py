"""Prices are KL divergences, and no other split of a budget is better."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from tiny_runs import gating, new_hat, random_blocks, untrained

from hat_lib.calibration.budget import (
    FLOOR,
    PROBE_SHARES,
    STEP,
    allocate,
    damage_curves,
    head_points,
    site_damage,
)
from hat_lib.calibration.quantiles import score_quantiles

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
    hat, share = untrained(), PROBE_SHARES[-1]
    text = [torch.tensor([b]) for b in random_blocks(24, 64)]
    ratios = []
    with torch.no_grad():
        quantiles = score_quantiles(hat, text, progress=False)
        predicted = site_damage(hat, text, quantiles, progress=False)
        for layer in range(4):
            for j, site in enumerate(hat.grain.sites):
                router, threshold = hat.routers[f"{layer}_{site}"], quantiles.threshold((layer, site), share)

                def only(i, s, x, rows, state, at=(layer, site), router=router, threshold=threshold):
                    return router.keep(x, threshold) if (i, s) == at else None

                kl = []
                for block in text:
                    with hat.dense():
                        teacher = F.log_softmax(hat.lm(block).logits, -1)
                    with hat.using(only):
                        student = F.log_softmax(hat.lm(block).logits, -1)
                    kl.append(float((teacher.exp() * (teacher - student)).sum(-1).mean()))
                ratios.append(predicted[-1, layer, j] / np.mean(kl))
    assert 0.9 < np.median(ratios) < 1.1 and min(ratios) > 0.7 and max(ratios) < 1.5


@torch.no_grad()
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
