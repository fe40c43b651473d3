"""What the studies share: formats, times of turns, Markdown tables, and names from the library."""

import statistics
from collections.abc import Iterable, Sequence

from hat_lib.base.machine import Machine, machine
from hat_lib.evaluation.equal_work import CHECKPOINTS, TEXTS
from hat_lib.evaluation.perplexity import Perplexity
from hat_lib.evaluation.perplexity import columns as perplexity
from hat_lib.rows import results_table as saved
from hat_lib.rows import rounded

__all__ = ["CHECKPOINTS", "TEXTS", "Machine", "Perplexity", "machine", "perplexity", "rounded", "saved"]


FORMATS = {"float32": ("fp32", "base"), "bfloat16": ("bf16", "base"), "int8": ("fp32", "int8"), "q4": ("fp32", "q4")}
"""weights that are read -> dtype of the base, and format of the engine's copy"""


def spread(turns: Sequence[float]) -> dict[str, float]:
    """Times of several turns as columns: median, lowest and highest."""
    return {"ms": statistics.median(turns), "low": min(turns), "high": max(turns)}


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """slow / fast, paired by round."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def over_dense(dense: Sequence[float], turns: Sequence[float]) -> dict[str, float]:
    """Speed over our own dense path, paired by round, as columns: median, lowest and highest."""
    found = ratios(dense, turns)
    return {"over_dense": statistics.median(found), "over_dense_low": min(found), "over_dense_high": max(found)}


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
