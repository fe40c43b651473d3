"""``hat train``: routers, then exit gates; what was stopped goes on where it stopped."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from hat_lib.cli import options as take
from hat_lib.cli import validation as given
from hat_lib.cli.options import option
from hat_lib.config import HatConfig, HatError


def train(
    phase: Annotated[
        str,
        option("routers, exit (gates alone; needs --checkpoint with trained routers), or full: one after the other."),
    ] = "full",
    save: Annotated[
        Path | None, option("Folder of a new run: checkpoint, log.csv and run.json.", "--save", metavar="DIR")
    ] = None,
    resume: Annotated[
        Path | None,
        option("Folder of a run that was stopped: go on where it stopped, as it was asked for.", metavar="DIR"),
    ] = None,
    base: take.BundledBase = "bundled",
    text: Annotated[
        str,
        option(
            "Sources joined by +: self (text that the base writes itself) and train splits of addresses, a .txt, "
            ".jsonl or .parquet file or a Hub dataset. [default: addresses+self; quick: addresses]"
        ),
    ] = "",
    granularity: take.Granularity = HatConfig.granularity,
    recipe: Annotated[
        str, option("Hyperparameters: default (what worked best for the grain) or published (token grain alone).")
    ] = "default",
    profile: Annotated[str, option("quick (a few minutes on two cores) or full.")] = "full",
    checkpoint: Annotated[
        Path | None,
        option(
            "Checkpoint to start from, instead of nothing: its calibration (channel grain), or its routers (phase "
            "exit)."
        ),
    ] = None,
    max_minutes: Annotated[
        float | None,
        option("Stop after this many minutes, saved; --resume goes on. [default: no limit]", metavar="M"),
    ] = None,
    dtype: Annotated[
        str, option(f"Of the frozen base: {take.DTYPES_HELP}. What is trained is fp32 in any case.")
    ] = "bf16",
    settings: Annotated[
        list[str] | None,
        option(
            "Change one hyperparameter; may be repeated: --set router_lr=1e-3 --set tokens=50000.",
            "--set",
            metavar="NAME=VALUE",
        ),
    ] = None,
) -> None:
    """Train routers and exit gates; the base stays frozen.

    Ctrl-C and SIGTERM finish the step, save, and say how to go on. Under `torchrun --nproc_per_node=N -m hat_lib train
    ...` the same command trains on N processes.
    """
    from hat_lib.training.recipe import Recipe

    if (save is None) == (resume is None):
        raise HatError("pass either --save DIR for a new run or --resume DIR for one that was stopped")
    if resume is not None and (settings or text or checkpoint):
        raise HatError("--resume goes on as the run was asked for: leave out --set, --text and --checkpoint")
    if max_minutes is not None and not max_minutes > 0:
        raise HatError(f"max minutes must be above 0, got {max_minutes}")
    folder = (save or resume).expanduser()
    given.check_writable(folder)
    if resume is None:
        changes = _recipe_changes(settings) | ({"text": text} if text else {})
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


def _recipe_changes(settings: list[str] | None) -> dict:
    """``["router_lr=1e-3"]`` as ``{"router_lr": 0.001}``; the recipe checks names and ranges."""
    out = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise HatError(f"--set takes NAME=VALUE, got {setting!r}")
        for kind in (int, float, str):
            try:
                out[name] = kind(value)
                break
            except ValueError:
                continue
    return out
