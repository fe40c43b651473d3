"""``hat calibrate`` and ``hat train``, which make checkpoints; training that was stopped resumes where it was."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path

import typer

from hat_lib.cli import options
from hat_lib.cli.options import option
from hat_lib.config import HatConfig, HatError, check_capacity

BASE = option("bundled", f"The frozen base: {options.BASE_HELP}.")
GRANULARITY = option(
    HatConfig.granularity,
    "What a router decides about, per token: channel (an input channel of a linear layer) or token (the whole FFN; the "
    "published method).",
)
TERMINATED = "terminated"


def calibrate(
    save: Path = option(..., "Folder to write the checkpoint to; an older one in it is replaced."),
    base: str = BASE,
    text: str = option("bundled", f"Measure on its train and validation splits: {options.TEXT_HELP}."),
    granularity: str = GRANULARITY,
    tokens: int = option(12_000, "Tokens of text to take scores from; more is steadier and slower.", min=256),
    probe_tokens: int = option(4096, "Tokens to measure each layer's effect on the output with.", min=16),
    dtype: str = option(
        "fp32", f"Of the passes: {options.DTYPES_HELP}. The thresholds serve every dtype.", check=options.check_dtype
    ),
    capacity: str | None = option(
        None,
        f"By default: {options.CAPACITY_HELP}. [default: 0.75 for channel, 0.55 for token]",
        check=check_capacity,
        metavar="SHARE",
    ),
    threads: int | None = options.THREADS,
) -> None:
    """Measure thresholds on held-out text, write a checkpoint.

    One checkpoint serves every capacity. Nothing is trained. With the bundled base this takes minutes on a CPU, and it
    says how many when it begins.
    """
    changes = {} if capacity is None else {"capacity": capacity}
    options.check_writable(save)
    options.start(threads)
    options.check_grains("granularity", [granularity])
    options.check_text(text, "validation")

    from hat_lib.base.load import load_base
    from hat_lib.calibration.capacity import calibrate as measure
    from hat_lib.calibration.quantiles import LEAST_TOKENS
    from hat_lib.hat import HierarchicalTransformer
    from hat_lib.method.grain import GRAINS
    from hat_lib.text.blocks import held_out, load_text, text_hash

    loaded = load_base(base, dtype=dtype)
    rows = load_text(text, loaded.tokenizer, split="validation", max_tokens=2 * LEAST_TOKENS)
    if (held := sum(map(len, rows["input_ids"]))) < LEAST_TOKENS:
        options.say(
            "warning",
            f"{text} is too short for `hat train`, which needs {LEAST_TOKENS} tokens in the validation split (5 % of a "
            f"file), got {held}",
        )
    blocks = held_out(text, loaded.tokenizer, tokens)
    hat = HierarchicalTransformer(loaded, GRAINS[granularity].config(loaded, **changes))
    found = sum(map(len, blocks["input_ids"]))
    source = f"{text}, train and validation splits, {found} tokens, SHA-256 {text_hash(blocks)[:16]}"
    calibration = measure(hat, blocks["input_ids"], probe_tokens=probe_tokens, text=source)
    hat.save_pretrained(save)

    least, default = calibration.capacities[0], hat.config.capacity
    typer.echo(f"calibrated on {source}\nwrote {save}, for capacities from {least:.3f} to 1, by default {default}")


def train(
    phase: str = option("full", "routers, exit (gates alone; --checkpoint has trained routers), or full: both."),
    save: Path | None = option(None, "Folder of a new run: checkpoint, log.csv and run.json."),
    resume: Path | None = option(None, "Folder of a run that was stopped: go on with it, as it was asked for."),
    base: str = BASE,
    text: str = option(
        "",
        "Sources joined by +: self and openings (text that the base writes itself) and train splits of addresses, "
        "files or Hub datasets. [default: addresses+openings for channel, addresses+self for token; quick: addresses]",
    ),
    granularity: str = GRANULARITY,
    recipe: str = option("default", "default (what worked best for the grain) or published (token grain alone)."),
    profile: str = option("full", "quick (a few minutes on two cores) or full."),
    checkpoint: Path | None = option(None, "Start from its calibration (channel grain), or routers (phase exit)."),
    correction_rank: int | None = option(None, "Rank of the corrections; 0: constant vectors. [default: none]"),
    max_minutes: float | None = option(
        None,
        "Take no more steps once the command has run for so many minutes, saved; --resume goes on. Before the first "
        "step come the base's own text and a calibration, after the last another; these are not cut short.",
    ),
    dtype: str = option(
        "bf16",
        f"Of the frozen base: {options.DTYPES_HELP}. What is trained is fp32 in any case.",
        check=options.check_dtype,
    ),
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

    changes = dict(_setting(assignment) for assignment in settings or []) | ({"text": text} if text else {})
    chosen = Recipe.named(recipe, granularity, profile, **changes)
    folder = (save or resume).expanduser()
    options.check_writable(folder)
    options.start(threads)

    from hat_lib.text.mixture import OWN, sources
    from hat_lib.training.run import RUN_FILE, Run
    from hat_lib.training.run import train as carry_out

    if resume is not None:
        run = Run.read(folder)
    else:
        start, command = checkpoint and str(checkpoint), shlex.join(["hat", *sys.argv[1:]])
        run = Run(phase, granularity, base, chosen, dtype, start, correction_rank=correction_rank, command=command)
    texts = [(source, split) for source in {*sources(run.recipe.text)} - {*OWN} for split in ("train", "validation")]
    if run.recipe.validation:
        texts.append((run.recipe.validation, "validation"))
    for source, split in texts:
        options.check_text(source, split)
    go_on = f"go on with: hat train --resume {shlex.quote(str(folder))}"
    main = not int(os.environ.get("RANK", 0))
    if main:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        outcomes = carry_out(run, folder, resume=resume is not None, max_minutes=max_minutes)
    except KeyboardInterrupt as stop:
        how, code = (TERMINATED, 143) if str(stop) == TERMINATED else ("interrupted", 130)
        if main and (folder / RUN_FILE).exists():
            typer.echo(f"\n{how}; what was trained is saved; {go_on}", err=True)
        raise typer.Exit(code) from None
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
    raise KeyboardInterrupt(TERMINATED)


def _setting(text: str) -> tuple[str, int | float | str]:
    """``"router_lr=1e-3"`` as ``("router_lr", 0.001)``; the recipe checks names and ranges."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise HatError(f"--set takes NAME=VALUE, got {text!r}")
    for kind in (int, float):
        with suppress(ValueError):
            return name, kind(value)
    return name, value
