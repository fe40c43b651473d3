"""A base packed for the engine: each product's weights once more, transposed so that a channel is a row; beside them
routers, gates and corrections.

``base``  the base's own numbers, float32 or bfloat16.
``int8``  eight bits, with one scale per output, the largest magnitude of its row over 127.
``q4``    four bits, with a scale and an offset per output and 32 channels, and the head in eight: for a base that was
          in Q4_1 before, its own blocks, their scales rounded to eight bits. Widths must be multiples of 32.

The embedding is the base's own memory, and so is the head in the form ``base``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd, prod

import numpy as np
import torch
from torch import Tensor, nn

from hat_lib.base.families import LINEARS, NORMS, head_norms, head_size, rotates
from hat_lib.engine.arrays import Gates, Linear, StandIn, Weights
from hat_lib.engine.four_bits import GROUP, GROUP_ROWS, MIDDLE, OFFSET


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The memory of a CPU tensor; bfloat16 as its bits, uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def widths(lm) -> tuple[list[int], list[int]]:
    """Inputs and outputs of each of `LINEARS`."""
    modules = [[lm.model.layers[0].get_submodule(linear) for linear in linears] for linears in LINEARS.values()]
    return [m[0].in_features for m in modules], [sum(linear.out_features for linear in m) for m in modules]


def unfit(lm, form: str) -> str | None:
    """Why this base cannot be packed in a form; None if it can."""
    for names in LINEARS.values() if form == "q4" else ():
        for name in names:
            linear = lm.model.layers[0].get_submodule(name)
            for what, width in (("inputs", linear.in_features), ("outputs", linear.out_features)):
                if width % GROUP:
                    return f"{form} needs widths that are multiples of {GROUP}, and {name} has {width} {what}"
    return None


def packed_bytes(weights: Weights) -> int:
    """Bytes of memory beyond the base's own."""
    products = [linear[:3] + linear[-2:] for linear in (weights.qkv, weights.o, weights.gate_up, weights.down)]
    own = [
        *sum(products, ()),
        weights.preview,
        weights.norms,
        weights.last_norm,
        weights.head_norms,
        weights.head_scale,
    ]
    if len(weights.head_scale):
        own.append(weights.head)
    return sum(array.nbytes for array in own)


@torch.no_grad()
def pack(
    lm,
    form: str = "base",
    *,
    routers: Mapping[str, nn.Module] | None = None,
    gates: Mapping[str, nn.Module] | None = None,
    corrections: Mapping[str, nn.Module] | None = None,
    head_norm: Tensor | None = None,
) -> Weights:
    """The weights of a `LlamaForCausalLM` on the CPU, in float32 or bfloat16, with those of a model on it.

    Args:
        form: "base", "int8" or "q4"; ValueError if the base is `unfit`.
        routers, corrections: by "{layer}_{site}"; None for none.
        gates: by depth.
        head_norm: of the head's columns, fp32 ``[D]``, for a shortlist: the head is then packed once more, transposed.
    """
    if why := unfit(lm, form):
        raise ValueError(why)
    config, routers = lm.config, routers or {}
    layers, half, block = lm.model.layers, head_size(config) // 2, gcd(config.intermediate_size, 32)
    products = {name: _product(lm, name, form, routers, corrections or {}, block) for name in LINEARS}
    head, head_scale = (lm.lm_head.weight, torch.zeros(0)) if form == "base" else _eight_bits(lm.lm_head.weight)
    columns = _memory((head.shape[1], 0 if head_norm is None else _spread(len(head), head.dtype)), head.dtype)
    columns[:, : len(head)] = head[: columns.shape[1]].t()
    norms = [torch.stack([layer.get_submodule(norm).weight.float() for layer in layers]) for norm in NORMS]
    of_heads = [[norm.weight.float() for norm in head_norms(layer) or ()] for layer in layers]
    of_heads = [torch.stack(pair) if pair else torch.zeros(2, 0) for pair in of_heads]
    sensitivity, sensitivity_bias = _token_routers(routers, "token", len(layers))
    ffn, ffn_bias = _token_routers(routers, "ffn", len(layers))
    return Weights(
        embed=as_numpy(lm.model.embed_tokens.weight),
        head=as_numpy(head),
        head_scale=head_scale.numpy(),
        head_unit=(torch.zeros(0) if head_norm is None else 1 / head_norm).numpy(),
        preview=as_numpy(columns),
        **products,
        sensitivity=sensitivity,
        sensitivity_bias=sensitivity_bias,
        ffn=ffn,
        ffn_bias=ffn_bias,
        stand_in=_stand_in(corrections or {}, len(layers), config.hidden_size),
        gates=_gates(gates or {}, len(layers), config.hidden_size),
        norms=torch.stack(norms).numpy(),
        last_norm=lm.model.norm.weight.float().numpy(),
        head_norms=torch.stack(of_heads, 1).numpy(),
        rotates=np.array([rotates(layer.self_attn) for layer in layers]),
        unrotated=np.stack([np.ones(half, np.float32), np.zeros(half, np.float32)]),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        block=block,
        eps=np.float32(config.rms_norm_eps),
    )


def _token_routers(routers: Mapping[str, nn.Module], site: str, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``[L, D]`` and biases ``[L]`` of routers that score whole tokens; no columns if there are none, or all
    tokens are alike in their sensitivity."""
    found = [routers[name] for i in range(layers) if (name := f"{i}_{site}") in routers]
    if not found or site == "token" and not any(router.weight.any() or router.bias.any() for router in found):
        return np.zeros((layers, 0), np.float32), np.zeros(layers, np.float32)
    return _stacked(router.weight for router in found), _stacked(router.bias for router in found)


def _gates(gates: Mapping[str, nn.Module], layers: int, d: int) -> Gates:
    before, found = np.full(layers, -1), list(gates.values())
    before[[int(depth) for depth in gates]] = range(len(gates))
    if not found:
        none, rank = np.zeros((0, d), np.float32), np.zeros((0, 0, d), np.float32)
        return Gates(before, none, none[:, 0].copy(), none, none, rank, rank.swapaxes(1, 2).copy())
    return Gates(
        before,
        _stacked(gate.gate.weight[1] - gate.gate.weight[0] for gate in found),
        _stacked(gate.gate.bias[1] - gate.gate.bias[0] for gate in found),
        _stacked(gate.scale for gate in found),
        _stacked(gate.shift for gate in found),
        _stacked(gate.reduce.weight for gate in found),
        _stacked(gate.expand.weight for gate in found),
    )


def _stand_in(corrections: Mapping[str, nn.Module], layers: int, d: int) -> StandIn:
    """Of whole FFNs, but for layer 0's, which always runs."""
    found = [corrections[name] for i in range(1, layers) if (name := f"{i}_ffn") in corrections]
    if not found:
        return StandIn(*(np.zeros(shape, np.float32) for shape in ((0, 0, d), (0, d, 0), (0, d))))
    parts = [c.down for c in found], [c.up for c in found], [c.shift for c in found]
    return StandIn(*(_stacked([torch.zeros_like(rows[0]), *rows]) for rows in parts))


def _stacked(rows: Iterable[Tensor]) -> np.ndarray:
    return as_numpy(torch.stack([row.detach().float() for row in rows]))


def _product(lm, name: str, form: str, routers, corrections, block: int) -> Linear:
    """One of `LINEARS`, of all layers."""
    layers = [[layer.get_submodule(linear) for linear in LINEARS[name]] for layer in lm.model.layers]
    channels, outputs = layers[0][0].in_features, sum(linear.out_features for linear in layers[0])
    biased = any(linear.bias is not None for linear in layers[0])
    dtype, shape = {
        "base": (lm.dtype, (channels, _spread(outputs, lm.dtype))),
        "int8": (torch.int8, (channels, _spread(outputs, torch.int8))),
        "q4": (torch.uint8, (channels // GROUP * GROUP_ROWS, _spread(outputs // 2, torch.uint8))),
    }[form]
    weights = _memory((len(layers), *shape), dtype)
    scales = torch.empty(len(layers), 0 if form == "base" else outputs)
    biases = torch.zeros(len(layers), outputs if biased else 0)
    corrected, unit = f"0_{name}" in corrections, torch.zeros(len(layers), channels)
    rank = corrections[f"0_{name}"].down.shape[0] if corrected else 0
    stored = lm.dtype if form == "base" else torch.bfloat16  # beside fewer bits four bytes would weigh
    reduce = torch.empty(len(layers), rank, channels, dtype=stored)
    expand = torch.empty(len(layers), rank + 1 if corrected else 0, outputs, dtype=stored)
    for i, linears in enumerate(layers):
        rows = torch.cat([linear.weight for linear in linears])
        if biased:
            biases[i] = torch.cat([torch.zeros(m.out_features) if m.bias is None else m.bias for m in linears])
        if f"{i}_{name}" in routers:
            unit[i] = routers[f"{i}_{name}"].channel_thresholds(1.0)
        if corrected:
            correction = corrections[f"{i}_{name}"]
            reduce[i], expand[i] = correction.down, torch.cat([correction.up.t(), correction.shift[None]])
        if name == "gate_up":
            rows, expand[i] = _alternating(rows, block), _alternating(expand[i].t(), block).t()
            if biased:
                biases[i] = _alternating(biases[i], block)
        if form == "q4":
            scales[i] = _four_bits(rows, weights[i])
            continue
        if form == "int8":
            rows, scales[i] = _eight_bits(rows)
        weights[i, :, :outputs] = rows.t()
    split = block if name == "down" else GROUP if form == "q4" else 1
    parts = as_numpy(weights), scales.numpy(), biases.numpy(), unit.numpy(), split, as_numpy(reduce), as_numpy(expand)
    return Linear(*parts)


def _memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, from numpy, which asks the system for huge pages: sparse reads touch many pages. It begins
    with a cache line, so that rows do not straddle one more."""
    size = prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.empty(size + 64, np.uint8))
    return memory[-memory.data_ptr() % 64 :][:size].view(dtype).view(shape)


def _spread(outputs: int, dtype: torch.dtype) -> int:
    """Columns of memory for a row. A cache keeps few lines whose addresses are a multiple of 4 KiB apart, so eight rows
    that are added together must not begin at such a distance."""
    line = 64 // dtype.itemsize
    return outputs + line if outputs % (8 * line) == 0 else outputs


def _alternating(outputs: Tensor, block: int) -> Tensor:
    """Gates and ups ``[2F, ...]`` in alternating blocks: a thread then reads one long piece of a row, not two."""
    return outputs.unflatten(0, (2, -1, block)).transpose(0, 1).flatten(0, 2)


def _eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[out, C]``, and float32 scales ``[out]``. Some rows at a time: a head in float32 may be gigabytes."""
    eight, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    for part, to, scale in zip(weight.split(1024), eight.split(1024), scales.split(1024), strict=True):
        scale.copy_(part.abs().amax(1)).clamp_(min=1e-30).div_(127)
        to.copy_((part / scale[:, None]).round_())
    return eight, scales


def _four_bits(weight: Tensor, packed: Tensor) -> Tensor:
    """Write ``weight [out, C]`` to ``packed``, in the form of `hat_lib.engine.four_bits`; returns float32 ``[out]``."""
    outputs, n = len(weight), weight.shape[1] // GROUP
    groups = weight.float().view(outputs, n, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    d = (high - low) / 15
    q = ((groups - low[..., None]) / d.clamp(min=1e-30)[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    m = low + MIDDLE * d
    scale = torch.maximum(d.amax(1), m.abs().amax(1) / OFFSET).clamp_(min=1e-30) / 127
    pairs = torch.stack([d, m / OFFSET], 2).div_(scale[:, None, None]).round_().to(torch.int8)
    packed = packed.view(n, GROUP_ROWS, -1)
    lower, upper = q.permute(1, 2, 0).reshape(n, GROUP, outputs // 16, 2, 8).unbind(3)
    packed[:, :GROUP, : outputs // 2] = (lower | upper << 4).flatten(2)
    packed[:, GROUP:].flatten(1)[:, : 2 * outputs] = pairs.transpose(0, 1).flatten(1).view(torch.uint8)
    return scale
