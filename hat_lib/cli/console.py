"""What every command shares with the terminal: one line for bad input, whatever the terminal can show; groups of
commands in the help; a realised capacity beside the requested one.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress

import typer
from typer.core import TyperGroup

from hat_lib.config import NO_DATA, HatError, outside_repository
from hat_lib.text.plain import printable

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


class Hat(TyperGroup):
    """The one place where bad input becomes a line on stderr, and Ctrl-C exit code 130."""

    def main(self, *args, **options):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal of ASCII alone shows a question mark for the rest
                stream.reconfigure(errors="replace")
        try:
            return super().main(*args, **options)
        except OSError as error:  # a full disk, a folder where a file should be: the system's words say it
            if error.errno is None:
                raise
            with suppress(OSError):
                say("error", f"{error.filename or 'cannot write the output'}: {error.strerror}")
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:  # what is left would fail once more when Python ends
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            sys.exit(1)

    def invoke(self, ctx):
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: say("warning", message)
                return super().invoke(ctx)
        except HatError as error:
            say("error", f"{error}; {NO_DATA}" if outside_repository(str(error)) else error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None

    def format_commands(self, ctx, formatter):
        """As Typer's, by panel, which Typer itself shows with rich alone."""
        panels: dict[str, list] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            words = command.get_short_help_str(formatter.width - 6 - max(map(len, self.commands)))
            panels.setdefault(command.rich_help_panel, []).append((name, words))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


def say(kind: str, message: object) -> None:
    typer.echo(f"{kind}: {printable(str(message).replace(chr(10), ' '))}", err=True)


WHY = "the thresholds come from other text, and protected tokens run in full"
"""why a realised capacity is not the requested one"""


def realised(requested: float, found: float) -> str:
    """Both capacities, and in a clause why they differ, where they do."""
    why = f" ({WHY})" if abs(found - requested) >= 0.005 else ""
    return f"{requested:.2f} requested, {found:.3f} realised{why}"


app = typer.Typer(
    cls=Hat,
    help="Hierarchical Adaptive Transformer: per-token compute for a frozen Llama.",
    epilog=EXAMPLE,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text reads the same in a terminal, a notebook and a log
)
