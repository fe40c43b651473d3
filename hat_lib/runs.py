"""The command that trains: ``hat train``."""

from __future__ import annotations

import os
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
    from .recipe import PROFILES, Recipe

    if (save is None) == (resume is None):
        raise HatError("pass either --save DIR for a new run or --resume DIR for one that was stopped")
    if max_minutes is not None and not max_minutes > 0:
        raise HatError(f"max minutes must be above 0, got {max_minutes}")
    if profile not in PROFILES:
        raise HatError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    folder = save or resume
    take.check_writable(folder)

    from .train import Run
    from .train import train as carry_out

    if resume is not None:
        run = Run.read(resume)
    else:
        recipe = Recipe.published if granularity == "token" else Recipe.default
        changes = take.recipe_changes(settings) | ({"text": text} if text else {})
        run = Run(
            phase, granularity, base, recipe(profile, **changes), dtype,
            None if checkpoint is None else str(checkpoint), command=" ".join(["hat", *sys.argv[1:]]),
        )  # fmt: skip
    outcomes = carry_out(run, folder, resume=resume is not None, max_minutes=max_minutes)
    if int(os.environ.get("RANK", 0)):
        return
    for outcome in outcomes:
        speed = f"{outcome.seconds / 60:.1f} minutes"
        typer.echo(f"{outcome.phase}: {outcome.step} of {outcome.steps} steps in {speed}")
    if outcomes and not outcomes[-1].done:
        typer.echo(f"stopped ({outcomes[-1].stopped}), saved; go on with: hat train --resume {folder}")
        raise typer.Exit(130 if outcomes[-1].stopped == "interrupt" else 0)
    typer.echo(f"wrote {folder}")
