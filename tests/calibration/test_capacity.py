"""Calibration on a tiny random Llama: the request is realised, and the model is otherwise as it was."""

import gc
from functools import partial

import numpy as np
import pytest
import torch
from tiny_runs import GRAINS, decides, random_blocks, skipping, untrained

from hat_lib.calibration import capacity, quantiles
from hat_lib.calibration.capacity import calibrate, calibrate_learned
from hat_lib.config import HatError

blocks = partial(random_blocks, length=64)
pytestmark = pytest.mark.filterwarnings("ignore:token grain")


@pytest.mark.parametrize(("grain", "capacities"), [("channel", (0.3, 0.5, 0.75, 0.9)), ("token", (0.5, 0.7, 0.9))])
def test_realises_the_requested_capacity(grain, capacities):
    hat = untrained(grain)
    calibrate(hat, blocks(), probe_tokens=256, progress=False)
    fresh = torch.tensor(blocks(8, seed=9))
    with torch.no_grad():
        for requested in capacities:
            hat.capacity = requested
            hat.lm(fresh)
            assert abs(hat.trace.capacity - requested) < (0.02 if grain == "channel" else 0.06)


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


@pytest.mark.parametrize("grain", GRAINS)
def test_settings_and_exit_tables_stay(grain):
    hat = decides(skipping(grain), {}, [0.0] * 3)
    ids, before = torch.tensor(blocks(2)), hat.calibration
    for text, how in ((blocks(2, length=16), {}), (blocks(), {"split": "even"})):
        with pytest.raises(HatError):
            calibrate(hat, text, progress=False, **how)
    assert hat.calibration is before
    calibrate(hat, blocks(), probe_tokens=128, progress=False)
    assert hat.capacity == 0.7 and hat.exit_rate == 0.2 and hat.calibration.exit_scores == [[[0.0] * 3] * 2]
    with torch.no_grad():
        hat.lm(ids)
        realised = hat.trace.share
        with hat.using(hat.threshold_policy(hat.calibration.thresholds_at(0.7))):
            hat.lm(ids)
    assert torch.equal(hat.trace.share, realised)


@pytest.mark.slow
@pytest.mark.parametrize("grain", GRAINS)
def test_batches_measure_what_blocks_do_alone(grain, monkeypatch):
    hat = untrained(grain)
    mixed = [ids for pair in zip(blocks(12), blocks(12, length=40, seed=1), strict=True) for ids in pair]
    found = calibrate(hat, mixed, probe_tokens=128, progress=False)
    monkeypatch.setattr(quantiles, "BATCH_TOKENS", 1)
    alone = calibrate(hat, mixed, probe_tokens=128, progress=False)
    np.testing.assert_allclose(found.capacities, alone.capacities, atol=2e-3)
    np.testing.assert_allclose(found.shares, alone.shares, atol=5e-3)


def test_learned_thresholds_are_measured_on_all_blocks():
    hat, text = untrained(), [*blocks(6), *([token % 8 + 5 for token in block] for block in blocks(2))]
    calibrate(hat, blocks(), probe_tokens=64, head=False, progress=False)
    thresholds = hat.calibration.thresholds_at
    found = calibrate_learned(hat, text, lambda b: thresholds(max(b, 0.1)), lambda b: None, progress=False)
    for row in (5, 10):
        with torch.no_grad(), hat.dense(), hat.using(hat.threshold_policy(thresholds(capacity.BUDGETS[row]))):
            realised = []
            for block in text:
                hat.lm(torch.tensor([block]))
                realised.append(hat.trace.capacity)
        assert found.capacities[row] == pytest.approx(np.mean(realised), abs=1e-4)


def test_some_scores_of_all_tokens_say_what_all_scores_say(monkeypatch):
    hat, text = untrained(), [torch.tensor([b]) for b in blocks(8)]
    whole = quantiles.score_quantiles(hat, text, progress=False)
    monkeypatch.setattr(quantiles, "SAMPLES", 4_000)
    some = quantiles.score_quantiles(hat, text, progress=False)
    assert some.tokens == whole.tokens == 8 * 62 and 4_000 <= some.scores <= 4_100
    for share in (0.3, 0.5, 0.7):
        a, b = (np.array(list(q.thresholds(share).values())) for q in (whole, some))
        assert np.abs(a / b - 1).max() < 0.12
