"""``hat batch``: one notebook over a grid of parameters."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import typer

from hat_lib.cli.options import option
from hat_lib.config import NOTEBOOKS, HatError
from hat_lib.workbook import missing


def batch(
    notebook: str = typer.Argument(..., help="A path, or a number or name in notebooks/."),
    grid: list[str] = option(
        ...,
        "Values of a parameter; repeated, every combination runs: --grid capacity=0.4,0.7 --grid seed=0,1,2.",
        metavar="NAME=VALUE,...",
    ),
    out: Path = option(..., "New folder, or that of the same notebook's batch to go on with."),
    engine: Literal["local", "dask"] = option("local", "Processes on this machine, or the workers of --scheduler."),
    scheduler: str | None = option(None, "Address of a Dask scheduler.", metavar="tcp://HOST:PORT"),
    jobs: int | None = option(None, "Runs at once, each with a model; 1 suits a GPU. [default: one a core]", min=1),
    threads: int | None = option(
        None, "Threads that each run computes with. [default: cores / runs at once; with Dask, the worker's]", min=1
    ),
    retries: int = option(1, "Further attempts for a run that failed.", min=0),
    cell_timeout: int = option(600, "Seconds that one cell may take.", min=1),
) -> None:
    """Run one notebook over a grid of parameters.

    In parallel, with one executed notebook and one row of DIR/runs.csv for each run. If stopped and started again, it
    runs what is missing or failed. Exits with 1 if a run failed.
    """
    if (engine == "dask") != (scheduler is not None):
        raise HatError("--engine dask and --scheduler tcp://HOST:PORT go together")

    try:
        from hat_lib.workbook.batch import batch as carry_out
        from hat_lib.workbook.batch import dask, local, parse_grid, table
        from hat_lib.workbook.notebooks import select
    except ImportError as error:
        raise missing(error) from error

    path, out = select([notebook], NOTEBOOKS)[0], out.expanduser()
    points = parse_grid(path, grid)
    workers = partial(dask, address=scheduler) if scheduler else partial(local, jobs=jobs)
    settings = {"threads": threads, "retries": retries, "cell_timeout": cell_timeout}
    try:
        for row in carry_out(path, points, out, workers, **settings):
            typer.echo(f"{row.run}: {row.status} after {row.seconds:.1f} s" + (f"\n  {row.error}" if row.error else ""))
    except KeyboardInterrupt:
        again = shlex.join(["hat", *sys.argv[1:]])
        typer.echo(f"\ninterrupted; finished runs stay, and the same command does the others: {again}", err=True)
        raise typer.Exit(130) from None
    done = table(out, points)
    typer.echo("\n" + done.to_string(index=False))
    typer.echo(f"wrote {out}")
    if (done["status"] != "ok").any():
        raise typer.Exit(1)
