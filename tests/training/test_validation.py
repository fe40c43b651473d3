"""The learning curve: measured outside training, which it does not change; a resumed run continues it."""

import pytest
from tiny_runs import new_hat, random_blocks, rows, run_phase, table

from hat_lib.evaluation.perplexity import score_each
from hat_lib.training.run import nominal_thresholds
from hat_lib.training.validation import CAPACITIES, extend_curve

BLOCKS = rows(random_blocks(2, 32, seed=5)).add_column("n_context", [0] * 2)


def test_a_row_is_what_evaluation_says(tmp_path):
    hat = new_hat("channel").train()
    thresholds = nominal_thresholds(hat)
    extend_curve(tmp_path / "validation.csv", hat, BLOCKS, thresholds, 0, 448)
    assert hat.training
    hat.eval()
    found = table(tmp_path / "validation.csv")
    assert [float(row["capacity"]) for row in found] == list(CAPACITIES)
    for row, capacity in zip(found, CAPACITIES, strict=True):
        with hat.using(hat.threshold_policy(thresholds(capacity))):
            _, (there,) = score_each(hat, BLOCKS, progress=False)
        assert row["step"] == "0" and row["tokens"] == "448"
        assert float(row["kl"]) == pytest.approx(there.kl, abs=1e-5)
        assert float(row["share"]) == pytest.approx(capacity, abs=0.1)
    assert 0 < float(found[0]["kl"]) < float(found[-1]["kl"])


def test_a_resumed_run_goes_on_with_its_curve(tmp_path):
    run_phase(new_hat("channel"), tmp_path / "whole", steps=3, save_steps=2)
    hat = new_hat("channel")
    run_phase(hat, tmp_path, steps=3, save_steps=2, max_minutes=1e-9, validation=BLOCKS)
    run_phase(hat, tmp_path, steps=3, save_steps=2, resume=True, validation=BLOCKS)
    steps = [int(row["step"]) for row in table(tmp_path / "validation.csv")]
    assert steps == [step for step in (0, 1, 2, 3) for _ in CAPACITIES]
    undisturbed, measured = (table(folder / "log.csv") for folder in (tmp_path / "whole", tmp_path))
    assert [row["loss"] for row in measured] == [row["loss"] for row in undisturbed]
