"""log.csv, tensorboard and validation.csv: a row for each logged step and each point of the learning curve, however the
run was interrupted."""

import pytest
from tiny_runs import GRAINS, interrupt_at, logged_steps, new_hat, random_blocks, recipe, rows, run_phase, table

from hat_lib.evaluation.perplexity import score_each
from hat_lib.training.log import seconds_so_far
from hat_lib.training.run import nominal_thresholds
from hat_lib.training.validation import CAPACITIES, extend_curve

BLOCKS = rows(random_blocks(2, 32, seed=5)).add_column("n_context", [0] * 2)


@pytest.mark.parametrize("grain", GRAINS)
def test_columns_and_cells(grain, tmp_path):
    hat = new_hat(grain)
    for phase in ("routers", "exit"):
        run_phase(hat, tmp_path, phase, steps=2)
    found = table(tmp_path / "log.csv")
    assert logged_steps(tmp_path) == [("routers", 1), ("routers", 2), ("exit", 1), ("exit", 2)]
    sites = {"token": ["ffn"], "channel": ["qkv", "o", "gate_up", "down"]}[grain]
    shares = [f"share_{name}" for name in (*sites, 0, 1, 2, 3)]
    always = {"phase", "step", "steps", "seconds", "loss", "capacity", "kl", "grad_norm", "learning_rate"}
    always |= {"tokens_per_second", "eta_seconds"}
    only_token = {"z_loss", "entropy"} if grain == "token" else set()
    of_phase = {"routers": {"share", *shares} | only_token, "exit": {"gate_loss", "wrong", "exit_rate", "agreement"}}
    for row in found:
        assert {name for name, cell in row.items() if cell != ""} == always | of_phase[row["phase"]]
    # A layer's share is that of its sites weighted by work, and the total share is the mean over layers.
    for row in found[:2]:
        by_site = sum(float(row[f"share_{s}"]) * work for s, work in zip(sites, hat.site_work, strict=True))
        by_layer = sum(float(row[f"share_{i}"]) for i in range(4)) / 4
        assert by_site == pytest.approx(by_layer, abs=2e-4) and by_layer == pytest.approx(float(row["share"]), abs=2e-4)
    run_phase(hat, tmp_path, "exit", steps=1)  # gates trained anew keep the rows of their routers
    assert logged_steps(tmp_path) == [("routers", 1), ("routers", 2), ("exit", 1)]


def test_a_row_is_the_mean_since_the_one_before(tmp_path):
    run_phase(new_hat("token"), tmp_path, steps=5, log_steps=2)
    found = table(tmp_path / "log.csv")
    assert [int(row["step"]) for row in found] == [1, 2, 4]
    drawn = [recipe("token").sampled_capacity(step, 5) for step in range(5)]
    assert [float(row["capacity"]) for row in found] == pytest.approx([*drawn[:2], sum(drawn[2:4]) / 2], rel=1e-5)
    assert seconds_so_far(tmp_path / "log.csv", "routers") == float(found[-1]["seconds"])
    assert seconds_so_far(tmp_path / "log.csv", "exit") == seconds_so_far(tmp_path / "none.csv", "exit") == 0


def test_a_resumed_run_has_no_step_twice_and_adds_up_its_time(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, ("routers", 2))
    run_phase(new_hat("token"), tmp_path, steps=4)
    (events,) = (tmp_path / "work" / "routers").rglob("events.out.tfevents.*")
    for tag in (b"train/loss", b"train/kl", b"train/share", b"train/grad_norm", b"train/learning_rate"):
        assert tag in events.read_bytes()
    path = tmp_path / "log.csv"
    header, first, second = path.read_text().splitlines(keepends=True)
    second = second.replace(second.split(",")[3], "90.0", 1)
    # A step that no checkpoint knows of, and half a row: what a kill leaves.
    path.write_text("".join([header, first, second, second.replace("routers,2,", "routers,3,"), second[:30]]))
    run_phase(new_hat("token"), tmp_path, steps=4, resume=True)
    assert logged_steps(tmp_path) == [("routers", step) for step in range(1, 5)]
    assert all(float(row["seconds"]) >= 90 for row in table(path)[1:])


def test_the_learning_curve_is_what_evaluation_says(tmp_path):
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
