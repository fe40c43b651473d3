"""Weights in four bits, read back independently of the engine."""

import numpy as np
import torch

from hat_lib.base.families import LINEARS
from hat_lib.engine.weights import _four_bits, pack


def four_bits(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``weight [out, C]`` in four bits, as `unpacked` takes it."""
    packed = torch.empty(weight.shape[1] // 32 * 38, len(weight) // 2, dtype=torch.uint8)
    scale = _four_bits(weight, packed)
    return packed.numpy(), scale.numpy()


def unpacked(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 ``[C, out]`` of uint8 ``[C / 32 * 38, out / 2]`` and float32 ``[out]``."""
    groups, outputs = w.reshape(-1, 38, w.shape[1]), len(scale)
    q = np.empty((len(groups), 32, outputs), np.float32)
    q[..., places(outputs)] = np.stack([groups[:, :32] & 15, groups[:, :32] >> 4], 3)
    d = groups[:, 32:34].reshape(-1, 1, outputs).astype(np.float32)
    m = groups[:, 34:].reshape(len(groups), -1).view(np.int16).reshape(-1, 1, outputs).astype(np.float32)
    return (scale * (d * (q - 8) + 4 * m)).reshape(-1, outputs)


def places(outputs: int) -> np.ndarray:
    """The outputs of each byte's halves, ``[out / 2, 2]``, worked out one by one."""
    found, tile = np.empty((outputs // 2, 2), int), 0
    while tile < outputs:
        size = next(n for n in (128, 64, 32) if n <= outputs - tile)
        for i in range(size // 2):
            sixteen, four, byte = i // 16, i % 16 // 4, i % 4
            first = tile + four * size // 4 + 4 * sixteen + byte
            found[tile // 2 + i] = first, first + size // 8
        tile += size
    return found


@torch.no_grad()
def packed_and_read(lm):
    """The packed matrices ``(name, layer, the base's weights, q4's weights)``, float32 ``[out, C]``."""
    weights = pack(lm, "q4")
    for name, linears in LINEARS.items():
        for i, layer in enumerate(lm.model.layers):
            own = torch.cat([layer.get_submodule(linear).weight for linear in linears]).float()
            product = getattr(weights, name)
            read = torch.from_numpy(unpacked(product.weight[i], product.scale[i])).T
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
