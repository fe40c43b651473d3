"""The split of a budget over layers and sites, learned: how far each threshold moves from where calibration put it.

Calibration prices each site on its own, close to the dense model. Where half of the work is skipped the damage adds up
differently, and another split of the same budget costs a third less KL divergence
(docs/experiments/learned-split.md). What is learned is one offset of the log-score for each (layer, site), at a few
knots of capacity; between knots it follows a straight line, below the first it stays, and from `UNTIL` on it is 0,
because there the prices are right. After training it is part of the table of thresholds, and no part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Thresholds = Callable[[float], dict[tuple[int, str], float]]
"""capacity -> score thresholds by (layer, site)"""

KNOTS = (0.4, 0.55, 0.7)
UNTIL = 0.85


class BudgetSplit(nn.Module):
    """Offsets of the log-scores, fp32 ``[K, L, S]`` for K knots; untrained, they are 0.

    Args:
        n_layers, sites: of the model, L and S of them.
    """

    def __init__(self, n_layers: int, sites: tuple[str, ...]):
        super().__init__()
        self.sites = tuple(sites)
        self.offsets = nn.Parameter(torch.zeros(len(KNOTS), n_layers, len(sites)))

    def at(self, capacity: float) -> Tensor:
        """Offsets at a capacity, ``[L, S]``, differentiable."""
        weights = [np.interp(capacity, (*KNOTS, UNTIL), row) for row in np.eye(len(KNOTS) + 1)[:-1]]
        return (self.offsets * self.offsets.new_tensor(weights)[:, None, None]).sum(0)

    def on(self, nominal: Thresholds) -> Thresholds:
        """The thresholds ``nominal``, moved by the offsets as they are when asked."""

        @torch.no_grad()
        def moved(capacity: float) -> dict[tuple[int, str], float]:
            thresholds, factors = nominal(capacity), self.at(capacity).neg().exp().tolist()
            by = {(i, s): f for i, row in enumerate(factors) for s, f in zip(self.sites, row, strict=True)}
            return {key: t * by.get(key, 1.0) for key, t in thresholds.items()}

        return moved
