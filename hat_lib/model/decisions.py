"""The method's decisions as arrays, for the engine: of a `Threshold`, an `ExitThresholds`, or `Forced` for one token.

What is forced is a threshold that nothing, or everything, is above.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hat_lib.engine.step import Decisions
from hat_lib.engine.weights import as_numpy
from hat_lib.model.policies import ExitThresholds, Forced, Threshold


@torch.no_grad()
def decisions(hat, dense: Decisions, routed, exits, start: int) -> Decisions:
    """What a `HierarchicalTransformer` decides by.

    Args:
        dense: decisions of the dense model.
        routed, exits: of a mode; `KeepAll` and None leave ``dense`` as it is.
        start: place in the cache, for what is forced.
    """
    made = dict(_exits(hat, dense, exits, start)) if exits else {}
    if hat.config.granularity == "token":
        made |= _ffns(hat, routed, start)
    else:
        made |= _channels(hat, dense, routed, start)
    return dense._replace(**made)


def _channels(hat, dense: Decisions, routed, start: int) -> dict[str, np.ndarray]:
    layers, made = range(hat.config.n_layers), {}
    for site in hat.grain.sites:
        name = f"cut_{site}"
        if isinstance(routed, Threshold):
            made[name] = _stack(hat.routers[f"{i}_{site}"].cut(routed.thresholds[i, site]) for i in layers)
        elif isinstance(routed, Forced):
            made[name] = getattr(dense, name).copy()
            for i in layers:
                if (mask := routed.masks.keep.get((i, site))) is not None:
                    made[name][i] = np.where(mask[0, start].numpy(), -1, np.inf)
    tokens = [hat.routers[f"{i}_token"] for i in layers]
    if isinstance(routed, Threshold) and any(router.weight.any() or router.bias.any() for router in tokens):
        made["sensitivity"] = _stack(router.weight for router in tokens)
        made["sensitivity_bias"] = _stack(router.bias for router in tokens)
    return made


def _ffns(hat, routed, start: int) -> dict[str, np.ndarray]:
    layers, width = range(hat.config.n_layers), hat.lm.config.hidden_size
    if isinstance(routed, Threshold):
        routers = [hat.routers[f"{i}_ffn"] for i in layers]
        cuts = [routed.thresholds[i, "ffn"] - router.bias for i, router in zip(layers, routers, strict=True)]
        return {"ffn": _stack(router.weight for router in routers), "ffn_cut": _stack(cuts)}
    if isinstance(routed, Forced):
        masks = [routed.masks.keep.get((i, "ffn")) for i in layers]
        runs = [mask is None or bool(mask[0, start]) for mask in masks]
        cut = np.where(runs, -1, 1).astype(np.float32)
        return {"ffn": np.zeros((len(layers), width), np.float32), "ffn_cut": cut}
    return {}


def _exits(hat, dense: Decisions, exits, start: int) -> Iterable[tuple[str, np.ndarray]]:
    depths, gates = [int(depth) for depth in hat.gates], list(hat.gates.values())
    places = dense.exit.copy()
    places[depths] = range(len(depths))
    yield "exit", places
    for name in ("scale", "shift"):
        yield name, _stack(getattr(gate, name) for gate in gates)
    for name in ("reduce", "expand"):
        yield name, _stack(getattr(gate, name).weight for gate in gates)
    weights = _stack(gate.gate.weight[1] - gate.gate.weight[0] for gate in gates)
    if isinstance(exits, ExitThresholds):
        biases = [gate.gate.bias[1] - gate.gate.bias[0] for gate in gates]
        yield "gate", weights
        yield "gate_cut", _stack(exits.thresholds[d] - bias for d, bias in zip(hat.gates, biases, strict=True))
    else:
        masks = [exits.masks.exits.get(depth) for depth in depths]
        leaves = [mask is not None and bool(mask[0, start]) for mask in masks]
        yield "gate", np.zeros_like(weights)
        yield "gate_cut", np.where(leaves, -1, 1).astype(np.float32)


def _stack(rows: Iterable[Tensor]) -> np.ndarray:
    return as_numpy(torch.stack([row.detach().float() for row in rows]))
