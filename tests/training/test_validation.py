"""The learning curve: measured outside training, which it does not change; a resumed run continues it."""

import math

import pytest
import torch
from tiny_runs import new_hat, page, random_blocks, rows, run_phase, table, tiny_run

from hat_lib.evaluation.perplexity import score_each
from hat_lib.model.checkpoint import ADAPTER_FILE
from hat_lib.training.run import nominal_thresholds, train
from hat_lib.training.validation import CAPACITIES, Validation


def validation_blocks(n=2):
    blocks = rows(random_blocks(n, 32, seed=5))
    return blocks.add_column("n_context", [0] * n)


def curve(folder):
    return [{name: float(value) for name, value in row.items()} for row in table(folder / "validation.csv")]


def test_a_row_is_what_evaluation_says():
    hat, blocks = new_hat("channel"), validation_blocks(3)
    thresholds = nominal_thresholds(hat)
    hat.train()
    found = Validation("unused.csv", hat, blocks, thresholds, 64).measure(7)
    assert hat.training and [row["capacity"] for row in found] == list(CAPACITIES)
    hat.eval()
    for row in found:
        with hat.using(hat.threshold_policy(thresholds(row["capacity"]))):
            _, (there,) = score_each(hat, blocks, progress=False)
        assert row["step"] == 7 and row["tokens"] == 448
        assert row["kl"] == pytest.approx(there.agreement.kl, abs=1e-5) and row["kl"] > 0
        assert row["share"] == pytest.approx(row["capacity"], abs=0.1)
    assert found[0]["kl"] < found[-1]["kl"]


@pytest.mark.slow
def test_a_run_draws_its_curve_and_is_the_same_run(tmp_path):
    text = page(tmp_path)
    how = {"validation": str(text), "validation_tokens": 128}
    train(tiny_run("channel", text, "routers"), tmp_path / "without", progress=False)
    train(tiny_run("channel", text, "routers", **how), tmp_path / "with", progress=False)
    assert (tmp_path / "with" / ADAPTER_FILE).read_bytes() == (tmp_path / "without" / ADAPTER_FILE).read_bytes()
    assert not (tmp_path / "without" / "validation.csv").exists()
    assert [row["step"] for row in curve(tmp_path / "with")] == [s for s in (0, 4, 8, 10) for _ in CAPACITIES]
    assert all(math.isfinite(value) for row in curve(tmp_path / "with") for value in row.values())


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_curve(tmp_path, monkeypatch):
    blocks, written = validation_blocks(), []
    once = Validation.measure
    monkeypatch.setattr(Validation, "measure", lambda self, step: written.append(step) or once(self, step))
    hat = new_hat("channel")
    run_phase(hat, tmp_path, steps=12, max_minutes=1e-9, validation=blocks)
    assert written == [0, 1], "stopped after its first step, which is saved"
    with (tmp_path / "validation.csv").open("a") as file:
        file.write("9,576,0.4,0.4,0.5,0.5\n")  # from a lost step
    run_phase(hat, tmp_path, steps=12, resume=True, validation=blocks)
    assert written == [0, 1, 4, 8, 12]
    assert [row["step"] for row in curve(tmp_path)] == [s for s in written for _ in CAPACITIES]
    assert torch.isfinite(torch.tensor([row["kl"] for row in curve(tmp_path)])).all()
