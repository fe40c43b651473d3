"""One notebook over a grid of parameters: which runs there are, which are missing, and how each is carried out.

    grid = parse_grid(notebook, ["capacity=0.4,0.7", "seed=0,1"])
    for row in batch(notebook, grid, out, Local(jobs=2), threads=1):
        print(row.run, row.status)

Each run leaves ``out/<run>.ipynb``, its figures in ``out/figures/<run>/`` and a row in ``out/runs.csv`` with what the
notebook recorded. Repeating the same call skips every run that has both its notebook and a row saying "ok".

A run executes in ``out/unfinished/<run>/<attempt>.ipynb``, which is moved into place once it has passed. That file,
made when a worker begins, also counts the attempts that a worker did not live to report.

An engine, which has the runs carried out, is any function from tasks to the results of `carry_out`. `Local` is joblib
with its loky processes. `Dask` is Dask's own client, because joblib's Dask backend waits forever for a task that Dask
gives up when its workers die (joblib 1.6). For Slurm (``slurm`` is submitit's ``AutoExecutor``, ``as_completed`` from
``submitit.helpers``), use

    batch(..., lambda tasks: (job.result() for job in as_completed(slurm.map_array(carry_out, tasks))), threads=4)
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
from joblib import Parallel, cpu_count, delayed

from hat_lib.config import NOTEBOOKS, HatError, check_capacity, check_exit_rate
from hat_lib.rows import RowWriter, read_rows
from hat_lib.workbook.notebooks import one_line, parse_parameters, results, run_notebook, select
from hat_lib.workbook.session import json_text

ROWS, UNFINISHED = "runs.csv", "unfinished"
RANGES = {"capacity": check_capacity, "exit_rate": check_exit_rate}
KILLED = "its worker was killed"
CONNECT_SECONDS = 10
LONGEST_NAME, LONGEST_ERROR, LONGEST_RESULTS = 120, 2000, 100_000  # characters


@dataclass(frozen=True)
class BatchRow:
    """How one run went; a line of ``runs.csv``, whose key is (run, attempts)."""

    run: str
    status: str
    """ok or failed"""
    seconds: float
    """of the last attempt"""
    attempts: int
    """so far, including those of earlier calls and killed ones"""
    parameters: str
    """JSON object: what the grid set"""
    results: str
    """JSON object: what the notebook recorded"""
    error: str
    output: str
    """the executed notebook, relative to the folder of ``runs.csv``"""
    notebook: str
    code: str
    """hash of the notebook's code cells"""
    threads: int
    """available to the kernel"""
    worker: str
    """host:pid"""


@dataclass(frozen=True)
class Task:
    """One run, as passed to a worker. Both paths are absolute."""

    run: str
    notebook: Path
    code: str
    out: Path
    parameters: dict
    threads: int
    retries: int
    cell_timeout: int
    first: int = 1
    """number of the first attempt that counts"""

    @property
    def attempts(self) -> Path:
        """Folder for the notebooks of attempts that did not pass, or have not passed yet."""
        return self.out / UNFINISHED / self.run

    @property
    def last(self) -> int:
        """Number of the last attempt begun; 0 for none."""
        return max((int(path.stem) for path in self.attempts.glob("*.ipynb") if path.stem.isdecimal()), default=0)


def find_notebook(name: str) -> Path:
    """The path of a notebook, given as a path, or as a number or name in notebooks/."""
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    if len(path.parts) > 1:
        raise HatError(f"no notebook {name}: there is no such file")
    return select([name], NOTEBOOKS)[0]


def parse_grid(notebook: Path, axes: Sequence[str]) -> list[dict]:
    """``["capacity=0.4,0.7", "seed=0,1"]`` as the parameters of every run, the last name varying fastest.

    Raises `HatError` for a name missing from the notebook's ``parameters`` cell, and for a value that has the wrong
    type, is out of range, is empty or is given twice.
    """
    code_hash(notebook)  # says what is wrong with a file that is not a notebook
    grid: dict[str, list] = {}
    for axis in axes:
        name, equals, text = axis.partition("=")
        if not equals or not name:
            raise HatError(f"--grid takes NAME=VALUE,VALUE,..., got {axis!r}")
        if name in grid:
            raise HatError(f"--grid {name} is given twice; write all its values in one: {name}=VALUE,VALUE,...")
        grid[name] = []
        for part in re.split(r",(?![^\[\]]*\])", text):  # the commas of a list [a,b] stay
            if not part.strip():
                raise HatError(f"--grid {axis} has an empty value")
            value = parse_parameters([f"{name}={part.strip()}"], [notebook])[name]
            if name in RANGES:
                RANGES[name](value)
            json_text(f"parameter {name!r}", value)
            if value in grid[name]:
                raise HatError(f"--grid {axis} has {value!r} twice")
            grid[name].append(value)
    return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]


def run_name(parameters: dict) -> str:
    """A file name for a run: ``capacity=0.4_seed=0``, sorted by name, with a hash if that is not a valid file name."""
    texts = {name: str(parameters[name]) for name in sorted(parameters)}
    safe = {name: re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII) for name, text in texts.items()}
    plain = "_".join(f"{name}={text}" for name, text in safe.items())
    if safe == texts and len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[:LONGEST_NAME]}-{_hash(json.dumps(parameters, sort_keys=True))[:8]}"


def code_hash(notebook: Path) -> str:
    """Hash of the code cells, without outputs. Raises `HatError` for a file that is not a notebook."""
    try:
        cells = nbformat.read(notebook, as_version=4).cells
        return _hash("\0".join(cell.source for cell in cells if cell.cell_type == "code"))[:16]
    except Exception as error:  # whatever a damaged file raises inside two libraries
        raise HatError(f"{notebook} cannot be read as a notebook: {one_line(error)}") from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def batch(
    notebook: Path,
    grid: Iterable[dict],
    out: Path,
    engine: Callable[[list[Task]], Iterable[BatchRow]],
    *,
    threads: int,
    retries: int = 1,
    cell_timeout: int = 600,
) -> Iterator[BatchRow]:
    """Carry out the runs of a grid that ``out`` lacks; yields a row for each as it ends, once it is in the file.

    Args:
        engine: yields the result of `carry_out` for each task as it ends.
        threads: for each run to compute with.
        retries: further attempts for a run that failed or was killed.
        cell_timeout: seconds one cell may take.

    Raises `HatError`, before anything starts, for a folder that cannot be written or holds something else.
    """
    notebook, out = Path(notebook).resolve(), Path(out).expanduser().resolve()
    path, code = out / ROWS, code_hash(notebook)
    if out.is_dir() and not path.exists() and any(out.iterdir()):
        raise HatError(f"{out} is not empty and holds no {ROWS}: choose a new folder")
    with RowWriter(path, BatchRow, key=("run", "attempts")) as rows:
        before = latest_rows(out)
        for row in before.values():
            if (row.notebook, row.code) != (notebook.name, code):
                changed = "as it was before it changed" if row.notebook == notebook.name else f"not of {notebook.name}"
                raise HatError(f"{path} holds runs of {row.notebook}, {changed}: choose another folder")
        tasks = []
        for parameters in grid:
            run = run_name(parameters)
            task = Task(run, notebook, code, out, parameters, threads, retries, cell_timeout)
            row = before.get(run)
            if row is None or row.status != "ok" or not (out / row.output).is_file():
                tasks.append(replace(task, first=1 + max(task.last, row.attempts if row else 0)))
        try:
            (out / UNFINISHED).mkdir(exist_ok=True)
        except OSError as error:
            raise HatError(f"cannot write {out / UNFINISHED}: {error.strerror or error}") from error
        for row in engine(tasks):
            rows.write(row)
            yield row
        with suppress(OSError):  # it may not be empty
            (out / UNFINISHED).rmdir()


def latest_rows(out: Path) -> dict[str, BatchRow]:
    """Run -> its last row."""
    return {row.run: row for row in read_rows(out / ROWS, BatchRow)}


def carry_out(task: Task) -> BatchRow:
    """A run, in a worker: attempt after attempt until one passes or ``retries`` are used up."""
    final, figures = task.out / f"{task.run}.ipynb", task.out / "figures" / task.run
    seconds, found, error = 0.0, "{}", ""
    try:
        task.attempts.mkdir(exist_ok=True)  # without parents: `out` exists, or is not shared with this worker
        for attempt in range(task.first, task.first + task.retries + 1):
            output = task.attempts / f"{attempt}.ipynb"
            try:
                output.touch(exist_ok=False)
            except FileExistsError:  # begun by a worker that never returned
                error = KILLED
                continue
            if code_hash(task.notebook) != task.code:
                raise HatError(f"{task.notebook} changed while its batch was running: start again with another folder")
            shutil.rmtree(figures, ignore_errors=True)
            ran = run_notebook(task.notebook, output, figures, task.parameters, task.cell_timeout, threads=task.threads)
            seconds, error = ran.seconds, ran.error
            found = "{}" if error else json.dumps(results(output))
            if len(found) > LONGEST_RESULTS:
                error = f"it recorded {len(found)} characters, at most {LONGEST_RESULTS} go into a row"
            if not error:
                os.replace(output, final)
                output = final
                with suppress(OSError):  # it may hold earlier attempts
                    task.attempts.rmdir()
                break
    except OSError as e:
        raise HatError(f"cannot write {e.filename or task.out}: {e.strerror or e}") from e
    return BatchRow(
        run=task.run,
        status="failed" if error else "ok",
        seconds=round(seconds, 2),
        attempts=attempt,
        parameters=json.dumps(task.parameters, sort_keys=True),
        results="{}" if error else found,
        error=error[:LONGEST_ERROR].encode(errors="replace").decode(),
        output=str(output.relative_to(task.out)),
        notebook=task.notebook.name,
        code=task.code,
        threads=task.threads,
        worker=f"{socket.gethostname()}:{os.getpid()}",
    )


class Local:
    """``jobs`` loky processes, through joblib; a single job runs in this process."""

    def __init__(self, jobs: int):
        self.jobs, self.threads = jobs, max(1, cpu_count() // jobs)  # an equal share of the cores for each run

    def __call__(self, tasks: list[Task]) -> Iterator[BatchRow]:
        """When a worker dies, loky ends them all: interrupted runs are started again, the second time on their own."""
        groups, broken_off = [tasks], set()
        while groups:
            group = groups.pop(0)
            left = {task.run: task for task in group}
            pool = Parallel(self.jobs, backend="loky", return_as="generator_unordered", batch_size=1)
            try:
                for row in pool(delayed(carry_out)(task) for task in group):
                    del left[row.run]
                    yield row
            except BrokenExecutor as error:
                begun = [task for task in left.values() if task.last >= task.first]
                if not begun:
                    raise HatError(f"workers die before they begin a run: {error}") from error
                if len(begun) > 1:  # one was killed and took the others with it: this counts as nobody's attempt
                    left |= {task.run: replace(task, first=task.last + 1) for task in begun}
                alone = [left.pop(task.run) for task in begun if task.run in broken_off]
                broken_off |= {task.run for task in begun}
                groups = [*([list(left.values())] if left else []), *([task] for task in alone), *groups]


class Dask:
    """Workers of a Dask scheduler; a context manager. Their number decides how many runs execute at once.

    Raises `HatError` if no scheduler answers at ``address`` (tcp://host:port), and unless every worker can import this
    package and has one thread: a run changes the environment and working folder of its process.
    """

    def __init__(self, address: str):
        self._client = _connect(address)
        try:
            for worker, threads in self._client.nthreads().items():
                if threads != 1:
                    raise HatError(f"worker {worker} has {threads} threads: start workers with --nthreads 1")
            try:
                workers = self._client.run(_host_and_cores).values()
            except Exception as error:  # whatever an import may raise there
                raise HatError(f"a worker of {address} cannot use hat_lib: {error}") from error
            if not workers:
                raise HatError(f"the Dask scheduler at {address} has no workers")
            at_host = Counter(host for host, _ in workers)
            self.threads = min(max(1, cores // at_host[host]) for host, cores in workers)
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> Dask:
        return self

    def __exit__(self, *exception) -> None:
        self._client.close()

    def __call__(self, tasks: list[Task]) -> Iterator[BatchRow]:
        """Dask itself restarts the runs of a dead worker, and the worker that gets one counts its attempts."""
        from distributed import KilledWorker, as_completed

        task_of = {self._client.submit(carry_out, task, pure=False): task for task in tasks}
        running = as_completed(task_of, with_results=True, raise_errors=False)
        for future, result in running:
            if future.status == "finished":
                yield result
                continue
            task, error = task_of[future], result[1] if future.status == "error" else result
            if not isinstance(error, KilledWorker) or task.last < task.first:
                raise error if isinstance(error, HatError) else HatError(f"Dask gave up {task.run}: {error}")
            again = self._client.submit(carry_out, task, pure=False)
            task_of[again] = task
            running.add(again)


def _connect(address: str):
    try:
        from distributed import Client
    except ImportError as error:
        raise HatError("Dask needs the package distributed: pip install 'hat-workbook[cluster]'") from error
    try:
        return Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        why = str(error)
    gc.collect()  # ends the failed client; if collected while another one starts, it would lock that up forever
    raise HatError(f"no Dask scheduler answers at {address}: {why}")


def _host_and_cores() -> tuple[str, int]:
    return socket.gethostname(), cpu_count()
