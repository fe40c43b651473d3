"""Sweeps: any grid of capacity, exit rate, seed, grain and text, with every control.

A sweep is a list of points for `hat_lib.experiments.quality.quality`, which measures them at equal work, writes each
row as it finishes and goes on where it stopped. The figure of its frontier is `hat_lib.plotting.frontier.quality`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from hat_lib.config import HatError, check_capacity, check_exit_rate
from hat_lib.experiments.quality import VARIANTS, Point

DRAWN = ("random", "removal", "static", "random_exits")
"""variants with something drawn at random, which differ from seed to seed; the others are run with the first seed
alone"""


def points(
    granularity: str,
    *,
    capacities: Sequence[float],
    exit_rates: Sequence[float] = (0.0,),
    seeds: Sequence[int] = (0,),
    texts: Sequence[str] = ("addresses", "docstrings"),
    variants: Sequence[str] = VARIANTS,
    max_tokens: int = 4000,
) -> list[Point]:
    """The points of a grid, for one grain: by text, then capacity, then exit rate, the trained model first.

    Controls of routers stand beside the rows without exits, `random_exits` beside those with. At capacity 1.0 without
    exits there is nothing to control. Raises `HatError` for an empty axis, a value out of range or given twice.
    """
    axes = {"capacity": [check_capacity(c) for c in capacities], "exit rate": [check_exit_rate(r) for r in exit_rates],
            "seed": list(seeds), "text": list(texts), "variant": list(variants)}  # fmt: skip
    for name, values in axes.items():
        if not values:
            raise HatError(f"a sweep needs at least one {name}")
        if twice := [v for v in values if values.count(v) > 1]:
            raise HatError(f"{name} {twice[0]!r} stands twice in the grid")
    if odd := [s for s in seeds if not isinstance(s, int) or s < 0]:
        raise HatError(f"a seed must be a whole number of at least 0, got {odd[0]!r}")
    if odd := [v for v in variants if v not in VARIANTS]:
        raise HatError(f"variants must be among {', '.join(VARIANTS)}, got {odd[0]!r}")

    def stands(capacity: float, rate: float, variant: str, seed: int) -> bool:
        if variant not in DRAWN and seed != seeds[0]:
            return False
        if variant == "random_exits":
            return rate > 0
        return variant == "trained" or (rate == 0 and capacity < 1)

    grid = product(texts, axes["capacity"], axes["exit rate"], variants, seeds)
    return [
        Point(granularity, text, max_tokens, capacity, rate, variant, seed)
        for text, capacity, rate, variant, seed in grid
        if stands(capacity, rate, variant, seed)
    ]
