"""A budget is spent once, and an FFN changes to choosing neurons as the budget falls, and never back."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_runs import random_blocks, untrained

from hat_lib.calibration.capacity import calibrate
from hat_lib.calibration.splits import BUDGETS, damage_splits

L, S = 4, 5
NEURONS = 2
"""the number of this site"""


def prices(hat, neurons: float):
    """Of sites, equal but for the neurons', and rising from layer to layer."""
    k = np.full((L, S), 0.2) * np.linspace(1, 2, L)[:, None]
    k[:, NEURONS] *= neurons
    return k, np.full((L, S), 3.0)


@pytest.mark.parametrize("neurons", [0.1, 0.4, 1e3])
def test_a_budget_is_spent_and_rules_change_once(neurons):
    hat = untrained("neuron")
    splits, work = damage_splits(hat, *prices(hat, neurons), []), np.array(hat.site_work)
    chosen = np.array([split.shares[:, NEURONS] < 1 for split in splits])
    assert (np.diff(chosen.astype(int), axis=0) <= 0).all() and chosen.any() == (neurons < 1)
    for split, rule in zip(splits, chosen, strict=True):
        of_layer = split.shares @ work
        ffn = work[3] * (split.shares[:, NEURONS] + hat.grain.preview) + work[4] * split.shares[:, NEURONS]
        of_layer[rule] = (split.shares[:, :2] @ work[:2] + ffn)[rule]
        if split.budget >= 0.3:
            assert of_layer.mean() == pytest.approx(split.budget, abs=1e-6)
    for (before, after), (rule, next_rule) in zip(pairwise(splits), pairwise(chosen), strict=True):
        assert (before.budget == after.budget) == (rule != next_rule).any()
    assert {split.budget for split in splits} == set(BUDGETS)


def test_the_dial_has_no_jump():
    hat = untrained("neuron")
    calibrate(hat, random_blocks(16, 64), probe_tokens=256, head=False, progress=False)
    capacities, fresh = hat.calibration.capacities, torch.tensor(random_blocks(8, 64, seed=9))
    assert any(before == after for before, after in pairwise(capacities)), "some layer must change its rule"
    realised = []
    with torch.no_grad():
        for capacity in np.linspace(0.35, 0.95, 25):
            hat.capacity = capacity
            hat.lm(fresh)
            realised.append(hat.trace.capacity)
    assert np.abs(np.array(realised) - np.linspace(0.35, 0.95, 25)).max() < 0.05 and (np.diff(realised) > 0).all()
