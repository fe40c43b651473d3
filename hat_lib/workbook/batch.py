"""One notebook over a grid of parameters::

    grid = parse_grid(notebook, ["capacity=0.4,0.7", "seed=0,1"])
    for row in batch(notebook, grid, out, lambda tasks: local(tasks, jobs=2), threads=1):
        print(row.run, row.status)

Each run leaves ``out/<run>.ipynb``, its figures in ``out/figures/<run>/`` and a row in ``out/runs.csv``; the notebook
of a failed run stays in ``out/unfinished/``. Repeating the call skips each run that has its notebook and the status ok.

An engine is any function from tasks to the rows of `carry_out`. `local` is joblib's; `dask` is Dask's own client,
because joblib's Dask backend waits forever for a task that Dask gives up (joblib 1.6).
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hat_lib.config import HatError
from hat_lib.rows import RowWriter, read_rows
from hat_lib.workbook.notebooks import code, parse_parameters, results, run_notebook

ROWS, UNFINISHED = "runs.csv", "unfinished"


@dataclass(frozen=True)
class BatchRow:
    """How one run went; a line of ``runs.csv``, whose key is (run, attempts)."""

    run: str
    status: str  #: ok or failed
    seconds: float  #: of the last attempt
    attempts: int  #: so far, including those of earlier calls
    parameters: str  #: JSON object: what the grid set
    results: str  #: JSON object: what the notebook recorded
    error: str
    notebook: str
    code: str  #: hash of the notebook's code cells


@dataclass(frozen=True)
class Task:
    """One run, as passed to a worker."""

    row: BatchRow  #: as it is if the worker dies
    notebook: Path
    out: Path
    parameters: dict
    threads: int | None
    retries: int
    cell_timeout: int


def parse_grid(notebook: Path, axes: Sequence[str]) -> list[dict]:
    """``["capacity=0.4,0.7", "seed=0,1"]`` as the parameters of every run, the last name varying fastest.

    Raises `HatError` for a name missing from the notebook's ``parameters`` cell, and a wrong or repeated value.
    """
    grid: dict[str, list] = {}
    for axis in axes:
        name, _, text = axis.partition("=")
        for part in re.split(r",(?![^\[\]]*\])", text):  # the commas of a list [a,b] stay
            values = parse_parameters([f"{name}={part.strip()}"], [notebook])
            grid.setdefault(name, []).append(values[name])
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(set(map(run_name, points))) < len(points):
        raise HatError(f"--grid has a value twice: {', '.join(axes)}")
    return points


def run_name(parameters: dict) -> str:
    """A file name for a run: ``capacity=0.4_seed=0``, sorted by name, with a hash if that is not a valid file name."""
    plain = "_".join(f"{name}={value}" for name, value in sorted(parameters.items()))
    safe = re.sub(r"[^\w.+=-]+", "-", plain, flags=re.ASCII)[:120]
    return plain if safe == plain else f"{safe}-{_hash(plain)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def batch(
    notebook: Path,
    grid: Iterable[dict],
    out: Path,
    engine: Callable[[list[Task]], Iterable[BatchRow]],
    *,
    threads: int | None = None,
    retries: int = 1,
    cell_timeout: int = 600,
) -> Iterator[BatchRow]:
    """Carry out the runs of a grid that ``out`` lacks; yields a row for each as it ends, once it is in the file.

    A run that failed gets ``retries`` further attempts, a cell ``cell_timeout`` seconds; ``threads`` None leaves their
    number to the worker's environment. Raises `HatError` for a folder that holds something else.
    """
    notebook, out = Path(notebook).resolve(), Path(out).expanduser().resolve()
    source = notebook.name, _hash(code(notebook))
    if out.is_dir() and not (out / ROWS).exists() and any(out.iterdir()):
        raise HatError(f"{out} is not empty and holds no {ROWS}: choose a new folder")
    with RowWriter(out / ROWS, BatchRow, key=("run", "attempts")) as rows:
        before = {row.run: row for row in rows.done.values()}
        if any((row.notebook, row.code) != source for row in before.values()):
            raise HatError(f"{out} holds runs of another notebook, or of {notebook.name} before it changed")
        tasks = []
        for parameters in grid:
            run, as_json = run_name(parameters), json.dumps(parameters, sort_keys=True)
            row = BatchRow(run, "failed", 0.0, 0, as_json, "{}", "its worker died", *source)
            last = before.get(run, row)
            if last.status == "failed" or not (out / f"{run}.ipynb").is_file():
                row = replace(row, attempts=last.attempts + 1)
                tasks.append(Task(row, notebook, out, parameters, threads, retries, cell_timeout))
        for row in engine(tasks):
            rows.write(row)
            yield row
    with suppress(OSError):  # it may not be there, or hold what failed
        (out / UNFINISHED).rmdir()


def latest_rows(out: Path) -> dict[str, BatchRow]:
    """The last row of each run, by its name."""
    return {row.run: row for row in read_rows(out / ROWS, BatchRow)}


def carry_out(task: Task) -> BatchRow:
    """A run, in a worker: attempt after attempt until one passes or ``retries`` are used up."""
    run, first = task.row.run, task.row.attempts
    output, figures = task.out / UNFINISHED / f"{run}.ipynb", task.out / "figures" / run
    output.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(first, first + task.retries + 1):
        start = time.monotonic()
        shutil.rmtree(figures, ignore_errors=True)
        error = run_notebook(task.notebook, output, figures, task.parameters, task.cell_timeout, threads=task.threads)
        row = replace(task.row, seconds=round(time.monotonic() - start, 2), attempts=attempt, error=error)
        if not error:
            os.replace(output, task.out / output.name)
            return replace(row, status="ok", results=json.dumps(results(task.out / output.name)))
    return row


def local(tasks: list[Task], jobs: int | None = None) -> Iterator[BatchRow]:
    """``jobs`` processes of joblib, by default one a core; a single job runs in this process. By default, all runs at
    once share the cores. When a worker dies, joblib ends them all: what is left is tried again, each in its own pool.
    """
    from joblib import Parallel, cpu_count, delayed

    jobs = jobs or max(1, min(len(tasks), cpu_count()))
    tasks = [replace(task, threads=task.threads or max(1, cpu_count() // jobs)) for task in tasks]
    left = {task.row.run: task for task in tasks}
    with suppress(BrokenExecutor):
        for row in Parallel(jobs, return_as="generator_unordered", batch_size=1)(map(delayed(carry_out), tasks)):
            del left[row.run]
            yield row
    for task in left.values():
        row = task.row
        with suppress(BrokenExecutor):
            (row,) = Parallel(2)([delayed(carry_out)(task)])
        yield row


def dask(tasks: list[Task], address: str) -> Iterator[BatchRow]:
    """The workers of a Dask scheduler at tcp://host:port, which itself restarts the runs of a worker that died."""
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise HatError("Dask needs the package distributed: pip install 'hat-workbook[cluster]'") from error
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise HatError(f"no Dask scheduler answers at {address}: {error}") from error
    with client:
        task_of = {client.submit(carry_out, task, pure=False): task for task in tasks}
        for future, result in as_completed(task_of, with_results=True, raise_errors=False):
            yield result if future.status == "finished" else replace(task_of[future].row, error=str(future.exception()))
