"""What the commands take: each option with the words that explain it, and the checks that need no model.

Everything here answers before torch is imported or a model is loaded; a wrong value raises `HatError`, which
`hat_lib.cli` tells in one line.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

import typer

from .config import DATA, HatConfig, HatError, check_capacity, check_exit_rate

if TYPE_CHECKING:
    from .model import HierarchicalTransformer

CHECKPOINTS = DATA / "checkpoints"
CALIBRATED = CHECKPOINTS / "calibrated"
"""a reference checkpoint of the bundled base, which comes with the repository"""

BASE_HELP = "bundled, a Hub id (owner/name), a folder with safetensors, a .gguf file, or random:tiny"
TEXT_HELP = "addresses, docstrings, a .txt, .jsonl or .parquet file, or a Hub dataset (owner/name[:config])"
CAPACITY_HELP = "share of the routable work to execute, 0.1-1.0, where 1.0 runs everything"
DTYPES_HELP = "fp32, bf16 or fp16"


def option(words: str, *names: str, **settings):
    return typer.Option(*names, help=words, **settings)


Base = Annotated[
    str | None, option(f"The frozen Llama: {BASE_HELP}. [default: the one the checkpoint names, or bundled]")
]
Checkpoint = Annotated[
    Path | None,
    option(
        "Folder that `hat calibrate` wrote. [default: the one that comes with the bundled base; capacity 1.0 "
        "needs none]"
    ),
]
# Strings, so that a wrong number gets the library's own message.
Capacity = Annotated[
    str | None, option(f"Compute per token: {CAPACITY_HELP}. [default: the checkpoint's]", metavar="SHARE")
]
ExitRate = Annotated[
    str | None,
    option(
        "Share of tokens to leave before the last layer, 0-1, where 0 is off; above 0 needs a checkpoint with "
        "trained exit gates. [default: the checkpoint's]",
        metavar="SHARE",
    ),
]
Dtype = Annotated[
    str | None,
    option(f"{DTYPES_HELP}. [default: bf16 where the hardware computes in it, else fp32]"),
]

# hat calibrate
Save = Annotated[Path, option("Folder to write the checkpoint to; an older one in it is replaced.")]
BundledBase = Annotated[str, option(f"The frozen Llama: {BASE_HELP}.")]
HeldOutText = Annotated[str, option(f"Whose train and validation splits to measure on: {TEXT_HELP}.")]
Granularity = Annotated[
    str,
    option(
        "What a router decides about, per token: channel (an input channel of a linear layer) or token (the "
        "whole FFN; the published method)."
    ),
]
Tokens = Annotated[int, option("Tokens of text for the scores, at least 256; more is steadier and slower.")]
ProbeTokens = Annotated[
    int, option("Tokens for how sensitive the output is to each layer (backward passes), at least 16.")
]
PassDtype = Annotated[str, option(f"Of the passes: {DTYPES_HELP}. The thresholds serve every dtype.")]
DefaultCapacity = Annotated[
    str | None,
    option(
        f"Default of the checkpoint, which serves every capacity: {CAPACITY_HELP}. [default: 0.75 for channel, "
        "0.55 for token]",
        metavar="SHARE",
    ),
]

# hat generate
Prompt = Annotated[str, option("Text to continue, as it is, without a chat template; - reads stdin.")]
MaxNewTokens = Annotated[int, option("Most tokens to add, at least 1; an end-of-text token stops earlier.")]
Temperature = Annotated[
    float, option("0 takes the likeliest token (greedy); above 0 samples from the whole distribution.")
]
Seed = Annotated[int, option("Seed of the sampling, at least 0; greedy has no use for it.")]

# hat evaluate
Text = Annotated[str, option(f"What to measure on: {TEXT_HELP}.")]
Split = Annotated[str, option("Part of the text: train, validation or test.")]
MaxTokens = Annotated[int, option("Tokens of text, at least 2; more makes the interval narrower.")]
AsJson = Annotated[bool, option("Print one JSON object on stdout and nothing else.", "--json")]

# hat benchmark, hat foundation
TimedBase = Annotated[str, option(f"Shape to time: random:tinyllama, or {BASE_HELP}.")]
ChannelCapacities = Annotated[
    str, option("Capacities of the channel grain, 0.1-1.0, comma-separated; empty for none.", metavar="SHARES")
]
TokenCapacities = Annotated[
    str, option("Capacities of the token grain, 0.1-1.0, comma-separated; empty for none.", metavar="SHARES")
]
Batch = Annotated[int, option("Sequences in the batched decode, at least 1.")]
Rounds = Annotated[int, option("Rounds in which every variant takes one turn, at least 1; medians over them.")]
Steps = Annotated[int, option("Decode steps of one turn, at least 1.")]
Out = Annotated[Path, option("CSV file to write; an older one is replaced.")]


# hat quality
ChannelTrained = Annotated[Path, option("Trained checkpoint of the channel grain.")]
TokenTrained = Annotated[Path, option("Trained checkpoint of the token grain.")]
ChannelUntrained = Annotated[Path, option("Calibrated, untrained checkpoint of the channel grain, as a control.")]
TokenUntrained = Annotated[Path, option("Calibrated, untrained checkpoint of the token grain, as a control.")]
QualityOut = Annotated[Path, option("CSV file; rows that it holds are kept, and only missing ones are measured.")]
Grains = Annotated[str, option("Which grains to measure, comma-separated: channel, token.", metavar="GRAINS")]

# hat ablations
TrainSteps = Annotated[int, option("Training steps of each run, at least 1.")]

# hat train
Phase = Annotated[
    str, option("routers, exit (gates alone; needs --checkpoint with trained routers), or full: one after the other.")
]
RunFolder = Annotated[Path | None, option("Folder of a new run: checkpoint, log.csv and run.json.", "--save")]
Resume = Annotated[
    Path | None,
    option("Folder of a run that was stopped: go on where it stopped, as it was asked for.", "--resume", metavar="DIR"),
]
TrainedBase = Annotated[str, option(f"The frozen Llama: {BASE_HELP}.")]
TrainingText = Annotated[
    str,
    option(
        "Sources joined by +: self (text that the base writes itself) and train splits of addresses, a .txt, .jsonl or "
        ".parquet file or a Hub dataset. [default: addresses+self; quick: addresses]"
    ),
]
TrainedGrain = Annotated[
    str,
    option(
        "What a router decides about, per token: channel (an input channel of a linear layer) or token (the whole "
        "FFN; the published method, with its hyperparameters)."
    ),
]
Profile = Annotated[str, option("quick (a minute or two on two cores) or full.")]
MaxMinutes = Annotated[
    float | None, option("Stop after this many minutes, saved; --resume goes on. [default: no limit]", metavar="M")
]
Start = Annotated[
    Path | None,
    option(
        "Checkpoint to start from, instead of nothing: its calibration (channel grain), or its routers (phase exit).",
        "--checkpoint",
    ),
]
TrainDtype = Annotated[str, option(f"Of the frozen base: {DTYPES_HELP}. What is trained is fp32 in any case.")]
Settings = Annotated[
    list[str] | None,
    option("Change one hyperparameter; may be repeated: --set router_lr=1e-3 --set tokens=50000.", "--set",
           metavar="NAME=VALUE"),
]  # fmt: skip


def recipe_changes(settings: list[str] | None) -> dict:
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


def capacities(text: str) -> list[float]:
    """``"1.0,0.75"`` as capacities; the empty string is none."""
    return [check_capacity(part.strip()) for part in text.split(",") if part.strip()]


def check_shares(capacity: str | None, exit_rate: str | None) -> tuple[float | None, float | None]:
    """Both as numbers; None stays None."""
    return (
        None if capacity is None else check_capacity(capacity),
        None if exit_rate is None else check_exit_rate(exit_rate),
    )


def check_count(name: str, value: int, low: int) -> None:
    if value < low:
        raise HatError(f"{name} must be a whole number of at least {low}, got {value}")


def check_writable(folder: Path) -> None:
    """Raise unless a checkpoint can be written to ``folder``; creates nothing that stays."""
    there = folder.expanduser().absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise HatError(f"cannot write a checkpoint to {folder}: {there} is not a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise HatError(f"cannot write a checkpoint to {folder}: {error.strerror or error}") from error


def check_text(source: str, split: str) -> None:
    """Raise as `load_text` would, before the base is loaded: read the source with a stand-in tokenizer."""
    from .text import load_text

    def two_tokens(text: str, **_):
        return SimpleNamespace(input_ids=list(text.encode()[:2]))

    load_text(source, two_tokens, split=split, max_tokens=2)


def read_prompt(prompt: str) -> str:
    """The prompt, from stdin if it is ``-``; raises if there is nothing to continue."""
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise HatError(f"the prompt is not UTF-8 text: {error}") from error
    if not text.strip():
        raise HatError(f"the prompt is empty: expected text to continue, got {text!r}")
    return text


def load(
    base: str | None, checkpoint: Path | None, capacity: str | None, exit_rate: str | None, dtype: str | None
) -> HierarchicalTransformer:
    """The model that the options of `generate` and `evaluate` ask for, with everything checked first."""
    share, rate = check_shares(capacity, exit_rate)
    if checkpoint is None and (share != 1.0 or rate):
        checkpoint = _reference_checkpoint(base)

    from .base import load_base, parse_dtype
    from .model import HierarchicalTransformer

    if dtype is not None:
        parse_dtype(dtype)
    if checkpoint is None:
        loaded = load_base(*[base] if base else [], dtype=dtype)
        return HierarchicalTransformer(loaded, HatConfig.default(loaded))
    hat = HierarchicalTransformer.from_pretrained(checkpoint, base, dtype=dtype)
    if share is not None:
        hat.capacity = share
    if rate is not None:
        hat.exit_rate = rate
    return hat


def _reference_checkpoint(base: str | None) -> Path:
    if base not in (None, "bundled"):
        raise HatError(
            f"no checkpoint for {base}: make one with `hat calibrate --base {base} --save DIR` and pass "
            "--checkpoint DIR, or run everything with --capacity 1.0"
        )
    if not CALIBRATED.exists():
        raise HatError(
            f"no checkpoint at {CALIBRATED}: make one with `hat calibrate --save DIR` and pass --checkpoint "
            "DIR, or run everything with --capacity 1.0"
        )
    return CALIBRATED
