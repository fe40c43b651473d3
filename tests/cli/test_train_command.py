"""`hat train` as a person types it: how it starts and how it ends."""

import json
import os
import signal
import sys
import time

import pytest
import tiny_runs
import torch

from hat_lib.cli.app import main
from hat_lib.training.trainer import STATE_FILE

TINY = ("--base", "random:tiny", "--profile", "quick", "--dtype", "fp32", "--granularity", "token",
        "--set", "tokens=1024", "--set", "block_size=64", "--set", "batch_size=2", "--set", "save_steps=3")  # fmt: skip


@pytest.mark.slow
def test_a_run_from_nothing_to_a_model_that_generates(run_hat, text, tmp_path):
    folder = tmp_path / "my run"
    code, out, err = run_hat("train", *TINY, "--save", folder, "--text", text, "--set", "router_epochs=2")
    assert code == 0 and out.splitlines()[-1] == f"wrote {folder}", err
    run = json.loads((folder / "run.json").read_text())
    assert run["recipe"]["router_epochs"] == 2 and f"'{folder}'" in run["command"]  # it can be pasted
    options = ("--checkpoint", folder, "--capacity", "0.6", "--exit-rate", "0.3", "--max-new-tokens", "4")
    code, out, _ = run_hat("generate", "Line 5:", *options)
    assert code == 0 and "exit rate 0.30 requested" in out
    code, out, _ = run_hat("train", "--resume", folder)
    assert (code, out) == (0, f"nothing to do: the run in {folder} is finished\n")


def test_max_minutes_stops_saved_and_says_how_to_go_on(run_hat, text, tmp_path):
    code, out, _ = run_hat("train", *TINY, "--save", tmp_path / "run", "--text", text, "--max-minutes", "0.000001")
    assert code == 0 and out.splitlines()[-1].endswith(f"hat train --resume {tmp_path / 'run'}")


def command(args, out):
    """`hat` in a separate process."""
    sys.stdout = sys.stderr = open(out, "w")  # noqa: SIM115
    sys.argv = ["hat", *args]
    main()


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_process(run_hat, text, tmp_path, number, code):
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    args = ("train", *TINY, "--text", text, "--set", "router_epochs=1000", "--save", folder)
    process = tiny_runs.start(command, [str(a) for a in args], out)
    deadline = time.monotonic() + 60
    while not ((folder / "log.csv").exists() and len((folder / "log.csv").read_text().splitlines()) > 3):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    assert run_hat("train", "--resume", folder)[0] == 2  # a second run in the folder of the first
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code and out.read_text().splitlines()[-1].endswith(f"hat train --resume {folder}")
    last = (folder / "log.csv").read_text().splitlines()[-1].split(",")[1]
    assert torch.load(folder / "work" / "routers" / STATE_FILE)["step"] == int(last)
