"""Thresholds: the method's decisions at one capacity and exit rate, as numbers; and the table that they come from.

A `Calibration`, made by `hat_lib.calibration`, is a table of capacities realised on held-out text, and of the
thresholds that realised them, interpolated linearly in between. They never rise with capacity, so the kept sets of two
capacities are nested, where token sensitivity acts alike at both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import numpy as np

from hat_lib.config import HatError, check_capacity, check_exit_rate, shown

HEAD_TABLES = ("head_thresholds", "head_margins", "head_shares")
EXIT_TABLES = ("exit_capacities", "exit_rates", "exit_scores")


class Thresholds(NamedTuple):
    """What scores are compared with, on the reference path and in the engine: a unit runs, a token leaves, if its score
    is above. -inf keeps everything, as the dense model does, and +inf lets nobody leave."""

    capacity: float  #: as requested
    exit_rate: float  #: as requested
    layer_capacity: float  #: what the capacity leaves for the layers, if the head takes a part of it
    site: np.ndarray  #: of each layer and site, fp32 [L, S]
    sensitivity: np.float32  #: strength of token sensitivity
    exit: np.ndarray  #: of each gate, fp32 [E]
    correction: np.float32  #: strength of the corrections; 0 for none
    head: np.float32  #: of the channels that the head's preview reads; -inf reads the head in full
    margin: np.float32  #: nats below the best preview within which a token's logit is read in full
    head_share: float  #: expected share of the head's work, for a forward whose logits nobody asked for

    @classmethod
    def dense(cls, layers: int, sites: int, exits: int) -> Self:
        site, exit = np.full((layers, sites), -np.inf, np.float32), np.full(exits, np.inf, np.float32)
        zero = np.float32(0)
        return cls(1.0, 0.0, 1.0, site, np.float32(1), exit, zero, np.float32(-np.inf), zero, 1.0)

    def holding(self, values: Mapping[str, object]) -> Self:
        """With other values, each in its type: compiled code takes no other."""
        array, one = partial(np.ascontiguousarray, dtype=np.float32), np.float32
        kinds = {"site": array, "exit": array, "sensitivity": one, "correction": one, "head": one, "margin": one}
        values = {name: kinds.get(name, float)(value) for name, value in values.items()}
        for name, value in values.items():
            shape = np.shape(getattr(self, name))
            if np.shape(value) != shape or np.isnan(value).any():
                raise HatError(f"{name} must be numbers of shape {shape}, not nan, got {shown(value)}")
        return self._replace(**values)

    @property
    def skips(self) -> bool:
        """Whether a router decides anywhere."""
        return bool((self.site > -np.inf).any())

    @property
    def leaves(self) -> bool:
        """Whether a gate lets a token leave."""
        return bool((self.exit < np.inf).any())

    @property
    def shortlist(self) -> bool:
        """Whether the head decides."""
        return self.head > -np.inf


@dataclass(frozen=True)
class Calibration:
    """What `hat_lib.calibration.capacity` measured; saved in the checkpoint as JSON."""

    sites: list[str]  #: of the grain, S
    capacities: list[float]  #: realised capacities, rising to 1.0, [C]
    thresholds: list[list[list[float]]]  #: score threshold of each site there, never rising with capacity, [L, S, C]
    shares: list[list[list[float]]]  #: mean share that each site kept there, [L, S, C]
    method: str = "damage"  #: how the budget was split over sites: see `hat_lib.calibration.capacity.SPLITS`
    exit_capacities: list[float] | None = None  #: where exits were measured, [K]; None, as below, with untrained gates
    exit_rates: list[list[float]] | None = None  #: realised exit rates at each, rising, [K, R]
    exit_scores: list[list[list[float]]] | None = None  #: gate thresholds there, [K, R, E]
    head_thresholds: list[float] | None = None  #: of the head's channels, [C]; None, as below, for a head read in full
    head_margins: list[float] | None = None  #: nats below the best preview within which a token is read in full, [C]
    head_shares: list[float] | None = None  #: mean share of the head's work, shortlist included, [C]
    sensitivity: list[float] | None = None  #: how strongly token sensitivity acts at each capacity, [C]; None for 1
    text: str = ""  #: what it was measured on: corpus, split, tokens and hash

    def shares_at(self, capacity: float) -> np.ndarray:
        """Expected kept share per layer and site, ``[L, S]``."""
        return self._at(self.shares, capacity)

    def layer_capacity_at(self, capacity: float, site_work: Sequence[float]) -> float:
        """What a capacity leaves for the layers, if the head takes a share for itself; ``site_work [S]`` is each site's
        work, as a fraction of a layer's routable work."""
        if self.head_thresholds is None:
            return capacity
        return float((self.shares_at(capacity) @ np.asarray(site_work)).mean())

    def thresholds_at(self, capacity: float) -> dict[tuple[int, str], float]:
        """Score thresholds by (layer, site), below the lowest measured capacity those of that one; -inf keeps all. With
        a table of token sensitivity, each layer also has its strength, at "token". `HatError` outside [0.1, 1]."""
        capacity = check_capacity(capacity)
        table = self._at(self.thresholds, capacity)
        if capacity == 1:
            table = np.full_like(table, -np.inf)
        by_site = {(i, site): float(t) for i, row in enumerate(table) for site, t in zip(self.sites, row, strict=True)}
        if self.sensitivity is not None:
            by_site |= {(i, "token"): float(self._at(self.sensitivity, capacity)) for i in range(len(table))}
        return by_site

    def head_at(self, capacity: float) -> tuple[float, float, float] | None:
        """Threshold, margin and expected share of the head; None at capacity 1, and if it is read in full."""
        if check_capacity(capacity) == 1 or self.head_thresholds is None:
            return None
        return tuple(float(self._at(getattr(self, name), capacity)) for name in HEAD_TABLES)

    def _at(self, table: list, capacity: float) -> np.ndarray:
        values, capacity = np.asarray(table, float), check_capacity(capacity)
        after = min(int(np.searchsorted(self.capacities, capacity)), len(self.capacities) - 1)
        before = max(after - 1, 0)
        low, high = self.capacities[before], self.capacities[after]
        weight = 1.0 if high == low else float(np.clip((capacity - low) / (high - low), 0, 1))
        return values[..., before] * (1 - weight) + values[..., after] * weight

    def exit_thresholds(self, exit_rate: float, capacity: float) -> list[float]:
        """One gate threshold per exit, interpolated between rates, then between capacities, and beyond the measured
        ones that of the nearest; +inf at rate 0."""
        rate, capacity = check_exit_rate(exit_rate), check_capacity(capacity)
        if self.exit_rates is None:
            raise HatError("this calibration has no exit thresholds: train the exit gates first")
        scores = np.array(self.exit_scores, float)  # [K, R, E]
        if rate == 0:
            return [float("inf")] * scores.shape[2]
        there = []
        for rates, at in zip(self.exit_rates, scores, strict=True):
            # What tables begin with, rate 0, is off: halfway to it, still nobody would leave.
            first = int(rates[0] == 0 and len(rates) > 1)
            there.append([np.interp(rate, rates[first:], column[first:]) for column in at.T])
        return [float(np.interp(capacity, self.exit_capacities, column)) for column in np.array(there).T]
