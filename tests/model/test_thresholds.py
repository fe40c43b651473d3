"""The allocation meets its budget, is optimal, and is nested in capacity."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from hat_lib.config import HatConfig, HatError
from hat_lib.model.thresholds import Calibration, allocate

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


def calibration(**changes):
    values = {
        "sites": ["a", "b"],
        "capacities": [0.2, 0.5, 1.0],
        "thresholds": [[[4.0, 2.0, 0.0], [8.0, 3.0, 0.0]], [[1.0, 0.5, 0.0], [2.0, 2.0, -1.0]]],
        "shares": [[[0.1, 0.4, 1.0], [0.2, 0.5, 1.0]], [[0.3, 0.6, 1.0], [0.2, 0.5, 1.0]]],
    }
    return Calibration(**values | changes)


def test_between_two_measured_capacities_lie_their_thresholds():
    # 0.35 is halfway from 0.2 to 0.5, and 0.9 is 0.8 of the way from 0.5 to 1.0.
    halfway = calibration().thresholds_at(0.35)
    assert halfway == pytest.approx({(0, "a"): 3.0, (0, "b"): 5.5, (1, "a"): 0.75, (1, "b"): 2.0})
    assert calibration().thresholds_at(0.5)[0, "b"] == 3.0
    assert calibration().thresholds_at(0.9)[1, "b"] == pytest.approx(-0.4)
    assert calibration().shares_at(0.35) == pytest.approx(np.array([[0.25, 0.35], [0.45, 0.35]]))


def test_thresholds_are_nested_in_capacity():
    c = calibration()
    tables = [c.thresholds_at(x) for x in np.linspace(0.1, 1.0, 37)]
    for low, high in zip(tables, tables[1:], strict=False):
        assert all(high[k] <= low[k] for k in low)


def test_below_the_lowest_capacity_measured_its_thresholds_hold():
    assert calibration().thresholds_at(0.1) == calibration().thresholds_at(0.2)


def test_equal_capacities_are_no_division_by_zero():
    c = calibration(capacities=[0.5, 0.5, 1.0])
    assert all(np.isfinite(list(c.thresholds_at(x).values())).all() for x in (0.1, 0.5, 0.7))


def test_everything_at_one():
    assert set(calibration().thresholds_at(1.0).values()) == {-np.inf}
    with pytest.raises(HatError, match="capacity"):
        calibration().thresholds_at(0.05)


def test_exit_thresholds():
    one = [[9.0, 8.0], [1.0, 0.0], [-5.0, -6.0]]
    c = calibration(exit_capacities=[0.5], exit_rates=[[0.0, 0.5, 1.0]], exit_scores=[one])
    assert c.exit_thresholds(0.0, 0.5) == [np.inf, np.inf]
    for capacity in (0.1, 0.5, 1.0):  # the nearest that was measured
        assert c.exit_thresholds(0.5, capacity) == [1.0, 0.0]
    assert c.exit_thresholds(0.75, 0.5) == [-2.0, -3.0]
    # At 1.0 the same rate needs lower bars: first along the rates of each capacity, then between the two.
    other = [[9.0, 8.0], [0.0, -1.0], [-5.0, -6.0]]
    rates = [[0.0, 0.5, 1.0], [0.0, 0.25, 1.0]]
    c = calibration(exit_capacities=[0.5, 1.0], exit_rates=rates, exit_scores=[one, other])
    assert c.exit_thresholds(0.25, 0.5) == [5.0, 4.0] and c.exit_thresholds(0.25, 1.0) == [0.0, -1.0]
    assert c.exit_thresholds(0.25, 0.75) == [2.5, 1.5]
    with pytest.raises(HatError, match="exit"):
        calibration().exit_thresholds(0.2, 1.0)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"sites": ["ffn"]}, r"sites \['ffn'\], expected \['qkv', 'o', 'gate_up', 'down'\]"),
        ({"thresholds": [[[0.0]]]}, "layers 1, expected 2"),
        ({"exit_scores": [[[1.0, 2.0]]]}, "exits 2, expected 1"),
    ],
)
def test_tables_for_another_model_are_refused(changes, words):
    c = calibration(**{"sites": ["qkv", "o", "gate_up", "down"], "exit_scores": [[[1.0]]], **changes})
    if words is None:
        c.check_fits(HatConfig(2, exit_layers=(1,)))
    else:
        with pytest.raises(HatError, match=f"the calibration is for another model: {words}"):
            c.check_fits(HatConfig(2, exit_layers=(1,)))
