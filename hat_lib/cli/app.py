"""The command line, put together: ``hat setup | generate | evaluate ...``, also ``python -m hat_lib``.

Each command checks what it was given before it loads a model; bad input becomes one line on stderr and exit
code 2. torch is imported inside the commands, so that ``hat --help`` answers at once.
"""

from __future__ import annotations

import os
import sys

from hat_lib.cli.commands.analyze import analyze
from hat_lib.cli.commands.batch import batch
from hat_lib.cli.commands.calibrate import calibrate
from hat_lib.cli.commands.evaluate import evaluate
from hat_lib.cli.commands.generate import generate
from hat_lib.cli.commands.reproduce import reproduce
from hat_lib.cli.commands.setup import setup
from hat_lib.cli.commands.sweep import sweep
from hat_lib.cli.commands.train import train
from hat_lib.cli.console import app

GROUPS = {
    "Use": (setup, generate, evaluate, analyze, calibrate, sweep),
    "Train": (train,),
    "Reproduce": (reproduce, batch),
}
for group, commands in GROUPS.items():
    for command in commands:
        app.command(rich_help_panel=group)(command)


def main() -> None:
    """The entry point of ``hat``."""
    # Read when transformers is first imported; its advice is for people who write code with it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    app(prog_name="hat")


if __name__ == "__main__":
    main()
