"""Weights in four bits, read back independently of the engine."""

import numpy as np
import torch

from hat_lib.base.families import LINEARS
from hat_lib.engine.weights import _four_bits, pack


def four_bits(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``weight [out, C]`` in four bits, as `unpacked` takes it."""
    packed = torch.empty(weight.shape[1] // 32 * 36, len(weight) // 2, dtype=torch.uint8)
    scale = _four_bits(weight, packed)
    return packed.numpy(), scale.numpy()


def unpacked(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 ``[C, out]`` of uint8 ``[C / 32 * 36, out / 2 or more]`` and float32 ``[out]``."""
    groups, outputs = w.reshape(-1, 36, w.shape[1]), len(scale)
    eight = groups[:, :32, : outputs // 2].reshape(len(groups), 32, -1, 8)
    q = np.stack([eight & 15, eight >> 4], 3).reshape(len(groups), 32, outputs).astype(np.float32)
    pairs = groups[:, 32:].reshape(len(groups), -1)[:, : 2 * outputs].view(np.int8).reshape(len(groups), 1, outputs, 2)
    return (scale * (pairs[..., 0] * (q - 8) + np.float32(4) * pairs[..., 1])).reshape(-1, outputs)


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
