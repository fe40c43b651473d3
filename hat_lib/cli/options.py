"""What the commands take: each option with the words that explain it.

torch is not imported here, so that help answers at once; what was given is checked by `hat_lib.cli.validation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hat_lib.config import DATA

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

BundledBase = Annotated[str, option(f"The frozen Llama: {BASE_HELP}.")]
Granularity = Annotated[
    str,
    option(
        "What a router decides about, per token: channel (an input channel of a linear layer) or token (the whole "
        "FFN; the published method)."
    ),
]
Text = Annotated[str, option(f"What to measure on: {TEXT_HELP}.")]
Split = Annotated[
    str | None,
    option(
        "Part of the text: train, validation, test (5 % of a file), or all. [default: test; all of a file that the "
        "checkpoint was not made with]"
    ),
]
MaxTokens = Annotated[int, option("Tokens of text, at least 2; more makes the interval narrower.")]
