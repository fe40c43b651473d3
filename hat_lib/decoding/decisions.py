"""The method's decisions as arrays, for the engine: those of `Threshold` and `ExitThresholds`, or `Forced` ones.

A forced decision is a threshold that nothing, or everything, is above.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hat_lib.engine.arrays import Decisions
from hat_lib.engine.weights import as_numpy
from hat_lib.method.policies import ExitThresholds, Forced, Threshold
from hat_lib.method.setting import Mode


@torch.no_grad()
def decisions(hat, dense: Decisions, mode: Mode, window: slice) -> Decisions:
    """What a `HierarchicalTransformer` decides by.

    Args:
        dense: decisions of the dense model.
        mode: what it leaves open stays as in ``dense``.
        window: the tokens' positions in the cache, for forced decisions; channels are forced for one token only.
    """
    if hat.config.granularity == "token":
        made = _ffns(hat, mode.policy, window) | (_corrections(hat, mode.strength) if mode.strength else {})
    else:
        made = _channels(hat, dense, mode.policy, window) | {"strength": np.float32(mode.strength)}
    if mode.head is not None:
        made["head_threshold"] = as_numpy(mode.head.threshold.cpu())
        made["margin"] = np.float32(mode.head.margin)
    return with_exits(hat, dense._replace(**made), mode.exits, window)


@torch.no_grad()
def with_exits(hat, made: Decisions, exits: ExitThresholds | Forced | None, window: slice) -> Decisions:
    """``made`` with the decisions of exits; ``window`` as for `decisions`."""
    if exits is None or not hat.gates:
        return made
    depths, gates = [int(depth) for depth in hat.gates], list(hat.gates.values())
    before = made.exit.copy()
    before[depths] = range(len(depths))
    weights = _stack(gate.gate.weight[1] - gate.gate.weight[0] for gate in gates)
    if isinstance(exits, ExitThresholds):
        biases = [gate.gate.bias[1] - gate.gate.bias[0] for gate in gates]
        thresholds = _stack(exits.thresholds[d] - bias for d, bias in zip(hat.gates, biases, strict=True))[:, None]
    else:
        thresholds = _forced([exits.masks.exits.get(depth) for depth in depths], window, otherwise=False)
        weights = np.zeros_like(weights)
    return made._replace(
        exit=before,
        gate=weights,
        gate_threshold=thresholds,
        scale=_stack(gate.scale for gate in gates),
        shift=_stack(gate.shift for gate in gates),
        reduce=_stack(gate.reduce.weight for gate in gates),
        expand=_stack(gate.expand.weight for gate in gates),
    )


def _channels(hat, dense: Decisions, policy, window: slice) -> dict[str, np.ndarray]:
    layers, made = range(hat.config.n_layers), {}
    for site in hat.grain.sites:
        name = f"{site}_threshold"
        if isinstance(policy, Threshold):
            made[name] = _stack(
                hat.routers[f"{i}_{site}"].channel_thresholds(policy.thresholds[i, site]) for i in layers
            )
        elif isinstance(policy, Forced):
            made[name] = getattr(dense, name).copy()
            for i in layers:
                if (mask := policy.masks.keep.get((i, site))) is not None:
                    made[name][i] = np.where(mask[0, window][0].numpy(), -1, np.inf)
    tokens = [hat.routers[f"{i}_token"] for i in layers]
    if isinstance(policy, Threshold) and any(router.weight.any() or router.bias.any() for router in tokens):
        strengths = [policy.thresholds.get((i, "token"), 1.0) for i in layers]
        made["sensitivity"] = _stack(s * router.weight for s, router in zip(strengths, tokens, strict=True))
        made["sensitivity_bias"] = _stack(s * router.bias for s, router in zip(strengths, tokens, strict=True))
    return made


def _ffns(hat, policy, window: slice) -> dict[str, np.ndarray]:
    layers, width = range(hat.config.n_layers), hat.lm.config.hidden_size
    if isinstance(policy, Threshold):
        routers = [hat.routers[f"{i}_ffn"] for i in layers]
        thresholds = _stack(policy.thresholds[i, "ffn"] - router.bias for i, router in enumerate(routers))
        return {"ffn": _stack(router.weight for router in routers), "ffn_threshold": thresholds[:, None]}
    if isinstance(policy, Forced):
        thresholds = _forced([policy.masks.keep.get((i, "ffn")) for i in layers], window, otherwise=True)
        return {"ffn": np.zeros((len(layers), width), np.float32), "ffn_threshold": thresholds}
    return {}


def _corrections(hat, strength: float) -> dict[str, np.ndarray]:
    """What replaces an FFN; nothing in layer 0, whose FFN always runs."""
    found = list(hat.corrections.values())
    parts = {
        "correction_down": [c.down for c in found],
        "correction_up": [strength * c.up for c in found],
        "correction_shift": [strength * c.shift for c in found],
    }
    return {name: _stack([torch.zeros_like(rows[0]), *rows]) for name, rows in parts.items()}


def _forced(masks: list[Tensor | None], window: slice, otherwise: bool) -> np.ndarray:
    """Thresholds for a score of zero, float32 ``[len(masks), B*T]``: below zero for yes, above it for no."""
    known = [None if mask is None else mask[:, window].flatten().cpu().numpy() for mask in masks]
    size = next((len(mask) for mask in known if mask is not None), 1)
    yes = [np.full(size, otherwise) if mask is None else mask for mask in known]
    return np.where(yes, -1, 1).astype(np.float32)


def _stack(rows: Iterable[Tensor]) -> np.ndarray:
    return as_numpy(torch.stack([row.detach().float() for row in rows]))
