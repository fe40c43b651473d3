"""The allocation meets its budget, is optimal, and is nested in capacity."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from hat_lib.calibration.capacity import allocate

SITES = 6
prices = st.lists(st.floats(1e-4, 1.0), min_size=SITES, max_size=SITES).map(np.array)
exponents = st.lists(st.floats(2.0, 6.0), min_size=SITES, max_size=SITES).map(np.array)
works = st.lists(st.floats(0.1, 1.0), min_size=SITES, max_size=SITES).map(lambda w: np.array(w) / sum(w))


@settings(max_examples=60, deadline=None)
@given(prices, works, exponents, st.floats(0.15, 0.99))
def test_budget_is_met_within_bounds(k, w, p, budget):
    s = allocate(k, w, budget, p, 0.05)
    assert abs((w * s).sum() - budget) < 1e-6
    assert (s >= 0.05).all() and (s <= 1).all()


@settings(max_examples=60, deadline=None)
@given(prices, works, exponents, st.floats(0.15, 0.9), st.floats(0.01, 0.09))
def test_more_budget_keeps_more_everywhere(k, w, p, budget, more):
    assert (allocate(k, w, budget + more, p, 0.05) >= allocate(k, w, budget, p, 0.05) - 1e-9).all()


@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_no_other_split_is_better(budget):
    rng = np.random.default_rng(0)
    k, w, p = rng.uniform(0.01, 1, SITES), rng.dirichlet(np.ones(SITES)), rng.uniform(2.5, 4, SITES)
    damage = lambda s: float((k * np.clip(1 - s, 0, 1) ** p).sum())  # noqa: E731
    found = minimize(
        damage,
        np.full(SITES, budget),
        bounds=[(0.05, 1)] * SITES,
        constraints={"type": "eq", "fun": lambda s: (w * s).sum() - budget},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert damage(allocate(k, w, budget, p, 0.05)) <= found.fun + 1e-6
