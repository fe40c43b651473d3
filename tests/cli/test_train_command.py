"""`hat train` as a person types it: how it starts and how it ends."""

import json
import os
import re
import signal
import sys
import time

import pytest
import tiny_runs
from tiny_runs import page

from hat_lib.cli.app import main
from hat_lib.training import run as module

TINY = ("--base", "random:tiny", "--profile", "quick", "--dtype", "fp32", "--granularity", "token",
        "--set", "tokens=1024", "--set", "block_size=64", "--set", "batch_size=2", "--set", "save_steps=3")  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return page(tmp_path_factory.mktemp("text"))


@pytest.mark.slow
def test_a_run_from_nothing_to_a_model_that_generates(hat, text, tmp_path, monkeypatch):
    folder = tmp_path / "my run"
    code, out, err = hat("train", *TINY, "--save", folder, "--text", text, "--set", "router_epochs=2")
    assert code == 0 and out.splitlines()[-1] == f"wrote {folder}" and "{'" not in out + err, err
    assert re.match(r"routers: 16 of 16 steps in \d+\.\d minutes\nexit: 8 of 8 steps in \d+\.\d minutes\n", out)
    assert re.search(r"routers, loss \d+\.\d+: 100%", err) and re.search(r"exit, loss \d+\.\d+: 100%", err)  # progress
    run = json.loads((folder / "run.json").read_text())
    assert run["recipe"]["router_epochs"] == 2 and run["command"].endswith("--set router_epochs=2")
    assert f"'{folder}'" in run["command"]  # quoted, so that it can be pasted

    options = ("--checkpoint", folder, "--capacity", "0.6", "--exit-rate", "0.3", "--max-new-tokens", "4")
    code, out, _ = hat("generate", "--prompt", "Line 5:", *options)
    assert code == 0 and "exit rate 0.30 requested" in out

    before = (folder / "log.csv").read_bytes()
    monkeypatch.setattr(module, "load_base", lambda *args, **options: pytest.fail("a base was loaded"))
    code, out, _ = hat("train", "--resume", folder)
    assert (code, out) == (0, f"nothing to do: the run in {folder} is finished\n")
    assert (folder / "log.csv").read_bytes() == before


def test_max_minutes_stops_saved_and_says_how_to_go_on(hat, text, tmp_path):
    code, out, _ = hat("train", *TINY, "--save", tmp_path / "run", "--text", text, "--max-minutes", "0.000001")
    first, second = out.splitlines()
    assert code == 0 and first.startswith("routers: 1 of 8 steps in ")
    assert second == f"stopped (time), saved; go on with: hat train --resume {tmp_path / 'run'}"


def command(args, out):
    """`hat` in a separate process."""
    sys.stdout = sys.stderr = open(out, "w")  # noqa: SIM115
    sys.argv = ["hat", *args]
    main()


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code, words",
    [
        (signal.SIGINT, 130, "stopped (interrupt), saved; go on with"),
        (signal.SIGTERM, 143, "terminated; what was trained is saved; go on with"),
    ],
)
def test_a_signal_to_a_process(hat, text, tmp_path, number, code, words):
    folder, out = tmp_path / "run", tmp_path / "out.txt"
    args = ("train", *TINY, "--text", text, "--set", "router_epochs=1000", "--save", folder)
    process = tiny_runs.start(command, [str(a) for a in args], out)
    deadline = time.monotonic() + 60
    while not ((folder / "log.csv").exists() and len((folder / "log.csv").read_text().splitlines()) > 3):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    for again in ("--resume", folder), ("--save", folder, "--text", text):
        assert hat("train", *again)[0] == 2  # a second run in the folder of the first
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    assert out.read_text().splitlines()[-1] == f"{words}: hat train --resume {folder}"
    last = (folder / "log.csv").read_text().splitlines()[-1].split(",")[1]
    assert (folder / "work" / "routers" / f"checkpoint-{last}").exists()


def test_ctrl_c_while_it_calibrates_also_says_how_to_go_on(hat, text, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "calibrate_learned", interrupt)
    options = ("--set", "router_epochs=0.1", "--save", tmp_path / "run", "--text", text)
    code, _, err = hat("train", *TINY, *options)
    assert code == 130
    assert (
        err.splitlines()[-1]
        == f"interrupted; what was trained is saved; go on with: hat train --resume {tmp_path / 'run'}"
    )
