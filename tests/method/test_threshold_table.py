"""From a capacity or an exit rate to thresholds: interpolation between measured ones, and what is refused."""

import numpy as np
import pytest

from hat_lib.checkpoint import check_calibration
from hat_lib.config import HatConfig, HatError
from hat_lib.method.thresholds import Calibration


def calibration(**changes):
    values = {
        "sites": ["a", "b"],
        "capacities": [0.2, 0.5, 1.0],
        "thresholds": [[[4.0, 2.0, 0.0], [8.0, 3.0, 0.0]], [[1.0, 0.5, 0.0], [2.0, 2.0, -1.0]]],
        "shares": [[[0.1, 0.4, 1.0], [0.2, 0.5, 1.0]], [[0.3, 0.6, 1.0], [0.2, 0.5, 1.0]]],
    }
    return Calibration(**values | changes)


def test_interpolates():
    # 0.35 is halfway from 0.2 to 0.5, and 0.9 is 0.8 of the way from 0.5 to 1.0.
    halfway = calibration().thresholds_at(0.35)
    assert halfway == pytest.approx({(0, "a"): 3.0, (0, "b"): 5.5, (1, "a"): 0.75, (1, "b"): 2.0})
    assert calibration().thresholds_at(0.5)[0, "b"] == 3.0
    assert calibration().thresholds_at(0.9)[1, "b"] == pytest.approx(-0.4)
    c = calibration(sensitivity=[0.0, 0.6, 1.0])
    assert c.thresholds_at(0.35)[1, "token"] == pytest.approx(0.3) and c.thresholds_at(1.0)[0, "token"] == 1
    assert calibration().shares_at(0.35) == pytest.approx(np.array([[0.25, 0.35], [0.45, 0.35]]))


def test_nested_in_capacity():
    c = calibration()
    tables = [c.thresholds_at(x) for x in np.linspace(0.1, 1.0, 37)]
    for low, high in zip(tables, tables[1:], strict=False):
        assert all(high[k] <= low[k] for k in low)
    assert tables[0] == c.thresholds_at(0.2) and set(tables[-1].values()) == {-np.inf}
    c = calibration(capacities=[0.5, 0.5, 1.0])  # equal ones cause no division by zero
    assert all(np.isfinite(list(c.thresholds_at(x).values())).all() for x in (0.1, 0.5, 0.7))
    with pytest.raises(HatError, match="capacity"):
        calibration().thresholds_at(0.05)


def test_exit_thresholds():
    """Interpolated first along the rates of each capacity, then between capacities."""
    scores = [[[9.0, 8.0], [1.0, 0.0], [-5.0, -6.0]], [[9.0, 8.0], [0.0, -1.0], [-5.0, -6.0]]]
    rates = [[0.0, 0.5, 1.0], [0.0, 0.25, 1.0]]
    c = calibration(exit_capacities=[0.5, 1.0], exit_rates=rates, exit_scores=scores)
    assert c.exit_thresholds(0.0, 0.5) == [np.inf, np.inf]
    assert c.exit_thresholds(0.5, 0.1) == c.exit_thresholds(0.5, 0.5) == [1.0, 0.0]  # the nearest measured capacity
    assert c.exit_thresholds(0.75, 0.5) == [-2.0, -3.0]
    assert c.exit_thresholds(0.625, 0.75) == [-1.5, -2.5]
    # Nor is rate 0 a measured one: between it and the lowest, nobody would leave.
    assert c.exit_thresholds(1e-9, 0.5) == c.exit_thresholds(0.4, 0.5) == [1.0, 0.0]
    for capacity in (0.1, 0.6, 0.9, 1.0):  # a token that leaves at a rate also leaves at a higher one
        rising = [c.exit_thresholds(rate, capacity) for rate in np.linspace(0, 1, 33)]
        assert (np.diff(rising, axis=0) <= 0).all()
    with pytest.raises(HatError, match="exit"):
        calibration().exit_thresholds(0.2, 1.0)


GOOD = {
    "sites": ["qkv", "o", "gate_up", "down"],
    "capacities": [0.2, 0.5, 1.0],
    "thresholds": [[[4.0, 2.0, 0.0]] * 4] * 2,
    "shares": [[[0.1, 0.5, 1.0]] * 4] * 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": ["qkv"]},
        {"shares": [[[0.1, 1.5, 1.0]] * 4] * 2},
        {"shares": [[[0.1, True, 1.0]] * 4] * 2},
        {"thresholds": [[[np.inf, 2.0, -np.inf]] * 4] * 2},
        {"capacities": [np.nan, 0.5, 1.0]},
        {"thresholds": [[[1.0, 2.0, 0.0]] * 4] * 2},
        {"thresholds": [[[1.0, 0.0]] * 4] * 2},
        {"capacities": [0.2, 0.5, 0.9]},
        {"capacities": ["0.2", 0.5, 1.0]},
        {"head_thresholds": [3.0, 2.0, 1.0]},
        {"sensitivity": [0.5, 0.2, 1.0]},
    ],
)
def test_check(changes):
    check_calibration(Calibration(**GOOD), HatConfig(2))
    with pytest.raises(HatError):
        check_calibration(Calibration(**GOOD | changes), HatConfig(2))
