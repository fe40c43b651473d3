"""The learning curve: measured outside training, which it does not change; a resumed run continues it."""

import pytest
from tiny_runs import new_hat, random_blocks, rows, run_phase, table

from hat_lib.evaluation.perplexity import score_each
from hat_lib.training.run import nominal_thresholds
from hat_lib.training.validation import CAPACITIES, Validation


def validation_blocks(n=2):
    return rows(random_blocks(n, 32, seed=5)).add_column("n_context", [0] * n)


def test_a_row_is_what_evaluation_says(tmp_path):
    hat, blocks = new_hat("channel"), validation_blocks(3)
    thresholds = nominal_thresholds(hat)
    hat.train()
    found = Validation(tmp_path / "validation.csv", hat, blocks, thresholds, 64).measure(7)
    assert hat.training and [row["capacity"] for row in found] == list(CAPACITIES)
    hat.eval()
    for row in found:
        with hat.using(hat.threshold_policy(thresholds(row["capacity"]))):
            _, (there,) = score_each(hat, blocks, progress=False)
        assert row["step"] == 7 and row["tokens"] == 448
        assert row["kl"] == pytest.approx(there.kl, abs=1e-5) and row["kl"] > 0
        assert row["share"] == pytest.approx(row["capacity"], abs=0.1)
    assert found[0]["kl"] < found[-1]["kl"]


def test_a_resumed_run_goes_on_with_its_curve(tmp_path):
    blocks = validation_blocks()
    run_phase(new_hat("channel"), tmp_path / "whole", steps=3, save_steps=2)
    hat = new_hat("channel")
    run_phase(hat, tmp_path, steps=3, save_steps=2, max_minutes=1e-9, validation=blocks)
    with (tmp_path / "validation.csv").open("a") as file:
        file.write("2,128,0.4,0.4,0.5,0.5\n")  # from a lost step
    run_phase(hat, tmp_path, steps=3, save_steps=2, resume=True, validation=blocks)
    steps = [int(row["step"]) for row in table(tmp_path / "validation.csv")]
    assert steps == [step for step in (0, 1, 2, 3) for _ in CAPACITIES]
    undisturbed, measured = (table(folder / "log.csv") for folder in (tmp_path / "whole", tmp_path))
    assert [row["loss"] for row in measured] == [row["loss"] for row in undisturbed]
