"""The method's decisions as arrays, for the engine: those of `Threshold` and `ExitThresholds`, or `Forced` ones.

A forced decision is a threshold that nothing, or everything, is above.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hat_lib.engine.step import Decisions
from hat_lib.engine.weights import as_numpy
from hat_lib.model.modes import Mode
from hat_lib.model.policies import ExitThresholds, Forced, Threshold


@torch.no_grad()
def decisions(hat, dense: Decisions, mode: Mode, places: slice) -> Decisions:
    """What a `HierarchicalTransformer` decides by.

    Args:
        dense: decisions of the dense model.
        mode: what it leaves open stays as in ``dense``.
        places: of these tokens in the cache, for forced decisions; channels are forced for one token only.
    """
    made = {}
    if hat.config.granularity == "token":
        made |= _ffns(hat, mode.policy, places)
        if mode.corrected:
            made |= _instead(hat, mode.corrected)
    else:
        made |= _channels(hat, dense, mode.policy, places)
    if mode.shortlist is not None:
        made |= {"cut_head": as_numpy(mode.shortlist.threshold.cpu()), "margin": np.float32(mode.shortlist.margin)}
    return with_exits(hat, dense._replace(**made), mode.exits, places)


@torch.no_grad()
def with_exits(hat, made: Decisions, exits: ExitThresholds | Forced | None, places: slice) -> Decisions:
    """``made`` with the decisions of exits; ``places`` as for `decisions`."""
    return made._replace(**dict(_exits(hat, made, exits, places))) if exits and hat.gates else made


def _channels(hat, dense: Decisions, routed, places: slice) -> dict[str, np.ndarray]:
    layers, made = range(hat.config.n_layers), {}
    for site in hat.grain.sites:
        name = f"cut_{site}"
        if isinstance(routed, Threshold):
            made[name] = _stack(
                hat.routers[f"{i}_{site}"].channel_thresholds(routed.thresholds[i, site]) for i in layers
            )
        elif isinstance(routed, Forced):
            made[name] = getattr(dense, name).copy()
            for i in layers:
                if (mask := routed.masks.keep.get((i, site))) is not None:
                    made[name][i] = np.where(mask[0, places][0].numpy(), -1, np.inf)
    tokens = [hat.routers[f"{i}_token"] for i in layers]
    if isinstance(routed, Threshold) and any(router.weight.any() or router.bias.any() for router in tokens):
        made["sensitivity"] = _stack(router.weight for router in tokens)
        made["sensitivity_bias"] = _stack(router.bias for router in tokens)
    return made


def _ffns(hat, routed, places: slice) -> dict[str, np.ndarray]:
    layers, width = range(hat.config.n_layers), hat.lm.config.hidden_size
    if isinstance(routed, Threshold):
        routers = [hat.routers[f"{i}_ffn"] for i in layers]
        cuts = [routed.thresholds[i, "ffn"] - router.bias for i, router in zip(layers, routers, strict=True)]
        return {"ffn": _stack(router.weight for router in routers), "ffn_cut": _stack(cuts)[:, None]}
    if isinstance(routed, Forced):
        cuts = _forced([routed.masks.keep.get((i, "ffn")) for i in layers], places, otherwise=True)
        return {"ffn": np.zeros((len(layers), width), np.float32), "ffn_cut": cuts}
    return {}


def _instead(hat, strength: float) -> dict[str, np.ndarray]:
    """What stands in for an FFN; nothing in layer 0, whose FFN always runs."""
    found = [(c.down, strength * c.up, strength * c.shift) for c in hat.corrections.values()]
    names = "instead_down", "instead_up", "instead_shift"
    parts = zip(names, zip(*found, strict=True), strict=True)
    return {name: _stack([torch.zeros_like(rows[0]), *rows]) for name, rows in parts}


def _exits(hat, dense: Decisions, exits, places: slice) -> Iterable[tuple[str, np.ndarray]]:
    depths, gates = [int(depth) for depth in hat.gates], list(hat.gates.values())
    before = dense.exit.copy()
    before[depths] = range(len(depths))
    yield "exit", before
    for name in ("scale", "shift"):
        yield name, _stack(getattr(gate, name) for gate in gates)
    for name in ("reduce", "expand"):
        yield name, _stack(getattr(gate, name).weight for gate in gates)
    weights = _stack(gate.gate.weight[1] - gate.gate.weight[0] for gate in gates)
    if isinstance(exits, ExitThresholds):
        biases = [gate.gate.bias[1] - gate.gate.bias[0] for gate in gates]
        cuts = [exits.thresholds[d] - bias for d, bias in zip(hat.gates, biases, strict=True)]
        yield "gate", weights
        yield "gate_cut", _stack(cuts)[:, None]
    else:
        yield "gate", np.zeros_like(weights)
        yield "gate_cut", _forced([exits.masks.exits.get(depth) for depth in depths], places, otherwise=False)


def _forced(masks: list[Tensor | None], places: slice, otherwise: bool) -> np.ndarray:
    """Thresholds for a score of zero, float32 ``[len(masks), B*T]``: below zero for yes, above it for no."""
    some = next((mask[:, places].flatten() for mask in masks if mask is not None), torch.zeros(1))
    yes = [
        torch.full_like(some, otherwise, dtype=bool) if mask is None else mask[:, places].flatten() for mask in masks
    ]
    return np.where(torch.stack(yes).cpu().numpy(), -1, 1).astype(np.float32)


def _stack(rows: Iterable[Tensor]) -> np.ndarray:
    return as_numpy(torch.stack([row.detach().float() for row in rows]))
