"""Faults: killed at random points, a full disk, a read-only folder, a damaged cache, Ctrl-C.

A job is killed again and again, by ``kill -9`` when it touches a file or at any moment, or in the middle of a write,
until it has been killed often enough; then it runs to its end, and leaves what an undisturbed one leaves.
"""

from __future__ import annotations

import csv
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from notebook_files import notebook
from PIL import Image
from tiny_runs import adaptive, kill_at, page, random_blocks, skipping, start, tiny, tiny_run, train_and_die
from typer.testing import CliRunner

from hat_lib import sweep
from hat_lib.cli.app import app
from hat_lib.config import HatError
from hat_lib.model.checkpoint import CONFIG_FILE, read_checkpoint, write_checkpoint
from hat_lib.plotting.style import save_figure
from hat_lib.rows import RowWriter, read_rows
from hat_lib.text.mixture import self_text
from hat_lib.training.run import train
from hat_lib.workbook import batch
from hat_lib.workbook.notebooks import Result, run_notebook
from soak import Found

# Killed


def training(folder: Path, text: Path) -> None:
    train_and_die(tiny_run("token", text, steps=6, save_steps=1), folder, None)


def saving(folder: Path, start: Path) -> None:
    """Twelve states one after the other, each recorded in both the weights and the JSON."""
    old = read_checkpoint(start)
    for number in range(12):
        tensors = {name: torch.full_like(t, number) for name, t in old.tensors.items()}
        write_checkpoint(folder, replace(old, tensors=tensors, training={"state": number}))


@dataclass(frozen=True)
class Point:
    capacity: float
    perplexity: float


def sweeping(folder: Path, text: Path) -> None:
    """A row for each capacity missing from the file."""
    hat = skipping("channel")
    with RowWriter(folder / "rows.csv", Point, ("capacity",)) as rows:
        for capacity in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            if (capacity,) not in rows.done:
                found = sweep(hat, random_blocks(2), capacities=[capacity], progress=False)
                rows.write(Point(capacity, float(found.frame["perplexity"][0])))


def batching(folder: Path, source: Path) -> None:
    """Runs of a notebook; instead of running in a kernel, its file is copied."""

    def stand_in(source, output, figures, parameters, cell_timeout, threads):
        figures.mkdir(parents=True)
        (figures / "a.png").touch()
        shutil.copy(source, output)
        return Result(source.stem, 0.1, figures, "")

    batch.run_notebook = stand_in
    grid = [{"steps": n} for n in range(6)]
    list(batch.batch(source, grid, folder, lambda tasks: map(batch.carry_out, tasks), threads=1, retries=3))


def calibrating(folder: Path, _: Path) -> None:
    adaptive("channel").save_pretrained(folder)


def drawing(folder: Path, _: Path) -> None:
    for number in range(6):
        fig = Figure(figsize=(3, 2))
        fig.subplots().plot([0, number, 1])
        save_figure(fig, f"{number % 3}", folder)


def whole(folder: Path) -> None:
    """Raises if anything a killed job left behind is corrupt."""
    if (folder / CONFIG_FILE).exists():
        found = read_checkpoint(folder)
        if number := (found.training or {}).get("state"):
            assert all((t == number).all() for t in found.tensors.values()), "weights of one state, JSON of another"
    for picture in folder.glob("*.png"):
        Image.open(picture).load()
    if (folder / "rows.csv").exists():
        read_rows(folder / "rows.csv", Point)


def left(folder: Path) -> dict:
    """What a job leaves behind, without times and attempt numbers."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith(batch.UNFINISHED):  # from killed attempts
            continue
        if path.suffix == ".csv" and name != "rows.csv":
            rows = list(csv.DictReader(path.open(newline="")))
            kept = ("phase", "step", "loss", "run", "status")
            found[name] = sorted([row[k] for k in kept if k in row] for row in rows)
        elif path.name == CONFIG_FILE:
            found[name] = read_checkpoint(folder).calibration
        elif path.is_file() and path.suffix != ".json":
            found[name] = path.read_bytes()
    return found


JOBS = {job.__name__: job for job in (training, saving, sweeping, batching, calibrating, drawing)}
TOUCHES = {"training": 80, "saving": 90, "sweeping": 3, "batching": 70, "calibrating": 8, "drawing": 12}
"""about how often a job touches files"""


def _dying(job: str, folder: Path, given: Path, event: int | None, size: int | None) -> None:
    kill_at(folder, event)
    if size is not None:  # the system kills it at the first byte too many
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    JOBS[job](folder, given)


def killed(job: str, kills: int, folder: Path) -> Found:
    """A job killed ``kills`` times, and run to its end whenever it survives."""
    found, points, target, seconds = Found(), random.Random(job), folder / "target", time.monotonic()
    given = {"training": page, "batching": lambda f: notebook(f / "a.ipynb")}.get(job, lambda f: f / "start")(folder)
    adaptive("channel").save_pretrained(folder / "start")
    target.mkdir()
    undisturbed = start(_dying, job, target, given, None, None)
    undisturbed.join()
    seconds, expected = time.monotonic() - seconds, left(target)
    assert undisturbed.exitcode == 0 and expected, f"{job} fails by itself"
    shutil.rmtree(target)
    target.mkdir()
    while found.cases < kills and not found.failures:
        how, event, size = points.choice(["touch", "touch", "time", "byte"]), None, None
        if how == "touch":
            event = points.randint(1, TOUCHES[job])
        elif how == "byte":
            size = int(10 ** points.uniform(0, 5))
        process = start(_dying, job, target, given, event, size)
        process.join(points.uniform(0, seconds) if how == "time" else 300)
        process.kill()
        process.join()
        if process.exitcode == 0:
            if left(target) != expected:
                found.fail(f"{job} after {found.cases} kills", ValueError("it ended otherwise"))
            shutil.rmtree(target)
            target.mkdir()
            continue
        with found.case(f"{job}, kill {found.cases} by {how}, {event or size}"):
            assert process.exitcode in (-signal.SIGKILL, -signal.SIGXFSZ), f"it ended with {process.exitcode}"
            whole(target)
    with found.case(f"{job}, to its end"):
        process = start(_dying, job, target, given, None, None)
        process.join()
        assert process.exitcode == 0 and left(target) == expected, "it ended otherwise"
    return found


# Mishaps


def hat(*arguments) -> str:
    """The message of a refused command: one line, and no traceback."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code in (1, 2) and done.output.count("error: ") == 1, (done.exit_code, done.output[-500:])
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    return done.output


@contextmanager
def small_disk(folder: Path, size: str):
    """A separate small disk, if the system allows one; otherwise pytest or the command skips it."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        raise NotImplementedError("no small disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def full_disk(folder: Path, leave: int = 0) -> None:
    """Saving, rows, figures, training and a cache; what was there stays."""
    model, source = adaptive("channel"), notebook(folder / "a.ipynb")
    text = page(folder)
    for room in (0, 4096, 12288, 32768, 40960, 65536):
        with small_disk(folder / f"disk {room}", "256k") as disk:
            model.save_pretrained(disk / "saved")
            with RowWriter(disk / "rows.csv", Point, ("capacity",)) as rows:
                rows.write(Point(0.5, 1.0))
                before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
                free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                (disk / "filler").write_bytes(b"\0" * max(0, free - room))
                attempts = [
                    lambda disk=disk: model.save_pretrained(disk / "saved"),
                    lambda disk=disk: model.save_pretrained(disk / "new"),
                    lambda rows=rows: [rows.write(Point(1 + n / 1000, 1.0)) for n in range(6000)],
                    lambda disk=disk: drawing(disk, disk),
                    lambda disk=disk: train(tiny_run("token", text, steps=4), disk / "run", progress=False),
                    lambda disk=disk: list(batch.batch(source, [{"steps": 1}], disk / "out", _fails, threads=1)),
                ]
                for attempt in attempts:
                    try:
                        attempt()
                    except HatError as error:
                        assert "\n" not in str(error), error
                    for path, data in before.items():
                        assert path.read_bytes()[: len(data)] == data, f"{path} was changed"
                    whole(disk)
            read_rows(disk / "rows.csv", Point)
            read_checkpoint(disk / "saved")


def _fails(tasks):
    yield from map(batch.carry_out, [replace(task, retries=0) for task in tasks])


def closed_folder(folder: Path) -> None:
    """Every command that writes, into a read-only place."""
    with small_disk(folder / "closed", "64k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        source, text = notebook(folder / "a.ipynb"), page(folder)
        tiny_base = ("--base", "random:tiny", "--text", text)
        for command in (
            ("batch", source, "--grid", "steps=1", "--out", disk / "out"),
            ("calibrate", *tiny_base, "--save", disk / "new"),
            ("train", *tiny_base, "--profile", "quick", "--save", disk / "new"),
            ("sweep", "--out", disk / "rows.csv"),
        ):
            assert "Read-only file system" in hat(*command) or "cannot write" in hat(*command)


def two_at_once(folder: Path) -> None:
    """A second writer of a file, a batch or a training run is refused, and the first continues."""
    source, refused = notebook(folder / "a.ipynb"), []

    def second(attempt):
        try:
            attempt()
        except HatError as error:
            refused.append(str(error))

    with RowWriter(folder / "rows.csv", Point, ("capacity",)) as rows:
        second(lambda: RowWriter(folder / "rows.csv", Point, ("capacity",)))
        rows.write(Point(0.5, 1.0))

    def inside(tasks):
        second(lambda: list(batch.batch(source, [{"steps": 2}], folder / "out", _fails, threads=1)))
        return []

    list(batch.batch(source, [{"steps": 1}], folder / "out", inside, threads=1))
    run = tiny_run("token", page(folder), steps=4)
    process = start(train_and_die, run, folder / "run", None)
    while not (folder / "run" / "work" / ".lock").exists():
        assert process.is_alive()
        time.sleep(0.01)
    second(lambda: train(run, folder / "run", progress=False))
    process.join()
    assert process.exitcode == 0 and len(refused) == 3, refused
    read_checkpoint(folder / "run")


def damaged_cache(folder: Path) -> None:
    """Sampled text whose file is missing, truncated or replaced is made again, the same."""
    base, how = tiny(), {"block_size": 16, "batch_size": 2, "progress": False}
    before = os.environ.get("HAT_CACHE")
    os.environ["HAT_CACHE"] = str(folder / "cache")
    try:
        made = self_text(base, 32, **how)["input_ids"]
        (kept,) = (folder / "cache").rglob("*.npz")
        good = kept.read_bytes()
        for size in range(0, len(good), 37):
            kept.write_bytes(good[:size])
            assert self_text(base, 32, **how)["input_ids"] == made
        shutil.rmtree(folder / "cache")
        assert self_text(base, 32, **how)["input_ids"] == made
    finally:
        os.environ.pop("HAT_CACHE") if before is None else os.environ.update(HAT_CACHE=before)


DECODES = "import torch; from tiny_runs import skipping, greedy; hat = skipping('channel'); print(greedy(hat)); "
DECODES += "assert hat.trace.executed is not None"


def damaged_compiled_code(folder: Path) -> None:
    """The engine compiles again, and writes the same text."""
    paths = os.pathsep.join(sys.path)
    env = os.environ | {"HAT_CACHE": str(folder / "cache"), "PYTHONPATH": paths}
    run = partial(subprocess.run, [sys.executable, "-c", DECODES], capture_output=True, text=True, env=env, check=True)
    said = run().stdout
    for path in (folder / "cache" / "compiled").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    assert run().stdout == said


def killed_kernel(folder: Path) -> None:
    """A notebook whose kernel is killed fails, and says so; the next one runs."""
    for number, source in enumerate(["import os; os.kill(os.getpid(), 9)", "1 + 1"]):
        path = notebook(folder / f"{number}.ipynb", source)
        ran = run_notebook(path, folder / f"{number}_out.ipynb", folder / "figures", {}, cell_timeout=60)
        assert bool(ran.error) == (number == 0) and "\n" not in ran.error, ran.error


def killed_worker(folder: Path) -> None:
    """A Dask worker killed in mid-run: another one repeats the run, and each run has one row."""
    from distributed import LocalCluster

    kills = f"import os, pathlib\nfirst = pathlib.Path({str(folder / 'first')!r})\n"
    kills += "if steps == 1 and not first.exists():\n    first.touch()\n    os.kill(os.getppid(), 9)"
    source, grid = notebook(folder / "a.ipynb", kills), [{"steps": 1}, {"steps": 2}]
    workers = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(**workers) as cluster, batch.Dask(cluster.scheduler_address) as engine:
        ended = {row.run: row for row in batch.batch(source, grid, folder / "out", engine, threads=1)}
    rows = read_rows(folder / "out" / batch.ROWS, batch.BatchRow)
    assert {row.run: row for row in rows} == ended and len(rows) == 2
    assert {row.status for row in rows} == {"ok"} and ended["steps=1"].attempts == 2


def ctrl_c(folder: Path, times: int = 40) -> None:
    """Inside and between the engine's steps; the next text is the same as before."""
    model, points = skipping("channel"), random.Random(0)
    ids = torch.tensor(random_blocks(1))

    def text():
        with torch.no_grad():
            return model.lm.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)

    expected, begun = text(), time.monotonic()
    threads = torch.get_num_threads()
    text()
    seconds, stopped = time.monotonic() - begun, 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # like SIGINT
    try:
        for _ in range(times):
            signal.setitimer(signal.ITIMER_REAL, points.uniform(0.0001, seconds))
            try:
                text()
                time.sleep(seconds)
            except KeyboardInterrupt:
                stopped += 1
            assert torch.equal(text(), expected) and torch.get_num_threads() == threads
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert stopped == times, f"{stopped} of {times} arrived"


MISHAPS = {f.__name__: f for f in (full_disk, closed_folder, two_at_once, damaged_cache, damaged_compiled_code,
                                   killed_kernel, killed_worker, ctrl_c)}  # fmt: skip


def mishap(name: str, folder: Path) -> Found:
    found = Found()
    try:
        with found.case(name):
            MISHAPS[name](folder)
    except NotImplementedError as missing:
        found.note = str(missing)
    return found
