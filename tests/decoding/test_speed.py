"""The speed model: a falling curve, searched, and cached by all it depends on; times paired at the same positions."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_runs import adaptive

from hat_lib.config import HatError
from hat_lib.decoding import speed as module
from hat_lib.decoding.inference import AdaptiveInference
from hat_lib.decoding.speed import SpeedCurve, sample, seeded, speed_curve, timed

CURVE = SpeedCurve("dense", 0.0, [0.1, 0.4, 0.7, 1.0], [[2.0], [1.6], [1.3], [1.0]], "cpu, float32, 1 threads")


@pytest.fixture(scope="module")
def hat():
    return adaptive("token")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HAT_CACHE", str(tmp_path))
    return tmp_path / "speed"


def test_largest_capacity_that_reaches_the_target():
    for target in (1.05, 1.3, 1.45, 2.0):
        capacity = CURVE.capacity_for(target)
        assert CURVE.at(capacity) >= target > CURVE.at(min(1.0, capacity + 2e-4))
    assert CURVE.capacity_for(1.45) == pytest.approx(0.55, abs=1e-4)
    assert CURVE.capacity_for(0.5) == CURVE.capacity_for(1.0) == 1.0
    with pytest.raises(HatError, match="at most 2.000"):
        CURVE.capacity_for(2.5)


def test_curve_and_its_spread_fall():
    bumpy = dataclasses.replace(CURVE, turns=[[1.2], [0.9], [1.0], [0.97]])
    assert np.allclose(bumpy.at(CURVE.capacities), [1.2, 0.9567, 0.9567, 0.9567], atol=1e-4)
    curve = dataclasses.replace(CURVE, turns=[[1.5, 2.0, 2.5], [1.55, 1.6, 1.7], [1.2, 1.3, 1.3], [0.8, 1.0, 1.35]])
    for capacity in np.linspace(0.1, 1, 19):
        low, high = curve.spread(capacity)
        assert low <= curve.at(capacity) <= high
    assert curve.spread(0.1) == pytest.approx((1.525, 2.5)) and curve.spread(1.0) == pytest.approx((0.8, 1.325))


@pytest.fixture
def turns(cache, monkeypatch):
    """Instant measurements: 2 - capacity, with the first turn of each curve off by one."""
    calls, first = [], len(module.CAPACITIES) * module.ROUNDS
    slow = lambda: calls.append(0) or len(calls) % first == 1  # noqa: E731
    monkeypatch.setattr(module, "timed", lambda hat, *_: 2 - hat.capacity + slow())
    return lambda: len(calls) / first


def test_curve_is_measured_once_and_on_request(hat, turns, cache):
    before, first = hat.capacity, speed_curve(hat)
    assert first.at(0.3) == pytest.approx(1.7) and first.at(0.1) == pytest.approx(1.9), "one slow turn does not count"
    assert first.spread(0.1) == pytest.approx((1.9, 2.9))
    assert AdaptiveInference(hat).curve() == first and turns() == 1
    assert AdaptiveInference(hat).curve(refresh=True) == first and turns() == 2
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    assert speed_curve(hat) == first and turns() == 3 and hat.capacity == before


def test_curve_is_kept_under_what_it_depends_on(hat, turns, cache, monkeypatch):
    speed_curve(hat)
    threads, parameter = torch.get_num_threads(), next(iter(hat.hat_parameters().values()))
    for how in ({"exit_rate": 0.3}, {"batch": 2}):
        speed_curve(hat, **how)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 7)
    speed_curve(hat)
    with torch.no_grad():
        parameter.add_(1.0)
        speed_curve(hat)
        parameter.sub_(1.0)
    assert turns() == len(list(cache.iterdir())) == 5


def test_timed_for_real(hat):
    ids = sample(hat, 30)
    assert ids.shape == (1, 30)
    with ThreadPoolExecutor(1) as pool:
        with seeded(0, hat.base.device):
            again = pool.submit(sample, hat, 30)
            with pytest.raises(TimeoutError):
                again.result(0.5)  # another thread has torch's generator
        assert torch.equal(ids, again.result())
    with hat.at(0.5):
        for text in (ids, ids[:, :4]):
            assert timed(hat, (hat, hat.dense), text) > 0  # on a busy machine it may be anything
