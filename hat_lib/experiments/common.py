"""What the experiments share: columns used in several files, their saved rows, and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
import torch

from hat_lib import config
from hat_lib.backbone.base import Base
from hat_lib.config import DATA, HatError
from hat_lib.evaluation.perplexity import Comparison
from hat_lib.inference.speed import cpu_name

CHECKPOINTS = DATA / "checkpoints"
TEXTS = ("addresses", "docstrings")


@dataclass(frozen=True)
class Machine:
    """What ran, and where."""

    base: str
    device: str
    dtype: str
    threads: int
    cpu: str
    """its name, as the system gives it"""


@dataclass(frozen=True)
class Perplexity:
    """On a text, relative to the base's; if ``base`` is "bundled", that is a dequantised 4-bit file."""

    text: str
    tokens: int
    base_ppl: float
    increase: float
    increase_low: float | None
    increase_high: float | None  # 95 % paired interval; None below six blocks
    top1: float  # share of tokens with the base's most likely next token
    kl: float  # KL(base || variant), nats per token


def machine(base: Base) -> dict:
    cuda = base.device.type == "cuda"
    return {
        "base": base.name,
        "device": torch.cuda.get_device_name(base.device) if cuda else base.device.type,
        "dtype": str(base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
    }


def perplexity(paired: Comparison) -> dict:
    ends = interval(paired)
    return vars(paired) | {"increase_low": ends[0], "increase_high": ends[1], "blocks": paired.n_blocks}


def interval(paired: Comparison) -> tuple[float | None, float | None]:
    """Its ends; None for none."""
    return (None, None) if math.isnan(paired.low) else (paired.low, paired.high)


def rounded(row_type: type, **values):
    """A row with its floats rounded to five significant digits; values without a column in ``row_type`` are dropped."""
    names = [f.name for f in fields(row_type) if f.name in values]
    return row_type(**{n: float(f"{values[n]:.5g}") if isinstance(values[n], float) else values[n] for n in names})


def saved(name: str, results: Path | None = None) -> pd.DataFrame:
    """The rows of a file of results; ``results`` is its folder, by default ``data/results``."""
    path = (results or config.DATA / "results") / f"{name}.csv"
    if not path.is_file():
        raise HatError(f"no {path}: make it with `hat reproduce {name}`")
    return pd.read_csv(path)


def markdown(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table with one line per row; missing values (None, nan) become empty cells."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [["" if value is None or value != value else str(value) for value in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def times(speedup: float, ideal: float | None = None) -> str:
    """A speedup; skipping alone cannot beat its ideal, so a point above it shows how large the noise is.

    >>> times(1.16), times(1.16, 1.1), times(1.104, 1.1)
    ('1.16x', '1.16x (above ideal: noise)', '1.10x')
    """
    return f"{speedup:.2f}x" + " (above ideal: noise)" * (ideal is not None and round(speedup, 2) > round(ideal, 2))


SPEEDS = ("ideal", "over our own dense path", "over plain transformers")
"""columns of `speeds`"""


def speeds(ideal: float, dense: float, hf: float) -> list[str]:
    return [times(ideal), times(dense, ideal), times(hf)]
