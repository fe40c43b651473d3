"""log.csv: one row for each logged step, however the run was interrupted; and what tensorboard reads."""

import pytest
from tiny_runs import GRAINS, interrupt_at, logged_steps, new_hat, recipe, run_phase, table

from hat_lib.config import HatError
from hat_lib.training.log import METRICS, CsvLog, seconds_so_far


@pytest.mark.parametrize("grain", GRAINS)
def test_columns_and_cells(grain, tmp_path):
    hat = new_hat(grain)
    for phase in ("routers", "exit"):
        run_phase(hat, tmp_path, phase)
    rows = table(tmp_path / "log.csv")
    sites = {"token": ["ffn"], "channel": ["qkv", "o", "gate_up", "down"]}[grain]
    shares = [f"share_{name}" for name in (*sites, 0, 1, 2, 3)]
    tail = ["grad_norm", "learning_rate", "tokens_per_second", "eta_seconds"]
    assert list(rows[0]) == ["phase", "step", "steps", "seconds", *METRICS, *shares, *tail]
    only_token = {"z_loss", "entropy"} if grain == "token" else set()
    of_routers = {"share", *shares} | only_token
    of_exit = {"gate_loss", "wrong", "exit_rate", "agreement"}
    for row in rows:
        filled = {name for name, cell in row.items() if cell != ""}
        both = {"phase", "step", "steps", "seconds", "loss", "capacity", "kl", *tail}
        assert filled == both | (of_routers if row["phase"] == "routers" else of_exit)
        assert row["steps"] == "6" and float(row["tokens_per_second"]) > 0
    # A layer's share is that of its sites weighted by work, and the total share is the mean over layers.
    for row in rows[:6]:
        by_site = sum(float(row[f"share_{s}"]) * work for s, work in zip(sites, hat.site_work, strict=True))
        by_layer = sum(float(row[f"share_{i}"]) for i in range(4)) / 4
        assert by_site == pytest.approx(by_layer, abs=2e-4) and by_layer == pytest.approx(float(row["share"]), abs=2e-4)


def test_a_row_for_every_logged_step_averaged_since_the_one_before(tmp_path):
    run_phase(new_hat("token"), tmp_path, steps=8, log_steps=3)
    rows = table(tmp_path / "log.csv")
    assert [int(row["step"]) for row in rows] == [1, 3, 6]
    drawn = [recipe("token").sampled_capacity(step, 8) for step in range(8)]
    expected = [drawn[0], sum(drawn[1:3]) / 2, sum(drawn[3:6]) / 3]
    assert [float(row["capacity"]) for row in rows] == pytest.approx(expected, rel=1e-5)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds) and seconds_so_far(tmp_path / "log.csv", "routers") == seconds[-1]
    assert seconds_so_far(tmp_path / "log.csv", "exit") == seconds_so_far(tmp_path / "none.csv", "exit") == 0


def test_the_estimate_is_the_pace_of_this_session_times_what_is_left(tmp_path, monkeypatch):
    class State:
        is_world_process_zero, global_step, max_steps = True, 10, 50

    class Args:
        world_size = 2

    clock = iter([100.0, 100.0, 100.0, 108.0, 108.0])  # created, cleared, started; a row 8 seconds later
    monkeypatch.setattr("hat_lib.training.log.time.monotonic", lambda: next(clock))
    log = CsvLog(tmp_path / "log.csv", "routers", new_hat("token"))
    log.on_train_begin(Args, State, None)
    log.note({"loss": 2.0, "kl": 1.0}, tokens=300)
    log.note({"loss": 4.0, "kl": 2.0}, tokens=100)
    State.global_step = 14
    log.on_log(Args, State, None, {"loss": 3.0, "grad_norm": 0.5, "learning_rate": 1e-3})
    (row,) = table(tmp_path / "log.csv")
    # 4 steps in 8 s, 36 left; 400 tokens in each of two processes.
    assert (row["eta_seconds"], row["tokens_per_second"], row["seconds"]) == ("72", "100", "8.0")
    assert (row["loss"], row["kl"], row["grad_norm"], row["learning_rate"]) == ("3", "1.5", "0.5", "0.001")


def test_a_resumed_run_has_no_step_twice_and_adds_up_its_time(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, ("routers", 3))
    run_phase(new_hat("token"), tmp_path)
    (events,) = (tmp_path / "work" / "routers").rglob("events.out.tfevents.*")  # written while it trains
    for tag in (b"train/loss", b"train/kl", b"train/share", b"train/grad_norm", b"train/learning_rate"):
        assert tag in events.read_bytes()
    path = tmp_path / "log.csv"
    lines = path.read_text().splitlines(keepends=True)
    # Two more steps that no checkpoint knows of, and half a row: what a kill leaves.
    later = [line.replace("routers,3,", f"routers,{n},") for n, line in ((4, lines[3]), (5, lines[3]))]
    long = [line.replace(line.split(",")[3], "90.0", 1) for line in lines[3:4]]
    path.write_text("".join([*lines[:3], *long, *later, lines[3][:30]]))
    run_phase(new_hat("token"), tmp_path, resume=True)
    assert logged_steps(tmp_path) == [("routers", step) for step in range(1, 7)]
    assert all(float(row["seconds"]) >= 90 for row in table(tmp_path / "log.csv")[2:])


@pytest.mark.slow
def test_a_log_with_other_columns_is_one_clear_error_and_stays(tmp_path, monkeypatch):
    """For a resumed phase, and for gates after routers; routers trained afresh start a new log."""
    path = tmp_path / "log.csv"
    interrupt_at(monkeypatch, ("routers", 3))
    run_phase(new_hat("token"), tmp_path)
    changed = path.read_text().replace("share_ffn", "share_mlp")
    path.write_text(changed)
    for phase, resume in (("routers", True), ("exit", False)):
        with pytest.raises(HatError, match=f"{path} has other columns than this run writes, share_ffn for one"):
            run_phase(new_hat("token"), tmp_path, phase, resume=resume)
    assert path.read_text() == changed
    run_phase(new_hat("token"), tmp_path, steps=2)
    assert logged_steps(tmp_path) == [("routers", 1), ("routers", 2)]


@pytest.mark.slow
def test_gates_trained_anew_keep_the_rows_of_their_routers(tmp_path):
    hat = new_hat("token")
    run_phase(hat, tmp_path)
    run_phase(hat, tmp_path, "exit")
    assert len(logged_steps(tmp_path)) == 12
    run_phase(hat, tmp_path, "exit", steps=2)
    assert logged_steps(tmp_path)[6:] == [("exit", 1), ("exit", 2)]
