"""Allocation: which share each site keeps under one budget, in closed form and without training.

The damage of running site i at kept share s_i is modelled as ``k_i (1 - s_i)^p_i``; under the budget ``sum w_i s_i =
c`` (w_i: share of routable work), Lagrange gives ``1 - s_i = (lambda w_i / (p_i k_i))^(1/(p_i-1))``, clipped; lambda by
bisection. Shares grow with c at every site.
"""

from __future__ import annotations

import numpy as np


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
