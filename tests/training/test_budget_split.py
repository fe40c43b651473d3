"""The learned split of a budget: an offset per site at knots of capacity, folded into thresholds."""

import math

import pytest
import torch
from tiny_runs import new_hat, random_blocks, recipe, run_phase

from hat_lib.training.budget_split import KNOTS, UNTIL, BudgetSplit
from hat_lib.training.objective import Objective
from hat_lib.training.run import nominal_thresholds
from hat_lib.training.trainer import collate


def split():
    found = BudgetSplit(2, ("a", "b"))
    with torch.no_grad():
        found.offsets.copy_(torch.arange(12.0).view(3, 2, 2) / 10)
    return found


def test_offsets_are_interpolated_between_knots_and_end():
    found = split()
    for knot, offsets in zip(KNOTS, found.offsets, strict=True):
        assert torch.allclose(found.at(knot), offsets)
    assert torch.allclose(found.at((KNOTS[0] + KNOTS[1]) / 2), found.offsets[:2].mean(0))
    assert torch.allclose(found.at((KNOTS[-1] + UNTIL) / 2), found.offsets[-1] / 2)
    assert torch.equal(found.at(0.1), found.at(KNOTS[0])) and not found.at(UNTIL).any() and not found.at(1.0).any()


def test_thresholds_move_by_the_offsets():
    nominal = {(i, s): 1.0 + i for i in range(2) for s in "ab"}
    assert BudgetSplit(2, ("a", "b")).on(lambda c: nominal)(0.4) == nominal
    assert split().on(lambda c: nominal)(KNOTS[1])[1, "a"] == pytest.approx(2 * math.exp(-0.6))
    assert split().on(lambda c: nominal)(1.0) == nominal


def test_a_step_decides_at_the_moved_thresholds():
    """The training pass with offsets keeps what the method keeps at the thresholds they give."""
    hat = new_hat("channel")
    objective = Objective(hat, recipe("channel", capacity=0.5, spread=0.0), "routers", nominal_thresholds(hat))
    with torch.no_grad():
        objective.split.offsets.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    batch = collate([{"input_ids": ids, "index": i} for i, ids in enumerate(random_blocks(2, 24))])
    out = objective.eval()(**batch, step=0, steps=1)
    with torch.no_grad(), hat.dense(), hat.using(hat.threshold_policy(objective.thresholds(0.5))):
        hat.lm(batch["input_ids"], use_cache=False)
    assert float(out["share"]) == pytest.approx(float(hat.trace.capacity), abs=1e-4)
    assert objective.thresholds(0.5) != objective.nominal(0.5)


@pytest.mark.parametrize("changes", [{"split_lr": 0.0}, {}])
def test_it_trains_and_resumes_unless_its_rate_is_zero(changes, tmp_path):
    hat = new_hat("channel")
    nominal = nominal_thresholds(hat)
    whole = run_phase(hat, tmp_path / "whole", steps=3, **changes)
    assert (whole.thresholds(0.5) != nominal(0.5)) == (not changes)
    assert whole.thresholds(1.0) == nominal(1.0)
    run_phase(new_hat("channel"), tmp_path / "parts", steps=3, max_minutes=1e-9, **changes)
    again = run_phase(new_hat("channel"), tmp_path / "parts", steps=3, resume=True, **changes)
    assert again.thresholds(0.5) == whole.thresholds(0.5)
