"""Work of several forwards, added up: what was executed, beside what the base would have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .cost import state_cost

if TYPE_CHECKING:
    from .model import HierarchicalTransformer
    from .state import TokenState


class Spent:
    """Work of forwards of ``hat``. Shares are ratios of sums over all real tokens, not means over forwards."""

    def __init__(self, hat: HierarchicalTransformer):
        self.hat = hat
        self._executed, self._possible = np.zeros(3), np.zeros(3)
        self.exits = np.zeros(hat.config.n_layers + 1, dtype=np.int64)
        """tokens by the layers that they ran, ``[L + 1]``"""

    def add(self, state: TokenState) -> None:
        """Count a forward, while ``hat`` is set as it was in it."""
        cost, depths = state_cost(self.hat, state), state.exit_layer[state.real]
        tokens, layers_run = len(depths), int(depths.sum())
        self._executed += state.capacity * layers_run, state.exit_rate * tokens, float(cost.executed.sum())
        self._possible += layers_run, tokens, float(cost.dense.sum())
        self.exits += np.bincount(depths.cpu().numpy(), minlength=len(self.exits))

    @property
    def shares(self) -> tuple[float, float, float]:
        """Realised capacity, exit rate and model share."""
        capacity, exit_rate, model_share = (self._executed / self._possible).tolist()
        return capacity, exit_rate, model_share
