"""Who carries out the runs of a batch: processes on this machine, or a cluster (docs/scale-out.md).

`Local` is joblib with its loky processes. `Dask` is Dask's own client, since joblib's Dask backend waits for ever for a
task that Dask gives up because its workers die (joblib 1.6). An engine is any function from tasks to their `carry_out`,
so Slurm (``slurm`` is submitit's ``AutoExecutor``, ``as_completed`` from ``submitit.helpers``) is

    batch(..., lambda tasks: (job.result() for job in as_completed(slurm.map_array(carry_out, tasks))), threads=4)
"""

from __future__ import annotations

import gc
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import replace

from joblib import Parallel, cpu_count, delayed

from hat_lib.config import HatError
from hat_lib.workbook.batch import BatchRow, Task, carry_out

CONNECT_SECONDS = 10


class Local:
    """``jobs`` processes of loky, through joblib; one job runs in this process."""

    def __init__(self, jobs: int):
        self.jobs, self.threads = jobs, max(1, cpu_count() // jobs)  # each run an equal share of the cores

    def __call__(self, tasks: list[Task]) -> Iterator[BatchRow]:
        """When a worker dies, loky ends all: the runs it broke off are started again, and alone the second time."""
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
                if len(begun) > 1:  # one was killed, the others went with it: nobody's attempt
                    left |= {task.run: replace(task, first=task.last + 1) for task in begun}
                alone = [left.pop(task.run) for task in begun if task.run in broken_off]
                broken_off |= {task.run for task in begun}
                groups = [*([list(left.values())] if left else []), *([task] for task in alone), *groups]


class Dask:
    """Workers of a Dask scheduler; a context manager. Their number decides how many runs go at once.

    Raises `HatError` if no scheduler answers at ``address`` (tcp://host:port), and unless every worker can import this
    package and has one thread: a run changes environment and working folder of its process.
    """

    def __init__(self, address: str):
        self._client = _connect(address)
        try:
            for worker, threads in self._client.nthreads().items():
                if threads != 1:
                    raise HatError(f"worker {worker} has {threads} threads: start workers with --nthreads 1")
            try:
                workers = self._client.run(_host_and_cores).values()
            except Exception as error:  # whatever an import can raise there
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
        """Dask itself starts the runs of a dead worker again, and whoever gets one counts its attempts."""
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
    gc.collect()  # ends the client that failed; collected while another one starts, it would lock that up for ever
    raise HatError(f"no Dask scheduler answers at {address}: {why}")


def _host_and_cores() -> tuple[str, int]:
    return socket.gethostname(), cpu_count()
