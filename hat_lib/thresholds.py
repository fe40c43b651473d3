"""From a requested capacity to one threshold per layer and site.

Calibration measures, per site, the distribution of scores and how sensitive the output is to gating that
site alone. Here the numbers become thresholds:

1. Allocation. The damage of running site i at kept share s_i is modelled as ``k_i (1 - s_i)^p_i``. Under the
   budget ``sum w_i s_i = c`` (w_i: share of routable work), Lagrange gives in closed form
   ``1 - s_i = (lambda w_i / (p_i k_i))^(1/(p_i-1))``, clipped; lambda by bisection. Shares grow with c at every
   site, so the kept sets of two capacities are nested.
2. Thresholds. ``t_i`` is the score's ``1 - s_i`` quantile on held-out text.

Because gating one layer shifts the inputs of the next, the realised share differs a little from the
requested one; a measured budget curve corrects for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from .config import CAPACITY_MIN, HatError, check_capacity, check_exit_rate


def allocate(
    sensitivity: np.ndarray, work: np.ndarray, budget: float, exponent: np.ndarray, floor: float
) -> np.ndarray:
    """Kept shares in [floor, 1] that minimise ``sum k (1-s)^p`` under ``sum w s = budget``; same shape as k.

    ``work`` sums to 1. A site with zero sensitivity gets the floor.
    """
    k = np.maximum(np.asarray(sensitivity, dtype=np.float64), 1e-12)
    w, exponent = np.asarray(work, dtype=np.float64), np.asarray(exponent, dtype=np.float64)

    def shares(log_lambda: float) -> np.ndarray:
        skipped = np.exp((log_lambda + np.log(w / (exponent * k))) / (exponent - 1))
        return np.clip(1 - skipped, floor, 1.0)

    low, high = -80.0, 80.0  # bisection on log lambda; the kept work falls as lambda grows
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (w * shares(middle)).sum() > budget else (low, middle)
    return shares((low + high) / 2)


@dataclass(frozen=True)
class Calibration:
    """What `hat_lib.calibrate` measured; saved in the checkpoint as JSON."""

    sites: list[str]
    """gated sites of a layer, S"""
    work: list[list[float]]
    """share of all routable work per layer and site, [L, S], sums to 1; 0 where a site always runs"""
    sensitivity: list[list[float]]
    """k of the damage model: KL to the base, nats per token, as that site alone is gated, [L, S]"""
    exponent: list[list[float]]
    """p of the damage model, [L, S]"""
    quantiles: list[list[list[float]]]
    """scores at evenly spaced quantiles 0..1, [L, S, P]"""
    budget_curve: list[list[float]]
    """realised capacity (first row) for allocated budget (second row), both increasing"""
    floor: float = 0.05
    """least kept share of any site"""
    exit_rates: list[float] | None = None
    """grid of exit rates, increasing, [R]; None while the gates are untrained"""
    exit_scores: list[list[float]] | None = None
    """gate thresholds on that grid, [R, E]"""
    text: str = ""
    """what it was measured on: corpus, split, tokens and hash"""

    def budget(self, capacity: float) -> float:
        """The budget to allocate so that the realised capacity is the requested one."""
        realised, allocated = self.budget_curve
        if capacity <= realised[0]:
            return max(allocated[0] + capacity - realised[0], CAPACITY_MIN / 2)
        return float(np.interp(capacity, [*realised, 1.0], [*allocated, 1.0]))

    def shares(self, capacity: float) -> np.ndarray:
        """Target kept share per layer and site, ``[L, S]``."""
        w = np.asarray(self.work)
        fixed = w == 0
        shares = allocate(self.sensitivity, np.where(fixed, 1e-12, w), self.budget(capacity), self.exponent, self.floor)
        return np.where(fixed, 1.0, shares)

    def thresholds(self, capacity: float) -> dict[tuple[int, str], float]:
        """Score thresholds by (layer, site); -inf keeps everything. Raises `HatError` outside [0.1, 1]."""
        capacity = check_capacity(capacity)
        out = {}
        shares = self.shares(capacity) if capacity < 1 else np.ones_like(np.asarray(self.work))
        for layer, row in enumerate(shares):
            for site, share, q in zip(self.sites, row, self.quantiles[layer], strict=True):
                grid = np.linspace(0, 1, len(q))
                out[layer, site] = float("-inf") if share >= 1 else float(np.interp(1 - share, grid, q))
        return out

    def exit_thresholds(self, exit_rate: float) -> list[float]:
        """One gate threshold per exit, interpolated on the grid; +inf at rate 0."""
        rate = check_exit_rate(exit_rate)
        if self.exit_rates is None:
            raise HatError("this calibration has no exit thresholds: train the exit gates first")
        if rate == 0:
            return [float("inf")] * len(self.exit_scores[0])
        return [float(np.interp(rate, self.exit_rates, column)) for column in zip(*self.exit_scores, strict=True)]

    def to_dict(self) -> dict:
        return asdict(self)
