"""The commands that take long and go on where they stopped: ``hat train | batch``."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from contextlib import contextmanager, nullcontext

import typer

from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.console import app
from hat_lib.config import HatConfig, HatError


@app.command()
def train(
    phase: take.Phase = "full",
    save: take.RunFolder = None,
    resume: take.Resume = None,
    base: take.TrainedBase = "bundled",
    text: take.TrainingText = "",
    granularity: take.TrainedGrain = HatConfig.granularity,
    recipe: take.RecipeName = "default",
    profile: take.Profile = "full",
    checkpoint: take.Start = None,
    max_minutes: take.MaxMinutes = None,
    dtype: take.TrainDtype = "bf16",
    settings: take.Settings = None,
) -> None:
    """Train routers and exit gates; the base stays frozen.

    Ctrl-C and SIGTERM finish the step, save, and say how to go on. Under `torchrun --nproc_per_node=N -m hat_lib train
    ...` the same command trains on N processes.
    """
    from hat_lib.training.recipe import Recipe

    if (save is None) == (resume is None):
        raise HatError("pass either --save DIR for a new run or --resume DIR for one that was stopped")
    if max_minutes is not None and not max_minutes > 0:
        raise HatError(f"max minutes must be above 0, got {max_minutes}")
    folder = (save or resume).expanduser()
    given.check_writable(folder)
    if resume is None:
        changes = given.recipe_changes(settings) | ({"text": text} if text else {})
        chosen = Recipe.named(recipe, granularity, profile, **changes)

    from hat_lib.text.mixture import SELF, sources
    from hat_lib.training.run import RUN_FILE, Run
    from hat_lib.training.run import train as carry_out

    if resume is not None:
        run = Run.read(folder)
    else:
        start = None if checkpoint is None else str(checkpoint)
        run = Run(phase, granularity, base, chosen, dtype, start, command=shlex.join(["hat", *sys.argv[1:]]))
    for source in set(sources(run.recipe.text)) - {SELF}:
        for split in ("train", "validation"):
            given.check_text(source, split)
    go_on = f"go on with: hat train --resume {shlex.quote(str(folder))}"
    main = not int(os.environ.get("RANK", 0))
    try:
        with _terminates() if main else nullcontext():
            outcomes = carry_out(run, folder, resume=resume is not None, max_minutes=max_minutes)
    except KeyboardInterrupt as stop:
        how, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        if main and (folder / RUN_FILE).exists():
            typer.echo(f"\n{how}; what was trained is saved; {go_on}", err=True)
        raise typer.Exit(code) from None
    if not main:
        return
    if not outcomes:
        typer.echo(f"nothing to do: the run in {folder} is finished")
        return
    for outcome in outcomes:
        typer.echo(f"{outcome.phase}: {outcome.step} of {outcome.steps} steps in {outcome.seconds / 60:.1f} minutes")
    if not outcomes[-1].done:
        typer.echo(f"stopped ({outcomes[-1].stopped}), saved; {go_on}")
        raise typer.Exit(130 if outcomes[-1].stopped == "interrupt" else 0)
    typer.echo(f"wrote {folder}")


class Terminated(KeyboardInterrupt):
    """SIGTERM, where by itself it would end the process without a word."""


@contextmanager
def _terminates():
    def stop(*_):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def batch(
    notebook: take.BatchNotebook,
    grid: take.Grid,
    out: take.BatchOut,
    engine: take.Engine = "local",
    scheduler: take.Scheduler = None,
    jobs: take.Jobs = None,
    threads: take.KernelThreads = None,
    retries: take.Retries = 1,
    cell_timeout: take.CellTimeout = 600,
) -> None:
    """Run one notebook over a grid of parameters.

    In parallel; one executed notebook and one row of DIR/runs.csv for each run. Stopped and started again, it runs what
    is missing or failed. Exits with 1 if a run failed.
    """
    for name, value, low in (("jobs", jobs, 1), ("threads", threads, 1), ("retries", retries, 0)):
        if value is not None:
            given.check_count(name, value, low)
    given.check_count("cell timeout", cell_timeout, 1)
    if engine not in ("local", "dask"):
        raise HatError(f"engine must be local or dask, got {engine!r}")
    if (engine == "dask") != (scheduler is not None):
        raise HatError("--engine dask and --scheduler tcp://HOST:PORT go together")
    if engine == "dask" and jobs is not None:
        raise HatError("--jobs is for the local engine; with Dask, the number of its workers decides")

    from joblib import cpu_count

    from hat_lib.workbook.batch import batch as carry_out
    from hat_lib.workbook.batch import find_notebook, latest_rows, parse_grid, run_name
    from hat_lib.workbook.workers import Dask, Local

    path, out = find_notebook(notebook), out.expanduser()
    points = parse_grid(path, grid)
    runs = [run_name(point) for point in points]
    local = nullcontext(Local(jobs or min(len(runs), cpu_count())))
    try:
        with Dask(scheduler) if engine == "dask" else local as workers:
            settings = {"threads": threads or workers.threads, "retries": retries, "cell_timeout": cell_timeout}
            for row in carry_out(path, points, out, workers, **settings):
                typer.echo(f"{row.run}: {row.status} after {row.seconds:.1f} s")
                if row.error:
                    typer.echo(f"  {row.error}")
    except KeyboardInterrupt:
        again = shlex.join(["hat", *sys.argv[1:]])
        typer.echo(f"\ninterrupted; finished runs stay, and the same command does the others: {again}", err=True)
        raise typer.Exit(130) from None
    rows = latest_rows(out)
    width = max(map(len, ["run", *runs]))
    typer.echo(f"\n{'run':{width}}  status  attempts  seconds")
    for row in map(rows.get, runs):
        typer.echo(f"{row.run:{width}}  {row.status:6}  {row.attempts:8d}  {row.seconds:7.1f}")
    typer.echo(f"wrote {out}")
    if any(rows[run].status != "ok" for run in runs):
        raise typer.Exit(1)
