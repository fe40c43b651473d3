"""Intervals: a 95 % bootstrap over the parts of a text that may count as independent.

From a text of at least `FEWEST` documents, documents are drawn whole (a cluster bootstrap). From one of fewer, runs of
neighbouring blocks are, which wrap around within their document (the circular block bootstrap, Politis and Romano
1992). A run has about n^(1/3) of the n blocks (Hall, Horowitz and Jing 1995, doi:10.1093/biomet/82.3.561). Ends are
quantiles, expanded for few units (Hesterberg 2015, arXiv:1411.5279). Below `FEWEST` blocks there is no interval.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student_t

FEWEST = 6
"""documents to draw documents, and blocks to have an interval at all"""
NONE = f"no interval: it takes at least {FEWEST} blocks"


class Units(NamedTuple):
    """What is drawn together, with replacement."""

    blocks: list[np.ndarray]  #: numbers of the blocks of each unit
    drawn: int  #: number of units that make a text as long as this one


def units(documents: Sequence) -> Units:
    """The units of blocks in the order of their text; ``documents [n]`` says to which one each block belongs."""
    code, n = np.unique(np.asarray(documents), return_inverse=True)[1], len(documents)
    whole = [np.flatnonzero(code == document) for document in range(code.max() + 1)]
    if len(whole) >= FEWEST:
        return Units(whole, len(whole))
    length = int(np.cbrt(n))
    runs = [np.take(at, range(start, start + length), mode="wrap") for at in whole for start in range(len(at))]
    return Units(runs, round(n / length))


def resample(found: Units, n: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each of ``n`` blocks is drawn, int64 ``[resamples, n]``: all that a resampled sum needs."""
    chance = np.full(len(found.blocks), 1 / len(found.blocks))
    times = np.random.default_rng(seed).multinomial(found.drawn, chance, size=resamples)
    return times @ np.stack([np.bincount(blocks, minlength=n) for blocks in found.blocks])


def tails(n: float) -> tuple[float, float]:
    """Quantiles of a 95 % bootstrap interval from ``n`` > 1 units, wider for small n, as Student's t is."""
    tail = float(norm.cdf(np.sqrt(n / (n - 1)) * student_t.ppf(0.025, n - 1)))
    return tail, 1 - tail


def interval(drawn: np.ndarray, blocks: int, n: float) -> tuple[float, float]:
    """95 % interval of a statistic of so many blocks, worth ``n`` units, from its resamples ``drawn [R]``; else nan."""
    known = drawn[~np.isnan(drawn)]
    if blocks < FEWEST or not len(known):
        return np.nan, np.nan
    low, high = np.quantile(known, tails(max(2, n))).tolist()
    return low, high


def outcome(low: float, high: float, *, at_most: float | None = None, at_least: float | None = None) -> str:
    """Judge one bound by an interval: "kept" if all of it lies on the right side, "missed" if all of it lies on the
    wrong side, "open" if the bound lies inside, or if there is no interval."""
    if at_least is not None:
        low, high, at_most = -high, -low, -at_least
    return "kept" if high <= at_most else "missed" if low > at_most else "open"
