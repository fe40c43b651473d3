"""Jobs killed again and again: by ``kill -9`` when they touch a file or at any moment, or in the middle of a write.

Whatever a killed job leaves can be read, and once the job survives, it leaves what an undisturbed one leaves.
"""

from __future__ import annotations

import csv
import random
import resource
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from notebook_files import notebook
from tiny_runs import kill_at, page, skipping, start, tiny_run

from hat_lib.checkpoint import ADAPTER_FILE, CONFIG_FILE, read_checkpoint, write_checkpoint
from hat_lib.rows import RowWriter, read_rows
from hat_lib.training.run import train
from hat_lib.workbook import batch


def training(folder: Path, given: Path) -> None:
    run = tiny_run("token", given / "page.txt", steps=3, save_steps=1)
    train(run, folder, resume=(folder / "run.json").exists(), progress=False)


def saving(folder: Path, given: Path) -> None:
    """Twelve states one after the other, each in both the weights and the JSON."""
    old = read_checkpoint(given / "checkpoint")
    for number in range(12):
        tensors = {name: torch.full_like(t, number) for name, t in old.tensors.items()}
        write_checkpoint(folder, replace(old, tensors=tensors, training={"state": number}))


@dataclass(frozen=True)
class Point:
    capacity: float


def writing_rows(folder: Path, given: Path) -> None:
    with RowWriter(folder / "rows.csv", Point, ("capacity",)) as rows:
        for number in range(200):
            if (number / 1000,) not in rows.done:
                rows.write(Point(number / 1000))


def batching(folder: Path, given: Path) -> None:
    """Runs of a notebook; instead of running in a kernel, its file is copied."""

    def copy(source, output, figures, parameters, cell_timeout, threads):
        shutil.copy(source, output)
        return ""

    batch.run_notebook = copy
    grid = [{"steps": n} for n in range(6)]
    list(batch.batch(given / "a.ipynb", grid, folder, lambda tasks: map(batch.carry_out, tasks), retries=0))


JOBS = {job.__name__: job for job in (training, saving, writing_rows, batching)}
TOUCHES = {"training": 60, "saving": 90, "writing_rows": 3, "batching": 40}
"""about how often a job touches files"""


def check_readable(folder: Path) -> None:
    if (folder / CONFIG_FILE).exists():
        found = read_checkpoint(folder)
        if number := (found.training or {}).get("state"):
            assert all((t == number).all() for t in found.tensors.values()), "weights of one state, JSON of another"
    if (folder / "rows.csv").exists():
        read_rows(folder / "rows.csv", Point)


def contents(folder: Path) -> dict:
    """What a job leaves behind, without times and attempt numbers."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith(batch.UNFINISHED):  # from killed attempts
            continue
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            kept = ("phase", "step", "loss", "run", "status", "capacity")
            found[name] = sorted([row[k] for k in kept if k in row] for row in rows)
        elif path.name == CONFIG_FILE:
            checkpoint = read_checkpoint(folder)  # a kill at the end leaves its weights under another name
            found[name] = checkpoint.calibration, {n: t.tolist() for n, t in checkpoint.tensors.items()}
        elif path.is_file() and path.suffix != ".json" and not name.startswith(ADAPTER_FILE):
            found[name] = path.read_bytes()
    return found


def run_and_die(job: str, folder: Path, given: Path, touch: int | None, size: int | None) -> None:
    kill_at(folder, touch)
    if size is not None:  # the system kills it at the first byte too many
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    JOBS[job](folder, given)


def run(job: str, kills: int, folder: Path) -> None:
    """Kill a job ``kills`` times, and let it run to its end whenever it survives."""
    points, target, given = random.Random(job), folder / job, folder / f"{job} given"
    given.mkdir()
    page(given)
    notebook(given / "a.ipynb")
    skipping("channel").save_pretrained(given / "checkpoint")

    def to_its_end():
        process = start(run_and_die, job, target, given, None, None)
        process.join()
        assert process.exitcode == 0, f"{job} fails by itself"
        found = contents(target)
        shutil.rmtree(target)
        target.mkdir()
        return found

    target.mkdir()
    begun = time.monotonic()
    expected = to_its_end()
    seconds, killed = time.monotonic() - begun, 0
    while killed < kills:
        how, touch, size = points.choice(["touch", "touch", "time", "byte"]), None, None
        if how == "touch":
            touch = points.randint(1, TOUCHES[job])
        elif how == "byte":
            size = int(10 ** points.uniform(0, 5))
        process = start(run_and_die, job, target, given, touch, size)
        process.join(points.uniform(0, seconds) if how == "time" else 300)
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert to_its_end() == expected, f"after {killed} kills"
            continue
        killed += 1
        assert process.exitcode in (-signal.SIGKILL, -signal.SIGXFSZ), f"kill {killed}: {process.exitcode}"
        check_readable(target)
    assert to_its_end() == expected
