"""The Typer app, and the one place where bad input becomes a line on stderr."""

from __future__ import annotations

import warnings

import typer
from typer.core import TyperGroup

from hat_lib.config import HatError

# \b keeps the lines of a paragraph as they are.
EXAMPLE = """\b
A worked example, from nothing to a measured price of less compute:

\b
  hat setup                                        fetch base and texts, once
  hat generate --prompt "The state of our union"   at the default capacity
  hat generate --prompt "The state of our union" --capacity 1.0
                                                   everything runs: the base
  hat evaluate --text docstrings --capacity 0.6    what does it cost?
  hat calibrate --save mine                        your own thresholds
  hat evaluate --checkpoint mine --capacity 0.6
  hat train --profile quick --save trained         routers, then exit gates
"""


class OneLineErrors(TyperGroup):
    """The one place where bad input becomes a line on stderr, and Ctrl-C exit code 130."""

    def invoke(self, ctx):
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: say("warning", message)
                return super().invoke(ctx)
        except HatError as error:
            say("error", error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None


def say(kind: str, message: object) -> None:
    typer.echo(f"{kind}: {str(message).replace(chr(10), ' ')}", err=True)


app = typer.Typer(
    cls=OneLineErrors,
    help="Hierarchical Adaptive Transformer: per-token compute for a frozen Llama.",
    epilog=EXAMPLE,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text reads the same in a terminal, a notebook and a log
)
