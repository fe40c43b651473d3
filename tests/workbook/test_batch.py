"""Nothing in a batch is lost when workers die mid-run or calls are interrupted, and bad input starts nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest.mock import Mock, patch

import nbformat
import pytest
from notebook_files import notebook
from typer.testing import CliRunner

from hat_lib.cli.app import app
from hat_lib.config import NOTEBOOKS, REPO, HatError
from hat_lib.rows import read_rows
from hat_lib.workbook import batch
from hat_lib.workbook.batch import Dask, Local, Task, carry_out, find_notebook, latest_rows, parse_grid, run_name
from hat_lib.workbook.notebooks import Result

PARAMETERS = 'capacity: float = 0.75\nexit_rate = 0.0\nseed: int = 0\nname = "x"\nrates = [0.1]\nwhen = None'

# Kills its worker, the kernel's parent process, the first time it runs with seed 1.
KILLS = """
import os, signal, time
from pathlib import Path
killed = Path({killed!r})
if seed == 1 and not killed.exists():
    killed.write_text(str(os.getppid()))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
"""
RECORDS = "from hat_lib.workbook.session import record\n"
RECORDS += "record(square=seed**2, threads=os.environ['OMP_NUM_THREADS'])"


def hat(*arguments):
    return CliRunner().invoke(app, ["batch", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def source(tmp_path):
    return notebook(tmp_path / "a notebook.ipynb", parameters=PARAMETERS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# --- the grid ---


def test_a_grid_is_every_combination_in_the_notebooks_types(source):
    grid = parse_grid(source, ["capacity=1,0.4", "seed=0,1", "rates=[0.1, 0.2],[]", "name=2024"])
    assert grid == [
        {"capacity": capacity, "seed": seed, "rates": rates, "name": "2024"}
        for capacity in (1.0, 0.4)
        for seed in (0, 1)
        for rates in ([0.1, 0.2], [])
    ]
    assert {type(point["capacity"]) for point in grid} == {float}


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (["capcity=0.4"], "has no parameter 'capcity'; it has: capacity, exit_rate, seed"),
        (["capacity"], "--grid takes NAME=VALUE,VALUE,..., got 'capacity'"),
        (["=0.4"], "--grid takes NAME=VALUE"),
        (["capacity=0.4,1.4"], r"capacity must be a number in \[0.1, 1.0\], got 1.4"),
        (["capacity=.nan"], "capacity must be a number in"),
        (["exit_rate=0,-0.1"], r"exit rate must be a number in \[0.0, 1.0\], got -0.1"),
        (["seed=0,1.5"], "parameter 'seed' must be of type int"),
        (["seed="], "--grid seed= has an empty value"),
        (["name=a,,b"], "--grid name=a,,b has an empty value"),
        (["capacity=0.4,0.40"], "--grid capacity=0.4,0.40 has 0.4 twice"),
        (["seed=0", "seed=1"], "--grid seed is given twice"),
        (["when=2026-01-01"], "parameter 'when' must be JSON"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_starts(source, out, grid, told):
    with pytest.raises(HatError, match=told):
        parse_grid(source, grid)
    done = hat(source, *(word for axis in grid for word in ("--grid", axis)), "--out", out)
    assert done.exit_code == 2 and done.output.startswith("error: ") and not out.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": 1, "nbformat": 4, "nbformat_minor": 5}', "\0\xff"])
def test_a_file_that_is_no_notebook_is_refused(tmp_path, text):
    path = tmp_path / "a.ipynb"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(HatError, match="cannot be read as a notebook"):
        parse_grid(path, ["seed=0"])


def test_a_notebook_is_a_path_or_what_it_is_called(source):
    assert find_notebook(str(source)) == source
    assert find_notebook("00") == find_notebook("00_setup") == NOTEBOOKS / "00_setup.ipynb"
    with pytest.raises(HatError, match="no notebook elsewhere/00_setup.ipynb"):
        find_notebook("elsewhere/00_setup.ipynb")


def test_names_of_runs_are_distinct_file_names():
    assert run_name({"seed": 0, "capacity": 0.4}) == run_name({"capacity": 0.4, "seed": 0}) == "capacity=0.4_seed=0"
    odd = [{"a": "../x"}, {"a": "..-x"}, {"a": "1_b=2"}, {"a": "1", "b": "2"}, {"a": "é"}, {"a": "x" * 999}, {"a": []}]
    names = [run_name(parameters) for parameters in odd]
    assert len({name.casefold() for name in names}) == len(odd)
    assert all("/" not in name and name.isascii() and len(name) < 140 for name in names)


# --- what is run, and what is not run again; no kernel and no pool ---


def stand_in(source, output, figures, parameters, cell_timeout, threads):
    """Instead of a kernel: the parameter ``name`` says what happens."""
    attempt, name = int(output.stem), parameters["name"]
    slow = output.parent.parent / "name=slow" / output.name
    while name == "kills beside slow" and attempt <= 2 and not slow.exists():
        time.sleep(0.01)
    if name.startswith("kills"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "slow" and attempt <= 2:
        time.sleep(60)
    figures.mkdir(parents=True)
    (figures / f"{attempt}.png").touch()
    shutil.copy(source, output)
    fails = name == "fails" or (name == "fails_once" and attempt == 1)
    return Result(source.stem, 0.1, figures, "it failed" if fails else "")


def without_kernel(task):
    with patch.object(batch, "run_notebook", stand_in):  # and no longer: loky's workers live on into the next test
        return carry_out(task)


@pytest.fixture
def call(source, out, monkeypatch):
    """One call of `batch.batch`, carried out in this process."""
    monkeypatch.setattr(batch, "run_notebook", stand_in)

    def rows(*names, engine=lambda tasks: map(carry_out, tasks), notebook=source, **settings):
        grid = [{"name": name} for name in names]
        return list(batch.batch(notebook, grid, out, engine, **{"threads": 1, **settings}))

    return rows


def outcome(rows):
    return {json.loads(row.parameters)["name"]: (row.status, row.attempts) for row in rows}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_failed_runs_are_tried_again_and_only_what_is_missing_is_resumed(call, out):
    assert outcome(call("a", "fails_once", "fails")) == {
        "a": ("ok", 1),
        "fails_once": ("ok", 2),
        "fails": ("failed", 2),
    }
    assert files(out) == [
        "figures/name=a/1.png",
        "figures/name=fails/2.png",
        "figures/name=fails_once/2.png",
        "name=a.ipynb",
        "name=fails_once.ipynb",
        "runs.csv",
        "unfinished/name=fails/1.ipynb",
        "unfinished/name=fails/2.ipynb",
        "unfinished/name=fails_once/1.ipynb",
    ]
    failed = latest_rows(out)["name=fails"]
    assert (failed.error, failed.output, failed.results) == ("it failed", "unfinished/name=fails/2.ipynb", "{}")

    (out / "name=a.ipynb").unlink()
    shutil.rmtree(out / "unfinished")  # attempt numbers continue all the same
    again = call("a", "fails_once", "fails", "b", retries=0)
    assert outcome(again) == {"a": ("ok", 2), "fails": ("failed", 3), "b": ("ok", 1)}
    assert len(read_rows(out / "runs.csv", batch.BatchRow)) == 6 and (out / "name=a.ipynb").exists()


def test_an_attempt_that_was_broken_off_does_not_count_in_the_next_call(call, out):
    def killed(tasks):
        for task in tasks:
            task.attempts.mkdir()
            (task.attempts / "1.ipynb").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call("fails", engine=killed)
    assert outcome(call("fails", retries=0)) == {"fails": ("failed", 2)}


def test_a_folder_serves_one_notebook_as_it_is(call, out, source, tmp_path):
    call("a")
    assert files(out) == ["figures/name=a/1.png", "name=a.ipynb", "runs.csv"] and not (out / "unfinished").exists()
    before = (out / "runs.csv").read_bytes()
    other = shutil.copy(source, tmp_path / "other.ipynb")
    with pytest.raises(HatError, match="holds runs of a notebook.ipynb, not of other.ipynb"):
        call("b", notebook=Path(other))
    nb = nbformat.read(source, as_version=4)
    nb.cells[0].outputs = [nbformat.v4.new_output("stream", text="an output is no code")]
    nbformat.write(nb, source)
    assert call("a") == []
    notebook(source, "capacity = 1.0", parameters=PARAMETERS)
    with pytest.raises(HatError, match="holds runs of a notebook.ipynb, as it was before it changed"):
        call("b")
    assert (out / "runs.csv").read_bytes() == before


def test_a_notebook_that_changes_in_mid_batch_ends_it(call, source, out):
    def edited(tasks):
        yield carry_out(tasks[0])
        notebook(source, "new = 1", parameters=PARAMETERS)
        yield carry_out(tasks[1])

    with pytest.raises(HatError, match="changed while its batch was running"):
        call("a", "b", engine=edited)
    assert list(latest_rows(out)) == ["name=a"]


def test_what_cannot_be_written_in_mid_batch_ends_it(call, out, source):
    def vanished(tasks):
        shutil.rmtree(out)
        yield carry_out(tasks[0])

    with pytest.raises(HatError, match="cannot write .*unfinished.*: No such file or directory"):
        call("a", engine=vanished)
    list(batch.batch(source, [{"seed": 0}], out, lambda tasks: [], threads=1))
    (out / "unfinished").touch()
    with pytest.raises(HatError, match="cannot write .*unfinished: File exists"):
        call("a")


def test_an_attempt_that_was_begun_and_never_ended_counts(call, out):
    def begun(tasks):
        tasks[0].attempts.mkdir()
        (tasks[0].attempts / "1.ipynb").touch()
        yield carry_out(tasks[0])

    (row,) = call("a", engine=begun, retries=0)
    assert (row.status, row.error) == ("failed", "its worker was killed")


def test_a_failed_run_is_the_exit_code_of_the_command(source, out, monkeypatch):
    monkeypatch.setattr(batch, "run_notebook", stand_in)
    monkeypatch.setattr(batch, "Local", type("Here", (Local,), {"__call__": lambda self, tasks: map(carry_out, tasks)}))
    done = hat(source, "--grid", "name=a,fails", "--out", out, "--retries", 0)
    assert done.exit_code == 1 and "it failed" in done.output and f"wrote {out}" in done.output


def test_results_too_large_for_a_row_fail_the_run(call, monkeypatch):
    monkeypatch.setattr(batch, "results", lambda path: {"all": "x" * 200_000})
    (row,) = call("a", retries=0)
    assert row.status == "failed" and row.error == "it recorded 200011 characters, at most 100000 go into a row"


def test_a_folder_that_cannot_be_written_is_refused(source, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    before = files(tmp_path)
    for folder, told in {"file/out": "cannot write", "file": "cannot write", "full": "not empty and holds no"}.items():
        done = hat(source, "--grid", "seed=0", "--out", tmp_path / folder)
        assert done.exit_code == 2 and done.output.count("error: ") == 1 and told in done.output
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine", "ray"], "engine must be local or dask, got 'ray'"),
        (["--engine", "dask"], "--engine dask and --scheduler tcp://HOST:PORT go together"),
        (["--scheduler", "tcp://h:1"], "--engine dask and --scheduler tcp://HOST:PORT go together"),
        (["--engine", "dask", "--scheduler", "tcp://h:1", "--jobs", "2"], "--jobs is for the local engine"),
        (["--engine", "dask", "--scheduler", "h"], "no Dask scheduler answers at h"),
        (["--jobs", "0"], "jobs must be a whole number of at least 1, got 0"),
        (["--threads", "0"], "threads must be"),
        (["--retries", "-1"], "retries must be"),
        (["--cell-timeout", "0"], "cell timeout must be"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(source, out, options, told):
    done = hat(source, "--grid", "seed=0", "--out", out, *options)
    assert done.exit_code == 2 and told in done.output and not out.exists()


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(source, out, monkeypatch):
    class Interrupted(Local):
        def __call__(self, tasks):
            yield carry_out(tasks[0])
            raise KeyboardInterrupt

    monkeypatch.setattr(batch, "run_notebook", stand_in)
    monkeypatch.setattr(batch, "Local", Interrupted)
    done = hat(source, "--grid", "name=a,b", "--out", out)
    assert done.exit_code == 130 and "finished runs stay, and the same command does the others: hat" in done.output
    assert list(latest_rows(out)) == ["name=a"]


# --- real workers ---


@pytest.mark.slow
def test_a_run_that_always_kills_its_worker_takes_no_other_with_it(call, monkeypatch):
    monkeypatch.setattr(batch, "carry_out", without_kernel)
    rows = call("kills beside slow", "slow", "a", engine=Local(2), retries=0)
    # Both were interrupted twice, which counts as nobody's attempt; then each ran alone.
    assert outcome(rows) == {"a": ("ok", 1), "slow": ("ok", 3), "kills beside slow": ("failed", 3)}
    assert [row.error for row in rows if row.status == "failed"] == ["its worker was killed"]


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """Address of a real Dask scheduler with two real single-threaded worker processes."""
    folder = tmp_path_factory.mktemp("dask")
    found = folder / "scheduler.json"
    shared = ["--no-dashboard", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(found)]
    commands = (
        ["scheduler", *shared, "--host", "127.0.0.1", "--port", "0"],
        ["worker", *shared, "--nworkers", "2", "--nthreads", "1", "--local-directory", str(folder)],
    )
    # Workers import this file.
    paths = (Path(__file__).parent, REPO / "tests", REPO)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    quiet = {"env": environment, "stderr": subprocess.DEVNULL, "start_new_session": True}
    processes = [subprocess.Popen([sys.executable, "-m", "dask", *command], **quiet) for command in commands]
    try:
        while not found.exists():
            assert processes[0].poll() is None
            time.sleep(0.05)
        from distributed import Client

        address = json.loads(found.read_text())["address"]
        with Client(address) as client:
            client.wait_for_workers(2, timeout=120)
        yield address
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "dask"])
def test_a_killed_worker_loses_nothing(tmp_path, out, engine, request):
    """Each run has its notebook and one row, and the one that killed its worker was repeated by another worker."""
    options = ("--jobs", 2)
    if engine == "dask":
        options = ("--engine", "dask", "--scheduler", request.getfixturevalue("scheduler"))
    killed = tmp_path / "killed"
    path = notebook(tmp_path / "a.ipynb", KILLS.format(killed=str(killed)), RECORDS, parameters=PARAMETERS)
    arguments = (path, "--grid", "seed=0,1", "--out", out, "--threads", 3, *options)
    done = hat(*arguments)
    assert done.exit_code == 0
    written = read_rows(out / "runs.csv", batch.BatchRow)
    rows = {row.run: row for row in written}
    assert len(written) == len(rows) == 2
    for seed in range(2):
        row = rows[f"seed={seed}"]
        assert (row.status, row.error, json.loads(row.parameters)) == ("ok", "", {"seed": seed})
        assert json.loads(row.results) == {"square": seed**2, "threads": "3"} and row.threads == 3
        executed = nbformat.read(out / f"seed={seed}.ipynb", as_version=4)
        assert all(cell.execution_count for cell in executed.cells)
    assert rows["seed=1"].attempts == 2 and (out / "unfinished/seed=1/1.ipynb").exists()
    assert killed.read_text() not in {row.worker.split(":")[1] for row in rows.values()}
    lines = done.output.split("\n\n")[-1].splitlines()
    assert lines[0].split() == ["run", "status", "attempts", "seconds"]
    assert [line.split()[1:3] for line in lines[1:-1] if line.startswith("seed=1 ")] == [["ok", "2"]]
    before = (out / "runs.csv").read_bytes()
    assert hat(*arguments).exit_code == 0 and (out / "runs.csv").read_bytes() == before


@pytest.mark.slow
def test_what_dask_gives_up_is_handed_in_again_until_its_attempts_are_used_up(call, scheduler, monkeypatch):
    monkeypatch.setattr(batch, "carry_out", without_kernel)
    with Dask(scheduler) as engine:
        engine._client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
        (row,) = call("kills", engine=engine, retries=0)
    assert (row.status, row.attempts, row.error) == ("failed", 1, "its worker was killed")


def test_without_the_package_dask_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(HatError, match=r"Dask needs the package distributed: pip install 'hat-workbook\[cluster\]'"):
        Dask("tcp://127.0.0.1:9")


def test_a_worker_that_cannot_import_is_told_and_the_client_closed(monkeypatch):
    client = Mock()
    client.nthreads.return_value = {"a worker": 1}
    client.run.side_effect = ModuleNotFoundError("No module named 'hat_lib'")
    monkeypatch.setattr(batch, "_connect", lambda address: client)
    with pytest.raises(HatError, match="a worker of tcp://h:1 cannot use hat_lib: No module named 'hat_lib'"):
        Dask("tcp://h:1")
    client.close.assert_called_once()


@pytest.mark.parametrize(("error", "told"), [(HatError("full disk"), "^full disk"), (OSError("no host"), "no host")])
def test_an_error_of_a_worker_ends_the_batch(source, out, error, told, monkeypatch):
    from distributed import LocalCluster

    def fails(task):
        raise error

    monkeypatch.setattr(batch, "carry_out", fails)
    quiet = {"dashboard_address": ":0", "processes": False, "threads_per_worker": 1}
    task = Task("seed=0", source, "", out, {}, 1, 1, 60)
    with (
        LocalCluster(n_workers=1, **quiet) as cluster,
        Dask(cluster.scheduler_address) as engine,
        pytest.raises(HatError, match=told),
    ):
        list(engine([task]))


def test_workers_that_die_before_they_begin_end_the_batch(monkeypatch, source, out):
    def broken(*_, **__):
        def pool(calls):
            raise BrokenProcessPool("a worker was terminated")

        return pool

    monkeypatch.setattr(batch, "Parallel", broken)
    with pytest.raises(HatError, match="workers die before they begin a run: a worker was terminated"):
        list(Local(2)([Task("seed=0", source, "", out, {}, 1, 1, 60)]))


@pytest.mark.slow
def test_dask_workers_must_suit(monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setattr(batch, "CONNECT_SECONDS", 0.5)
    quiet = {"dashboard_address": ":0", "processes": False, "threads_per_worker": 2}
    for count, told in ((0, "has no workers"), (1, "has 2 threads: start workers with --nthreads 1")):
        with LocalCluster(n_workers=count, **quiet) as cluster, pytest.raises(HatError, match=told):
            Dask(cluster.scheduler_address)
    with pytest.raises(HatError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        Dask("tcp://127.0.0.1:9")
