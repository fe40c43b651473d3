"""From a capacity or an exit rate to thresholds, on a tiny random Llama: the request is realised, and the model is
otherwise as it was."""

import gc
from functools import partial

import numpy as np
import pytest
import torch
from tiny_runs import GRAINS, adaptive, decides, new_hat, random_blocks, run_phase, skipping, untrained

from hat_lib.calibration import capacity, exits, quantiles
from hat_lib.calibration.capacity import calibrate, calibrate_learned
from hat_lib.calibration.exits import calibrate_exits
from hat_lib.config import HatError

blocks = partial(random_blocks, length=64)
TEXT, AT = blocks(40, seed=4), (0.5, 0.8, 1.0)
pytestmark = pytest.mark.filterwarnings("ignore:token grain")


@pytest.mark.parametrize(("grain", "capacities"), [("channel", (0.3, 0.5, 0.75, 0.9)), ("token", (0.5, 0.7, 0.9))])
def test_realises_the_requested_capacity(grain, capacities):
    hat = untrained(grain)
    calibrate(hat, blocks(), probe_tokens=256, progress=False)
    fresh = torch.tensor(blocks(8, seed=9))
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


# Exits


@pytest.fixture(scope="module", params=GRAINS)
def trained(request, tmp_path_factory):
    """Calibrated gates after 40 training steps."""
    hat = new_hat(request.param)
    run_phase(hat, tmp_path_factory.mktemp("exits"), "exit", steps=40, blocks=TEXT, exit_lr=0.02)
    calibrate(hat, TEXT, probe_tokens=64, progress=False)
    hat.capacity = 0.8
    _, agreement = calibrate_exits(hat, TEXT, AT, progress=False)
    # Those who leave first are those that agree most.
    assert np.shape(agreement) == (len(AT), len(exits.RATES))
    by_rate = np.mean(agreement, 0)
    assert by_rate[:4].mean() > by_rate[-1] + 0.05
    return hat


@pytest.mark.slow
def test_rates_rise_and_settings_stay(trained):
    hat = trained
    made, hat.exit_rate = hat.calibration, 0.4
    calibrate_exits(hat, TEXT, AT, progress=False)
    assert hat.exit_rate == 0.4 and hat.capacity == 0.8 and hat.calibration == made
    assert made.exit_capacities == list(AT) and np.shape(made.exit_rates) == (len(AT), 1 + len(exits.RATES))
    assert all(len(set(rates)) > 8 and rates[-1] == pytest.approx(62 / 64) for rates in made.exit_rates)


@pytest.mark.parametrize(
    ("rate", "capacity"), [(0.0, 0.8), (0.05, 0.5), (0.4, 0.5), (0.4, 0.8), (0.4, 1.0), (0.93, 1.0), (1.0, 0.5)]
)
def test_realises_the_requested_rate(trained, rate, capacity):
    with torch.no_grad(), trained.at(exit_rate=rate), trained.at(capacity):  # which moves the gates' thresholds, too
        trained.lm(torch.tensor(TEXT[3::4]), use_cache=False)
    found = trained.trace.exit_rate
    # On the blocks that the table was measured on, between its rates on either side of the requested one.
    table = trained.calibration.exit_rates[AT.index(capacity)]
    low, high = max(r for r in table if r <= rate), min([r for r in table if r >= rate], default=table[-1])
    slack = 0.02 if 0 < rate < 1 else 1e-6  # none leaves, or all but the first two of each row
    assert low - slack <= found <= high + slack


@torch.no_grad()
@pytest.mark.slow
def test_what_is_realised_is_measured_on_other_blocks_than_were_fitted():
    hat, other = adaptive("channel"), list(TEXT)
    other[3::4] = random_blocks(10, 64, seed=5)
    (first, _), (found, agreement) = (calibrate_exits(hat, text, [0.8], progress=False) for text in (TEXT, other))
    assert found.exit_scores == first.exit_scores and found.exit_rates != first.exit_rates
    checked = torch.tensor(other[3::4])
    with hat.dense():
        base = hat.lm(checked).logits.argmax(-1)
    for row in range(1, len(exits.RATES) + 1):
        thresholds = found.exit_scores[0][row]
        with hat.dense(), hat.at(0.8), hat.using(exits=thresholds):
            same = (hat.lm(checked).logits.argmax(-1) == base)[hat.trace.exited]
        assert found.exit_rates[0][row] == pytest.approx(len(same) / checked.numel(), abs=0.02)
        if len(same) > 100:  # one token more or less then does not matter
            assert agreement[0][row - 1] == pytest.approx(float(same.float().mean()), abs=0.02)


@pytest.mark.parametrize(
    "make, text", [(new_hat, TEXT[:2]), (untrained, TEXT), (partial(untrained, exit_layers=()), TEXT)]
)
def test_refusals(make, text):
    with pytest.raises(HatError):
        calibrate_exits(make("channel"), text, AT, progress=False)
