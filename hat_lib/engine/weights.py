"""A base packed for the engine: each product's weights once more, transposed, so that a channel is a row.

``base``  the base's own numbers, float32 or bfloat16.
``int8``  eight bits, with one scale for each output, the largest magnitude of its row over 127.

The embedding is the base's own memory, and the head, too, as the base has it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from hat_lib.engine.step import Weights

MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The memory of a CPU tensor; bfloat16 as the bits, uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@torch.no_grad()
def pack(lm, form: str = "base") -> Weights:
    """The weights of a `LlamaForCausalLM` on the CPU, in float32 or bfloat16.

    Args:
        form: "base" or "int8".
    """
    layers, config, packed = lm.model.layers, lm.config, {}
    for name, linears in MATRICES.items():
        first = [layers[0].get_submodule(linear) for linear in linears]
        outputs, channels = sum(linear.out_features for linear in first), first[0].in_features
        dtype = torch.int8 if form == "int8" else first[0].weight.dtype
        weights = _room((len(layers), channels, outputs), dtype)
        scales = torch.empty(len(layers), outputs if form == "int8" else 0)
        biases = torch.zeros(len(layers), outputs if any(linear.bias is not None for linear in first) else 0)
        for i, layer in enumerate(layers):
            begin = 0
            for linear in (layer.get_submodule(name) for name in linears):
                part = slice(begin, begin + linear.out_features)
                begin = part.stop
                weight = linear.weight
                if form == "int8":
                    weight, scales[i, part] = _eight_bits(weight)
                weights[i, :, part] = weight.t()
                if linear.bias is not None:
                    biases[i, part] = linear.bias.float()
        packed |= {name: as_numpy(weights), f"{name}_scale": scales.numpy(), f"{name}_bias": biases.numpy()}
    head, head_scale = _eight_bits(lm.lm_head.weight) if form == "int8" else (lm.lm_head.weight, torch.zeros(0))
    norms = torch.stack([
        torch.stack([layer.get_submodule(norm).weight.float() for layer in layers])
        for norm in ("input_layernorm", "post_attention_layernorm")
    ])  # fmt: skip
    return Weights(
        embed=as_numpy(lm.model.embed_tokens.weight),
        head=as_numpy(head),
        head_scale=head_scale.numpy(),
        **packed,
        norms=norms.numpy(),
        last_norm=lm.model.norm.weight.float().numpy(),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        eps=np.float32(config.rms_norm_eps),
    )


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory from numpy, which asks the system for huge pages: a gather touches many."""
    memory = np.empty(shape, {1: np.int8, 2: np.uint16, 4: np.float32}[dtype.itemsize])
    return torch.from_numpy(memory).view(dtype)


def _eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[out, C]``, and float32 scales ``[out]``. Some rows at a time: a head in float32 may be gigabytes."""
    eight, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    for part, to, scale in zip(weight.split(1024), eight.split(1024), scales.split(1024), strict=True):
        scale.copy_(part.abs().amax(1)).clamp_(min=1e-30).div_(127)
        to.copy_((part / scale[:, None]).round_())
    return eight, scales


def packed_bytes(weights: Weights) -> int:
    """Memory beyond the base's own."""
    own = {id(a): a for a in weights if isinstance(a, np.ndarray)}
    del own[id(weights.embed)]
    if not len(weights.head_scale):
        own.pop(id(weights.head), None)
    return sum(a.nbytes for a in own.values())


def linears(lm) -> list[nn.Module]:
    """The modules that are packed."""
    return [layer.get_submodule(name) for layer in lm.model.layers for names in MATRICES.values() for name in names]
