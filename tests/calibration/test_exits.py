"""From an exit rate to one threshold per gate: what is requested is what happens."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny_runs import GRAINS, adaptive, new_hat, random_blocks, run_phase, untrained

from hat_lib.calibration import exits as module
from hat_lib.calibration.capacity import calibrate
from hat_lib.calibration.exits import calibrate_exits
from hat_lib.config import HatError
from hat_lib.model.policies import ExitThresholds

TEXT = random_blocks(40, 64, seed=4)
AT = (0.5, 0.8, 1.0)
pytestmark = pytest.mark.filterwarnings("ignore:token grain")


@pytest.fixture(scope="module", params=GRAINS)
def trained(request, tmp_path_factory):
    """Calibrated gates after 40 training steps."""
    hat = new_hat(request.param)
    run_phase(hat, tmp_path_factory.mktemp("exits"), "exit", steps=40, blocks=TEXT, exit_lr=0.02)
    calibrate(hat, TEXT, probe_tokens=64, progress=False)
    hat.capacity = 0.8
    _, agreement = calibrate_exits(hat, TEXT, AT, progress=False)
    # Those who leave first are those that agree most.
    assert np.shape(agreement) == (len(AT), len(module.RATES))
    by_rate = np.mean(agreement, 0)
    assert by_rate[:4].mean() > by_rate[-1] + 0.05
    return hat


@pytest.mark.slow
def test_rates_rise_and_settings_stay(trained):
    hat = trained
    made, hat.exit_rate = hat.calibration, 0.4
    calibrate_exits(hat, TEXT, AT, progress=False)
    assert hat.exit_rate == 0.4 and hat.capacity == 0.8 and hat.calibration == made
    assert made.exit_capacities == list(AT) and np.shape(made.exit_rates) == (len(AT), 1 + len(module.RATES))
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
    for row in range(1, len(module.RATES) + 1):
        thresholds = ExitThresholds(hat.gates, found.exit_scores[0][row])
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
