"""``hat calibrate`` and ``hat train``, which make checkpoints."""

import os
import shlex
import signal
import sys
from pathlib import Path

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option
from hat_lib.config import HatConfig, HatError, check_capacity, check_writable, literal

GRAIN = option(HatConfig.granularity, "channel (linear layers' inputs) or token (the FFN).", check=options.check_grain)


def calibrate(
    save: Path = option(..., "Folder to write the checkpoint to; an older one in it is replaced."),
    base: str = options.BUNDLED,
    text: str = option("bundled", f"Measure on its train and validation splits: {options.TEXTS}."),
    granularity: str = GRAIN,
    tokens: int = option(12_000, "Tokens of text to take scores from; more is steadier and slower.", min=256),
    probe_tokens: int = option(4096, "Tokens to measure each layer's effect on the output with.", min=16),
    dtype: str = options.dtype("fp32", f"Of the passes: {options.DTYPES}. The thresholds serve every dtype."),
    capacity: str | None = options.share(
        f"By default: {options.CAPACITIES}. [default: 0.75 for channel, 0.55 for token]", check=check_capacity
    ),
    threads: int | None = options.THREADS,
) -> None:
    """Measure thresholds on held-out text, write a checkpoint.

    One checkpoint serves every capacity. Nothing is trained. With the bundled base this takes minutes on a CPU, and it
    says how many when it begins.
    """
    check_writable(save)
    options.start(threads)
    from hat_lib.base.load import load_base
    from hat_lib.calibration.capacity import calibrate_on
    from hat_lib.text.blocks import check_text

    check_text(text, "validation")
    changes = {} if capacity is None else {"capacity": capacity}
    loaded = load_base(base, dtype=dtype)
    hat = calibrate_on(text, loaded, granularity, tokens=tokens, probe_tokens=probe_tokens, **changes)
    hat.save_pretrained(save)
    made, default = hat.calibration, hat.config.capacity
    typer.echo(f"calibrated on {made.text}")
    typer.echo(f"wrote {save}, for capacities from {made.capacities[0]:.3f} to 1, by default {default}")


def train(
    phase: str = option("full", "routers, exit (gates alone; --checkpoint has trained routers), or full: both."),
    save: Path | None = option(None, "Folder of a new run: checkpoint, log.csv and run.json."),
    resume: Path | None = option(None, "Folder of a run that was stopped: go on with it, as it was asked for."),
    base: str = options.BUNDLED,
    text: str = option(
        "",
        "Sources joined by +: self and openings (text that the base writes itself) and train splits of addresses, "
        "files or Hub datasets. [default: addresses+openings for channel, addresses+self for token; quick: addresses]",
    ),
    granularity: str = GRAIN,
    recipe: str = option("default", "default (what worked best for the grain) or published (token grain alone)."),
    profile: str = option("full", "quick (a few minutes on two cores) or full."),
    checkpoint: Path | None = option(None, "Start from its calibration (channel grain), or routers (phase exit)."),
    correction_rank: int | None = option(None, "Rank of the corrections; 0: constant vectors. [default: none]"),
    max_minutes: float | None = option(
        None,
        "Take no more steps once the command has run for so many minutes, saved; --resume goes on. Before the first "
        "step come the base's own text and a calibration, after the last another; these are not cut short.",
    ),
    dtype: str = options.dtype("bf16", f"Of the frozen base: {options.DTYPES}. What is trained is fp32 in any case."),
    settings: list[str] | None = option(None, "Change a setting: router_lr=1e-3.", "--set", metavar="NAME=VALUE"),
    threads: int | None = options.THREADS,
) -> None:
    """Train routers and exit gates; the base stays frozen.

    On Ctrl-C or SIGTERM, it finishes the step, saves, and says how to resume. Under `torchrun --nproc_per_node=N -m
    hat_lib train ...` the same command trains on N processes.
    """
    if (save is None) == (resume is None):
        raise HatError("pass either --save DIR for a new run or --resume DIR for one that was stopped")
    if resume is not None and (settings or text or checkpoint):
        raise HatError("--resume goes on as the run was asked for: leave out --set, --text and --checkpoint")
    if max_minutes is not None and not max_minutes > 0:
        raise HatError(f"max minutes must be above 0, got {max_minutes}")
    from hat_lib.training.recipe import Recipe  # without torch

    changes = {"text": text} if text else {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise HatError(f"--set takes NAME=VALUE, got {setting!r}")
        changes[name] = literal(value)
    chosen = Recipe.named(recipe, granularity, profile, **changes)
    folder = (save or resume).expanduser()
    check_writable(folder)
    options.start(threads)
    from hat_lib.text.mixture import check_training_texts
    from hat_lib.training.run import RUN_FILE, Run
    from hat_lib.training.run import train as carry_out

    if resume is not None:
        run = Run.read(folder)
    else:
        start, command = checkpoint and str(checkpoint), shlex.join(["hat", *sys.argv[1:]])
        run = Run(phase, granularity, base, chosen, dtype, start, correction_rank=correction_rank, command=command)
    check_training_texts(run.recipe.text, run.recipe.validation)
    go_on = f"go on with: hat train --resume {shlex.quote(str(folder))}"
    main = not int(os.environ.get("RANK", 0))
    if main:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        outcomes = carry_out(run, folder, resume=resume is not None, max_minutes=max_minutes)
    except KeyboardInterrupt as stop:
        if main and (folder / RUN_FILE).exists():
            typer.echo(f"\n{str(stop) or 'interrupted'}; what was trained is saved; {go_on}", err=True)
        raise typer.Exit(143 if str(stop) else 130) from None
    if not main:
        return
    for outcome in outcomes:
        typer.echo(f"{outcome.phase}: {outcome.step} of {outcome.steps} steps in {outcome.seconds / 60:.1f} minutes")
    if outcomes and not outcomes[-1].done:
        typer.echo(f"stopped ({outcomes[-1].stopped}), saved; {go_on}")
        raise typer.Exit(130 if outcomes[-1].stopped == "interrupt" else 0)
    typer.echo(f"wrote {folder}" if outcomes else f"nothing to do: the run in {folder} is finished")


def _terminate(*_) -> None:
    """SIGTERM by default would end the process without a word."""
    raise KeyboardInterrupt("terminated")
