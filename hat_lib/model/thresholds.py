"""Thresholds: the method's decision rule, ``score > threshold``, for work and for exits.

Per token, in fp32, deterministic: it reads neither the future nor the rest of the batch. Which thresholds give a
capacity or an exit rate, stands in `hat_lib.model.threshold_table`; what a score is, in `hat_lib.model.routers` and
`hat_lib.model.exit_gate`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hat_lib.model.token_state import TokenState


class Threshold:
    """The method: score > threshold.

    Args:
        routers: a model's, by ``"{layer}_{site}"`` and, for the sensitivity of its tokens, ``"{layer}_token"``.
        thresholds: on the routers' scores, by (layer, site).
    """

    def __init__(self, routers: nn.ModuleDict, thresholds: dict[tuple[int, str], float]):
        self.routers, self.thresholds = routers, thresholds

    def __call__(self, layer, site, x, rows, state):
        router, threshold = self.routers[f"{layer}_{site}"], self.thresholds[layer, site]
        if site == "ffn":
            return router.keep(x, threshold)
        return router.keep(x, threshold, token_threshold_scale(self.routers, layer, site, x, state))


def token_threshold_scale(routers: nn.ModuleDict, layer: int, site: str, x: Tensor, state: TokenState) -> Tensor | None:
    """`MoERouter.threshold_scale` of the running rows in this layer, measured at its first site; None: token grain."""
    if site == "qkv":
        state.threshold_scale = routers[f"{layer}_token"].threshold_scale(x)
    return state.threshold_scale


class ExitThresholds:
    """The method: a token leaves at the first exit whose gate scores it over the gate's threshold."""

    def __init__(self, gates: nn.ModuleDict, thresholds: Sequence[float]):
        self.gates, self.thresholds = gates, dict(zip(gates, thresholds, strict=True))

    def exits(self, depth, h, rows, state):
        return self.gates[str(depth)].score(h) > self.thresholds[str(depth)]
