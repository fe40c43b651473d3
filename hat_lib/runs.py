"""The command that trains: ``hat train``."""

from __future__ import annotations

import os
import shlex
import sys

import typer

from . import arguments as take
from .config import HatConfig, HatError
from .console import app


@app.command()
def train(
    phase: take.Phase = "full",
    save: take.RunFolder = None,
    resume: take.Resume = None,
    base: take.TrainedBase = "bundled",
    text: take.TrainingText = "",
    granularity: take.TrainedGrain = HatConfig.granularity,
    profile: take.Profile = "full",
    checkpoint: take.Start = None,
    max_minutes: take.MaxMinutes = None,
    dtype: take.TrainDtype = "bf16",
    settings: take.Settings = None,
) -> None:
    """Train routers and exit gates; the base stays frozen.

    Ctrl-C finishes the step, saves, and says how to go on. Under `torchrun --nproc_per_node=N -m hat_lib train ...` the
    same command trains on N processes.
    """
    from .recipe import Recipe

    if (save is None) == (resume is None):
        raise HatError("pass either --save DIR for a new run or --resume DIR for one that was stopped")
    if max_minutes is not None and not max_minutes > 0:
        raise HatError(f"max minutes must be above 0, got {max_minutes}")
    folder = (save or resume).expanduser()
    take.check_writable(folder)
    if resume is None:
        of_grain = Recipe.published if granularity == "token" else Recipe.default
        recipe = of_grain(profile, **take.recipe_changes(settings) | ({"text": text} if text else {}))

    from .train import RUN_FILE, Run
    from .train import train as carry_out
    from .training_text import SELF, sources

    if resume is not None:
        run = Run.read(folder)
    else:
        start = None if checkpoint is None else str(checkpoint)
        run = Run(phase, granularity, base, recipe, dtype, start, command=shlex.join(["hat", *sys.argv[1:]]))
    for source in set(sources(run.recipe.text)) - {SELF}:
        for split in ("train", "validation"):
            take.check_text(source, split)
    go_on = f"go on with: hat train --resume {shlex.quote(str(folder))}"
    main = not int(os.environ.get("RANK", 0))
    try:
        outcomes = carry_out(run, folder, resume=resume is not None, max_minutes=max_minutes)
    except KeyboardInterrupt:
        if not main or not (folder / RUN_FILE).exists():
            raise
        typer.echo(f"\ninterrupted; {go_on}", err=True)
        raise typer.Exit(130) from None
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
