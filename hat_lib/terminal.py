"""What reaches the terminal from a command: bad input as one line on stderr, and nothing that a terminal would obey."""

import errno
import sys
import warnings
from collections.abc import Callable

import typer
from typer.core import TyperCommand, TyperGroup

from hat_lib.config import HatError
from hat_lib.text.plain import printable


def say(kind: str, message: object) -> None:
    """One line on stderr, without active control characters."""
    typer.echo(f"{kind}: {printable(str(message).replace(chr(10), ' '))}", err=True)


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


class Commands(Friendly, TyperGroup):
    """A program of several, such as ``hat``."""


def run(command: Callable) -> None:
    """Run a function as a `Command`, whose options are the function's parameters."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command)(command)
    app()
