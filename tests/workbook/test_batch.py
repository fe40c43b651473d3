"""Nothing in a batch is lost when workers die or calls are interrupted, and a wrong grid starts nothing."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import nbformat
import pytest
from notebook_files import notebook

from hat_lib.config import HatError
from hat_lib.rows import read_rows
from hat_lib.workbook import batch
from hat_lib.workbook.batch import BatchRow, carry_out, dask, latest_rows, local, parse_grid

PARAMETERS = 'capacity: float = 0.75\nseed: int = 0\nname = "x"\nrates = [0.1]'


@pytest.fixture
def source(tmp_path):
    return notebook(tmp_path / "a notebook.ipynb", parameters=PARAMETERS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_parse_grid(source):
    grid = parse_grid(source, ["capacity=1,0.4", "seed=0", "seed=1", "rates=[0.1, 0.2],[]", "name=2024"])
    assert len(grid) == 8 and grid[-1] == {"capacity": 0.4, "seed": 1, "rates": [], "name": "2024"}
    assert {type(point["capacity"]) for point in grid} == {float}


@pytest.mark.parametrize(
    "options",
    ["capcity=0.4", "capacity", "seed=0,1.5", "seed=", "capacity=0.4,0.40", "seed=0 --grid seed=0"]
    + ["seed=0 --engine ray", "seed=0 --engine dask", "seed=0 --jobs 0"],
)
def test_wrong_options_start_nothing(source, out, options, run_hat):
    code, _, err = run_hat("batch", source, "--out", out, "--grid", *options.split())
    assert code == 2 and "rror: " in err and not out.exists()


def stand_in(source, output, figures, parameters, cell_timeout, threads):
    """Instead of a kernel: the parameter ``name`` says what happens."""
    shutil.copy(source, output)
    first = not figures.with_suffix(".tried").exists()
    figures.parent.mkdir(exist_ok=True)
    figures.with_suffix(".tried").touch()
    fails = parameters["name"] == "fails" or (parameters["name"] == "fails_once" and first)
    return "it failed" if fails else ""


@pytest.fixture
def call(source, out, monkeypatch):
    """One call of `batch.batch`, carried out in this process; returns status and attempts by name."""
    monkeypatch.setattr(batch, "run_notebook", stand_in)

    def rows(*names, engine=lambda tasks: map(carry_out, tasks), **settings):
        found = list(batch.batch(source, [{"name": name} for name in names], out, engine, **settings))
        return {json.loads(row.parameters)["name"]: (row.status, row.attempts) for row in found}

    return rows


def test_batch_repeats_what_failed_and_resumes_what_is_missing(call, out):
    assert call("a", "fails_once", "fails") == {"a": ("ok", 1), "fails_once": ("ok", 2), "fails": ("failed", 2)}
    assert {path.name for path in out.glob("*.*")} == {"name=a.ipynb", "name=fails_once.ipynb", "runs.csv"}
    assert latest_rows(out)["name=fails"].error == "it failed" and (out / "unfinished/name=fails.ipynb").exists()
    (out / "name=a.ipynb").unlink()
    again = call("a", "fails_once", "fails", "b", retries=0)
    assert again == {"a": ("ok", 2), "fails": ("failed", 3), "b": ("ok", 1)}
    assert len(read_rows(out / "runs.csv", BatchRow)) == 6


def test_a_folder_serves_one_notebook_as_it_is(call, out, source):
    call("a")
    nb = nbformat.read(source, as_version=4)
    nb.cells[0].outputs = [nbformat.v4.new_output("stream", text="an output is no code")]
    nbformat.write(nb, source)
    assert call("a") == {}
    notebook(source, "capacity = 1.0", parameters=PARAMETERS)
    with pytest.raises(HatError):
        call("b")
    (out / "runs.csv").unlink()
    with pytest.raises(HatError, match="not empty"):
        call("a")


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(source, out, monkeypatch, run_hat):
    def interrupted(tasks, jobs):
        yield carry_out(tasks[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "run_notebook", stand_in)
    monkeypatch.setattr(batch, "local", interrupted)
    code, _, err = run_hat("batch", source, "--grid", "name=a,b", "--out", out)
    assert code == 130 and "the same command does the others" in err and list(latest_rows(out)) == ["name=a"]


def deadly(task):
    """Instead of `carry_out`: the parameter ``name`` says what happens to the worker."""
    name, tried = task.parameters["name"], task.out / "tried"
    if name == "kills" or (name == "kills_once" and not tried.exists()):
        tried.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "raises":
        raise OSError("no host")
    time.sleep(0.3)
    return replace(task.row, status="ok")


@pytest.mark.slow
def test_local_workers_may_die(call, monkeypatch):
    """A run whose worker was killed is repeated; one that always kills its worker takes no other with it."""
    monkeypatch.setattr(batch, "carry_out", deadly)
    found = call("a", "kills_once", "kills", engine=lambda tasks: local(tasks, 2))
    assert found == {"a": ("ok", 1), "kills_once": ("ok", 1), "kills": ("failed", 1)}


@pytest.mark.slow
def test_dask_workers_may_die(call, tmp_path, monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setattr(batch, "carry_out", deadly)
    settings = {"threads_per_worker": 1, "dashboard_address": ":0", "local_directory": str(tmp_path)}
    with LocalCluster(n_workers=2, **settings) as cluster:
        found = call("a", "kills_once", "raises", engine=lambda tasks: dask(tasks, cluster.scheduler_address))
    assert found == {"a": ("ok", 1), "kills_once": ("ok", 1), "raises": ("failed", 1)}


@pytest.mark.slow
def test_command(tmp_path, out, run_hat):
    """A run has its executed notebook and one row; the same command again runs nothing."""
    records = "import os\nfrom hat_lib.workbook.session import record\nrecord(square=0, deep={'a': [1]})"
    again = "record(square=seed**2, threads=os.environ['OMP_NUM_THREADS'])"
    path = notebook(tmp_path / "a.ipynb", records, again, parameters=PARAMETERS)
    command = ("batch", path, "--grid", "seed=0,3", "--out", out, "--threads", 5, "--jobs", 1)
    assert run_hat(*command)[0] == 0
    rows = read_rows(out / "runs.csv", BatchRow)
    assert run_hat(*command)[0] == 0 and read_rows(out / "runs.csv", BatchRow) == rows
    assert [(row.run, row.status, row.error) for row in rows] == [("seed=0", "ok", ""), ("seed=3", "ok", "")]
    assert json.loads(rows[1].results) == {"square": 9, "deep": {"a": [1]}, "threads": "5"}
    executed = nbformat.read(out / "seed=3.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells)
