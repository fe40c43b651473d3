"""From a requested capacity to one threshold per layer and site.

A `Calibration` is a table: at some capacities, realised on held-out text, which thresholds realised them. In
between, thresholds are interpolated. They never rise with capacity, so the kept sets of two capacities are nested.

How the budget is split over layers and sites is decided where the table is made (`hat_lib.calibration`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from hat_lib.config import HatConfig, HatError, check_capacity, check_exit_rate
from hat_lib.model.granularity import GRAINS


@dataclass(frozen=True)
class Calibration:
    """What `hat_lib.calibration.capacity` measured; saved in the checkpoint as JSON. C capacities, L layers, S
    sites."""

    sites: list[str]
    """gated sites of a layer, S"""
    capacities: list[float]
    """realised capacities, rising to 1.0, [C]"""
    thresholds: list[list[list[float]]]
    """score threshold that each site had there, never rising with capacity, [L, S, C]"""
    shares: list[list[list[float]]]
    """mean share that each site kept there, [L, S, C]"""
    method: str = "damage"
    """how the budget was split over sites: see `hat_lib.calibration.capacity.SPLITS`"""
    exit_capacities: list[float] | None = None
    """capacities at which exits were measured, rising, [K]; None, as both below, while the gates are untrained"""
    exit_rates: list[list[float]] | None = None
    """realised exit rates at each, rising, [K, R]"""
    exit_scores: list[list[list[float]]] | None = None
    """gate thresholds there, [K, R, E]"""
    text: str = ""
    """what it was measured on: corpus, split, tokens and hash"""

    def check_fits(self, config: HatConfig) -> None:
        """Raise `HatError` unless the tables are for this shape: its layers, its grain's sites, its exits."""
        exits = None if self.exit_scores is None else len(self.exit_scores[0][0])
        for what, own, expected in (
            ("sites", list(self.sites), list(GRAINS[config.granularity].sites)),
            ("layers", len(self.thresholds), config.n_layers),
            ("exits", exits, len(config.exit_layers)),
        ):
            if own is not None and own != expected:
                raise HatError(f"the calibration is for another model: {what} {own}, expected {expected}")

    def shares_at(self, capacity: float) -> np.ndarray:
        """Kept share per layer and site to be expected at a capacity, ``[L, S]``."""
        return self._at(self.shares, check_capacity(capacity))

    def thresholds_at(self, capacity: float) -> dict[tuple[int, str], float]:
        """Score thresholds by (layer, site); -inf keeps everything. Raises `HatError` outside [0.1, 1].

        Below the lowest capacity that was measured, that one's thresholds.
        """
        capacity = check_capacity(capacity)
        if capacity == 1:
            table = np.full(np.shape(self.thresholds)[:2], -np.inf)
        else:
            table = self._at(self.thresholds, capacity)
        return {(i, site): float(t) for i, row in enumerate(table) for site, t in zip(self.sites, row, strict=True)}

    def _at(self, table: list, capacity: float) -> np.ndarray:
        values = np.asarray(table)
        after = min(int(np.searchsorted(self.capacities, capacity)), len(self.capacities) - 1)
        before = max(after - 1, 0)
        low, high = self.capacities[before], self.capacities[after]
        weight = 1.0 if high == low else float(np.clip((capacity - low) / (high - low), 0, 1))
        return values[..., before] * (1 - weight) + values[..., after] * weight

    def exit_thresholds(self, exit_rate: float, capacity: float) -> list[float]:
        """One gate threshold per exit, interpolated between rates, then between capacities; +inf at rate 0.

        Beyond the rates and capacities that were measured, the nearest one's.
        """
        rate = check_exit_rate(exit_rate)
        if self.exit_rates is None:
            raise HatError("this calibration has no exit thresholds: train the exit gates first")
        if rate == 0:
            return [float("inf")] * len(self.exit_scores[0][0])
        there = [
            [np.interp(rate, rates, column) for column in zip(*scores, strict=True)]
            for rates, scores in zip(self.exit_rates, self.exit_scores, strict=True)
        ]
        return [float(np.interp(capacity, self.exit_capacities, column)) for column in zip(*there, strict=True)]

    def to_dict(self) -> dict:
        return asdict(self)
