"""Weights in four bits, read back independently of the engine."""

import numpy as np
import torch

from hat_lib.backbone.shapes import LINEARS
from hat_lib.engine.weights import pack


def unpacked(w: np.ndarray) -> np.ndarray:
    """float32 ``[C, out]`` of uint8 ``[C / 32 * 40, out / 2]``."""
    groups, outputs = w.reshape(-1, 40, w.shape[1]), 2 * w.shape[1]
    words = groups[:, :32].copy().view(np.uint16).reshape(len(groups), 32, -1, 8)
    q = np.stack([words >> 4 * nibble & 15 for nibble in range(4)], 3).reshape(len(groups), 32, outputs)
    scales = groups[:, 32:].copy().view(np.float16).reshape(len(groups), 2, 1, outputs).astype(np.float32)
    return (scales[:, 0] * q + scales[:, 1]).reshape(-1, outputs)


@torch.no_grad()
def packed_and_read(lm):
    """The packed matrices ``(name, layer, the base's weights, q4's weights)``, float32 ``[out, C]``."""
    weights = pack(lm, "q4")
    for name, linears in LINEARS.items():
        for i, layer in enumerate(lm.model.layers):
            own = torch.cat([layer.get_submodule(linear).weight for linear in linears]).float()
            read = torch.from_numpy(unpacked(getattr(weights, name).weight[i])).T
            if name == "gate_up":  # gates and ups are in alternating blocks
                read = torch.cat([*read.unflatten(0, (-1, 2, weights.block)).transpose(0, 1).flatten(1, 2)])
            yield name, i, own, read


@torch.no_grad()
def round_weights(lm) -> None:
    """Replace a base's packed matrices with their values in q4."""
    for name, i, _, read in packed_and_read(lm):
        modules = [lm.model.layers[i].get_submodule(linear) for linear in LINEARS[name]]
        for linear, part in zip(modules, read.split([m.out_features for m in modules]), strict=True):
            linear.weight.copy_(part)
