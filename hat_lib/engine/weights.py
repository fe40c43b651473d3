"""A base packed for the engine: each product's weights once more, transposed so that a channel is a row; beside them
routers, gates and corrections.

- ``base``: the base's own numbers, float32 or bfloat16.
- ``int8``: eight bits, -127..127, with one scale per output, the largest magnitude of its row over 127.
- ``q4``: four bits, ``D (d (q - 8) + 4 m)``: q in 0..15; d in eight bits and m in sixteen for each output and 32
  channels, and D in float32 for each output. For a base that was in Q4_1 before, its own blocks.

In ``int8`` and ``q4`` the head has eight bits, with a scale for each output and 32 channels: for a head that was in
Q8_0 before, its own. Its preview has four bits. Outputs are in `hat_lib.engine.integers.tile_order`. Of four bits there
are 38 rows for 32 channels: their own, and in the space of six more d of all outputs, then m.

The embedding is the base's own memory, and so is the head in the form ``base``.
"""

from collections.abc import Mapping, Sequence
from math import gcd, prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hat_lib.base.families import LINEARS, NORMS, head_norms, rotates
from hat_lib.engine.arrays import GROUP, GROUP_ROWS, MIDDLE, OFFSET, TILE, Gates, Linear, StandIn, Weights
from hat_lib.engine.integers import tile_order


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
    for names in () if form == "base" else LINEARS.values():
        for name in names:
            linear = lm.model.layers[0].get_submodule(name)
            for what, width in (("inputs", linear.in_features), ("outputs", linear.out_features)):
                if width % GROUP:
                    return f"{form} needs widths that are multiples of {GROUP}, and {name} has {width} {what}"
    return None


def packed_bytes(weights: Weights) -> int:
    """Bytes of memory beyond the base's own, without those of routers and gates."""
    products = weights.qkv, weights.o, weights.gate_up, weights.down
    own = [array for p in products for array in (p.weight, p.scale, p.bias, p.reduce, p.expand)]
    own += [weights.preview, weights.preview_scale, weights.norms, weights.last_norm, weights.head_norms]
    own += [weights.head, weights.head_scale] if weights.head_scale.size else []
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
        form: "base", "int8" or "q4"; ValueError if the base is `unfit`, or if it has a weight that this cannot hold.
        routers, corrections: by "{layer}_{site}"; None for none.
        gates: by depth.
        head_norm: of the head's columns, fp32 ``[D]``, for a shortlist: the head is then packed once more, transposed.
    """
    if why := unfit(lm, form):
        raise ValueError(why)
    config, layers, block = lm.config, lm.model.layers, gcd(lm.config.intermediate_size, 32)
    routers, gates, corrections = routers or {}, gates or {}, corrections or {}
    products = {name: _product(lm, name, form, routers, corrections, block) for name in LINEARS}
    head, head_scale, preview, preview_scale = _head(lm.lm_head.weight, form, head_norm is not None)
    norms = [torch.stack([layer.get_submodule(norm).weight.float() for layer in layers]) for norm in NORMS]
    of_heads = [[norm.weight.float() for norm in head_norms(layer) or ()] for layer in layers]
    of_heads = [torch.stack(pair) if pair else torch.zeros(2, 0) for pair in of_heads]
    return Weights(
        embed=as_numpy(lm.model.embed_tokens.weight),
        head=as_numpy(head),
        head_scale=as_numpy(head_scale),
        head_unit=(torch.zeros(0) if head_norm is None else 1 / head_norm).numpy(),
        preview=as_numpy(preview),
        preview_scale=as_numpy(preview_scale),
        **products,
        sensitivity=_token_routers(routers, "token", len(layers)),
        ffn=_token_routers(routers, "ffn", len(layers)),
        stand_in=_stand_in(corrections, len(layers), config.hidden_size),
        gates=_gates(gates, len(layers), config.hidden_size),
        norms=torch.stack(norms).numpy(),
        last_norm=lm.model.norm.weight.float().numpy(),
        head_norms=torch.stack(of_heads, 1).numpy(),
        rotates=np.array([rotates(layer.self_attn) for layer in layers]),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        block=block,
        eps=np.float32(config.rms_norm_eps),
    )


def _token_routers(routers: Mapping[str, nn.Module], site: str, layers: int) -> np.ndarray:
    """Weights and bias ``[L, D + 1]`` of routers that score whole tokens; no columns if there are none, or all tokens
    are alike in their sensitivity."""
    found = [routers[name] for i in range(layers) if (name := f"{i}_{site}") in routers]
    rows = _stacked([torch.cat([router.weight.view(-1), router.bias.view(1)]) for router in found], 0)
    return rows if rows.any() or site == "ffn" and found else np.zeros((layers, 0), np.float32)


def _gates(gates: Mapping[str, nn.Module], layers: int, d: int) -> Gates:
    before, found = np.full(layers, -1), list(gates.values())
    before[[int(depth) for depth in gates]] = range(len(gates))
    both = [torch.cat([gate.gate.weight, gate.gate.bias[:, None]], 1) for gate in found]  # of staying and of leaving
    return Gates(
        before,
        _stacked([leave - stay for stay, leave in both], d + 1),
        _stacked([gate.scale for gate in found], d),
        _stacked([gate.shift for gate in found], d),
        _stacked([gate.reduce.weight for gate in found], 0, d),
        _stacked([gate.expand.weight for gate in found], d, 0),
    )


def _stand_in(corrections: Mapping[str, nn.Module], layers: int, d: int) -> StandIn:
    found = [corrections[name] for i in range(1, layers) if (name := f"{i}_ffn") in corrections]
    return StandIn(
        _stacked([c.down for c in found], 0, d),
        _stacked([c.up for c in found], d, 0),
        _stacked([c.shift for c in found], d),
    )


def _stacked(rows: Sequence[Tensor], *shape: int) -> np.ndarray:
    """One row after the other; ``shape`` is that of each, for none."""
    return as_numpy(torch.stack([row.float() for row in rows])) if rows else np.zeros((0, *shape), np.float32)


def _product(lm, name: str, form: str, routers, corrections, block: int) -> Linear:
    """One of `LINEARS`, of all layers."""
    layers = [[layer.get_submodule(linear) for linear in LINEARS[name]] for layer in lm.model.layers]
    channels, outputs = layers[0][0].in_features, sum(linear.out_features for linear in layers[0])
    biased, corrected = any(m.bias is not None for m in layers[0]), f"0_{name}" in corrections
    stored = lm.dtype if form == "base" else torch.bfloat16  # of corrections: beside fewer bits four bytes would weigh
    rank = len(corrections[f"0_{name}"].down) if corrected else 0
    dtype, shape = {
        "base": (lm.dtype, (channels, _spread(outputs, lm.dtype))),
        "int8": (torch.int8, (channels, outputs)),
        "q4": (torch.uint8, (channels // GROUP * GROUP_ROWS, outputs // 2)),
    }[form]
    packed = Linear(
        weight=_memory((len(layers), *shape), dtype),
        scale=torch.empty(len(layers), 0 if form == "base" else outputs),
        bias=torch.empty(len(layers), outputs if biased else 0),
        unit=torch.zeros(len(layers), channels),
        reduce=torch.empty(len(layers), rank, channels, dtype=stored),
        expand=torch.empty(len(layers), rank + 1 if corrected else 0, outputs, dtype=stored),
        split=TILE // 2 if name == "down" else 1 if form == "base" else GROUP,
    )

    def arranged(rows: Tensor) -> Tensor:
        return _alternating(rows, block) if name == "gate_up" else rows

    for i, linears in enumerate(layers):
        rows = arranged(torch.cat([linear.weight for linear in linears]))
        if biased:
            biases = [torch.zeros(m.out_features) if m.bias is None else m.bias for m in linears]
            packed.bias[i] = arranged(torch.cat(biases))
        if f"{i}_{name}" in routers:
            packed.unit[i] = routers[f"{i}_{name}"].channel_thresholds(1.0)
        if corrected:
            correction = corrections[f"{i}_{name}"]
            packed.reduce[i] = correction.down
            packed.expand[i] = arranged(torch.cat([correction.up, correction.shift[:, None]], 1)).t()
        if form == "base":
            packed.weight[i, :, :outputs] = rows.t()
        else:
            packed.scale[i] = (_four_bits if form == "q4" else _eight_bits)(rows, packed.weight[i])
            if (bad := ~packed.scale[i].isfinite()).any():
                names = [f"layer {i}, {n.split('.')[-1]}, row {r}" for n, m in zip(LINEARS[name], linears, strict=True)
                         for r in range(m.out_features)]  # fmt: skip
                at = int(bad.nonzero()[0])
                raise _unkept(names[int(arranged(torch.arange(outputs))[at])], rows[at], form)
    return Linear(*map(as_numpy, packed[:-1]), packed.split)


def _unkept(where: str, row: Tensor, form: str, limits: str = "") -> ValueError:
    """The error of a row with a weight that a form has no scale for."""
    value = row[row.abs().argmax()]  # NaN, if there is one
    return ValueError(f"{where}: {value:g} cannot be kept in {form} ({limits or 'its row needs a finite scale'})")


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


def _head(weight: Tensor, form: str, previewed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The head ``[V, D]`` and its scales ``[V, D / 32]``, and its columns for a preview and their scales ``[V]``."""
    outputs, channels = weight.shape
    if form == "base":
        columns = _memory((channels, _spread(outputs, weight.dtype) if previewed else 0), weight.dtype)
        columns[:, :outputs] = weight.t()[:, : columns.shape[1]]
        return weight, torch.zeros(outputs, 0, dtype=torch.int16), columns, torch.zeros(0)
    head, scale = _memory(weight.shape, torch.int8), _memory((outputs, channels // GROUP), torch.half)
    for part, to, factor in zip(weight.split(4096), head.split(4096), scale.split(4096), strict=True):
        groups = part.float().unflatten(1, (-1, GROUP))
        exact = (groups.abs().amax(2) / 127).clamp_(min=2.0**-24)
        # Tiny ones are rounded up: float16 has few bits for them, and the group's largest weights would be cut off.
        factor.copy_(exact.where(~(exact < 2.0**-17), (exact * 2**24).ceil_() / 2**24))
        to.copy_((groups / factor.float()[..., None]).round_().clamp_(-127, 127).flatten(1))
    if (bad := ~scale.isfinite().all(1)).any():
        at = int(bad.nonzero()[0])
        raise _unkept(f"the head, row {at}", weight[at], form, "those of the head must be below 8e6")
    if scale.max() == 2.0**-24 and weight.any():  # coarser than eight bits even for the largest
        at = int(weight.abs().amax(1).argmax())
        raise _unkept(f"the head, row {at}", weight[at], form, "the head's largest must be above 8e-6")
    padded = F.pad(weight, (0, 0, 0, -outputs % TILE)) if previewed else weight[:0]
    columns = _memory((channels // GROUP * GROUP_ROWS, len(padded) // 2), torch.uint8)
    return head, scale.view(torch.int16), columns, _four_bits(padded, columns) if previewed else torch.zeros(0)


def _eight_bits(weight: Tensor, packed: Tensor) -> Tensor:
    """Write ``weight [out, C]`` to ``packed [C, out]``; returns float32 ``[out]``."""
    scale = weight.float().abs().amax(1).clamp_(min=1e-30).div_(127)
    rows = (weight / scale[:, None]).round_().to(torch.int8).t()
    packed.copy_(rows[:, torch.from_numpy(tile_order(len(weight), 8)[:, 0])])
    return scale


def _four_bits(weight: Tensor, packed: Tensor) -> Tensor:
    """Write ``weight [out, C]`` to ``packed [C / 32 * 38, out / 2]``; returns float32 ``[out]``."""
    outputs, n = len(weight), weight.shape[1] // GROUP
    groups, packed = weight.view(outputs, n, GROUP), packed.view(n, GROUP_ROWS, -1)
    low, high = groups.amin(2).float(), groups.amax(2).float()
    d = (high - low) / 15
    m = (low + MIDDLE * d) / 2**OFFSET
    scale = torch.maximum(d.amax(1) / 255, m.abs().amax(1) / 32767).clamp_(min=1e-30)
    orders = torch.from_numpy(tile_order(outputs, 4)).t()
    for i in range(n):  # one by one: a head may be gigabytes
        q = (groups[:, i].float() - low[:, i, None]).div_(d[:, i, None].clamp(min=1e-30)).round_().clamp_(0, 15)
        lower, upper = (q.to(torch.uint8).t()[:, order] for order in orders)
        packed[i, :GROUP] = lower | upper << 4
    eight, sixteen = (part.div(scale[:, None]).round_().t() for part in (d, m))
    packed[:, GROUP : GROUP + 2] = eight.to(torch.uint8).view(n, 2, -1)
    packed[:, GROUP + 2 :] = sixteen.to(torch.int16).contiguous().view(torch.uint8).view(n, 4, -1)
    return scale
