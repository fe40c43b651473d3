"""A ladder of budgets, each split over sites and the head, and over the two rules that an FFN of the neuron grain has.

As the budget falls, layers change from choosing inputs to choosing neurons, and never back. A budget at which some
change comes twice, once with the rules on either side. So between two entries that follow each other no layer changes,
and thresholds can be interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hat_lib.calibration.budget import HeadPoint, allocate, between, shares_at

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
# Least share of a site in the damage split: nothing is ever switched off entirely.
FLOOR = 0.05
# For a site whose work does not count.
NO_WORK = 1e-12


class Split(NamedTuple):
    """How a budget is spent."""

    budget: float
    shares: np.ndarray
    """that each site keeps, ``[L, S]``; 1 of the neurons where inputs are chosen"""
    head: HeadPoint | None
    """how the head runs; None reads it in full"""


def uniform_splits(hat, points: Sequence[HeadPoint]) -> list[Split]:
    """The same share everywhere; neurons are not chosen."""
    shape = hat.config.n_layers, len(hat.grain.sites)
    every = np.array([site == "neurons" for site in hat.grain.sites])
    return [Split(b, np.where(every, 1.0, np.full(shape, b)), between(points, b) if points else None) for b in BUDGETS]


def damage_splits(hat, k: np.ndarray, p: np.ndarray, points: Sequence[HeadPoint]) -> list[Split]:
    """The least damage by the prices ``k (1 - s)^p``, ``[L, S]``, and the head's ``points``."""
    sites, layers = hat.grain.sites, range(hat.config.n_layers)
    work = np.tile(hat.site_work, (len(layers), 1))
    work[np.array([[hat.grain.always_runs(i, s) for s in sites] for i in layers])] = NO_WORK
    head_work = hat.head_work if points else 0.0
    whole = work.sum() + head_work
    work, head_work = work / whole, head_work / whole
    gate_up, down, neurons = (sites.index(s) if s in sites else None for s in ("gate_up", "down", "neurons"))

    def split(budget: float, rule: np.ndarray) -> tuple[Split, float]:
        """With neurons chosen in the layers of ``rule``, bool ``[L]``; and the price of work."""
        shares, head, price = allocate(k, work, budget, p, FLOOR, points, head_work)
        if neurons is None:
            return Split(budget, shares, head), price
        of_sites, own = work.copy(), work[:, gate_up] + work[:, down]
        of_sites[:, neurons] = np.where(rule, own, NO_WORK)
        of_sites[rule, gate_up] = of_sites[rule, down] = NO_WORK
        previews = hat.grain.preview * work[rule, gate_up].sum()
        found, head, price = allocate(k, of_sites, budget - previews, p, FLOOR, points, head_work)
        # What a layer's other rule would keep stays in the table of thresholds, so that these never rise.
        found[rule, gate_up], found[rule, down] = shares[rule, gate_up], shares[rule, down]
        found[~rule, neurons] = 1.0
        return Split(budget, found, head), price

    def pays(price: float) -> np.ndarray:
        """Where choosing neurons costs less than choosing inputs, damage and work together, bool ``[L]``."""

        def cost(site: int, work: np.ndarray) -> np.ndarray:
            share = shares_at(price, k[:, site], work, p[:, site], FLOOR)
            return k[:, site] * (1 - share) ** p[:, site] + price * work * share

        inputs = cost(gate_up, work[:, gate_up]) + cost(down, work[:, down])
        preview = price * hat.grain.preview * work[:, gate_up]
        return cost(neurons, work[:, gate_up] + work[:, down]) + preview < inputs

    found, rule = [], np.zeros(len(layers), bool)
    for budget in reversed(BUDGETS):
        made, price = split(budget, rule)
        found.append(made)
        if neurons is not None and (more := pays(price) & ~rule).any():
            rule = rule | more
            found.append(split(budget, rule)[0])
    return found[::-1]
