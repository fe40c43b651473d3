"""`hat train`, what a person types: how it starts, how it ends, and every wrong input in one line."""

import json
import os
import re
import signal
import sys
import time

import pytest
import tiny_runs
from tiny_runs import page, tiny_run

from hat_lib.cli.app import app, main
from hat_lib.training import run as module
from hat_lib.training.run import train

TINY = ("--base", "random:tiny", "--profile", "quick", "--dtype", "fp32", "--granularity", "token",
        "--set", "tokens=1024", "--set", "block_size=64", "--set", "batch_size=2", "--set", "save_steps=3")  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return page(tmp_path_factory.mktemp("text"))


@pytest.fixture
def hat(capsys, monkeypatch):
    """Run a command in this process: ``(exit code, stdout, stderr)``."""

    def run(*args):
        args = [str(a) for a in args]
        monkeypatch.setattr(sys, "argv", ["hat", *args])
        with pytest.raises(SystemExit) as stopped:
            app(args, prog_name="hat")
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


@pytest.fixture
def refuses(hat, monkeypatch, tmp_path):
    """`hat train` fails before any base is loaded, with one ``error:`` line that has all the words; writes nothing."""
    monkeypatch.setattr(module, "load_base", lambda *args, **options: pytest.fail("a base was loaded"))

    def run(*args):
        *options, words = args
        before = sorted(tmp_path.rglob("*"))
        code, out, err = hat("train", *options)
        assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
        assert words in err
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.mark.slow
def test_a_run_from_nothing_to_a_model_that_generates(hat, text, tmp_path, monkeypatch):
    folder = tmp_path / "my run"
    code, out, err = hat("train", *TINY, "--save", folder, "--text", text, "--set", "router_epochs=2")
    assert code == 0 and out.splitlines()[-1] == f"wrote {folder}" and "{'" not in out + err, err
    assert re.match(r"routers: 16 of 16 steps in \d+\.\d minutes\nexit: 8 of 8 steps in \d+\.\d minutes\n", out)
    assert "routers: 100%" in err and "exit: 100%" in err  # progress bars
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
    """`hat` in a process of its own."""
    sys.stdout = sys.stderr = open(out, "w")  # noqa: SIM115
    sys.argv = ["hat", *args]
    main()


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
        assert hat("train", *again)[0] == 2  # a second one in the folder of the first
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


# Wrong input


def test_where_to(refuses, tmp_path, text):
    either = "pass either --save DIR for a new run or --resume DIR for one that was stopped"
    refuses(either)
    refuses("--save", tmp_path / "a", "--resume", tmp_path / "b", either)
    refuses("--resume", tmp_path / "gone", f"nothing to resume in {tmp_path / 'gone'}: run.json is missing")
    (tmp_path / "run.json").write_text("{}")
    refuses("--save", tmp_path, "--text", text, "already holds a run or a checkpoint: resume it, or choose another")
    (tmp_path / "file").touch()
    refuses("--save", tmp_path / "file", "is not a folder")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--phase", "gates"), "phase must be one of routers, exit, full, got 'gates'"),
        (("--profile", "fast"), "profile must be one of quick, full, got 'fast'"),
        (("--granularity", "block"), "granularity must be one of channel, token, got 'block'"),
        (("--dtype", "int8"), "dtype must be one of "),
        (("--text", "poems"), "unknown corpus 'poems'"),
        (("--text", "self+self"), "distinct sources joined by +, got 'self+self'"),
        (("--text", "docstrings"), "it is never trained or calibrated on"),
        (("--text", "gone.txt"), "gone.txt: no such file"),
        (("--max-minutes", "0"), "max minutes must be above 0, got 0.0"),
        (("--max-minutes", "nan"), "max minutes must be above 0, got nan"),
        (("--set", "speed=3"), "a recipe has no 'speed'; it has text, tokens, "),
        (("--set", "router_lr"), "--set takes NAME=VALUE, got 'router_lr'"),
        (("--set", "router_lr=fast"), "router_lr must be a number of at least 0, got 'fast'"),
        (("--set", "tokens=1e5"), "tokens must be a whole number of at least 2, got 100000.0"),
        (("--set", "router_epochs=0"), "router_epochs must be a number above 0, got 0"),
        (("--set", "capacity=0"), "capacity must be a number in [0.1, 1.0], got 0"),
        (("--text", "", "--set", "text=5"), "text must be sources joined by +, got 5"),
        (("--set", "seed=5000000000"), "seed must be below 2**32"),
        (("--phase", "exit"), "phase exit needs trained routers: pass --checkpoint DIR of a run with --phase routers"),
        (("--checkpoint", "gone"), "no checkpoint folder at gone"),
    ],
)
def test_wrong_values(refuses, tmp_path, text, options, words):
    refuses("--save", tmp_path / "run", *(() if "--text" in options else ("--text", text)), *options, words)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda run: "not JSON", "Expecting value"),
        (lambda run: json.dumps(run)[:200], "run.json is not what `hat train` wrote"),
        (lambda run: "[]", "run.json is not what `hat train` wrote"),
        (lambda run: json.dumps({k: v for k, v in run.items() if k != "dtype"}), "missing or unknown fields ['dtype']"),
        (lambda run: json.dumps(run | {"phase": 3}), "phase must be one of"),
        (lambda run: json.dumps(run | {"recipe": run["recipe"] | {"tokens": "many"}}), "tokens must be a whole number"),
        (lambda run: json.dumps(run | {"recipe": run["recipe"] | {"speed": 1}}), "speed"),
        (lambda run: json.dumps(run | {"max_steps": "few"}), "max_steps must be"),
        (lambda run: json.dumps(run | {"translator_rank": "2"}), "translator_rank must be"),
        (lambda run: json.dumps(run | {"base": None}), "base must be str, got None"),
    ],
)
def test_a_damaged_run_file(refuses, tmp_path, text, change, words):
    tiny_run("token", text).write(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(change(json.loads(path.read_text())))
    refuses("--resume", tmp_path, words)


def test_a_base_of_another_kind(hat, text, tmp_path):
    train(tiny_run("token", text, phase="routers", steps=1), tmp_path / "run", progress=False)
    options = ("--checkpoint", tmp_path / "run", "--save", tmp_path / "new", "--text", text)
    code, out, err = hat("train", *TINY, "--base", "random:huge", *options)
    assert code == 2 and out == "" and "error: unknown base 'random:huge'" in err
