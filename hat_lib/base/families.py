"""Families: which models the method fits.

The decoder layer of a family has the `PARTS` of a Llama's and nothing else, but for what its attention may add: biases
(Qwen2), norms of queries and keys, by head (Qwen3), layers without rotary embedding (SmolLM3), a sliding window
(Mistral). All else in the library reads the layer and names no family. To add one, write its class into `FAMILIES`, a
tiny shape of it into `hat_lib.base.shapes`, and that into ``OTHERS`` of the tests.
"""

import inspect

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.mistral.modeling_mistral import MistralAttention

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM")
# The linear layers of a decoder layer, by the input that they share.
LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# What the forwards that are overridden take, of a decoder layer and of its parts.
FORWARDS = {
    "": "hidden_states attention_mask position_ids cache use_cache position_embeddings kwargs",
    "self_attn": "hidden_states position_embeddings attention_mask cache kwargs",
    "mlp": "x",
}
PARTS = {*(name for names in LINEARS.values() for name in names), *NORMS, "mlp.act_fn"}


def refusal(config: PreTrainedConfig) -> str | None:
    """Why a model of an unknown family is refused: which of its parts do not fit, or that nobody has tried it."""
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) in FAMILIES:
        return None
    known = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    why = misfit(model) or "its layers would fit, but it was never tried"
    return f"{type(model).__name__} is none of {known}: {why}"


def misfit(model: nn.Module) -> str | None:
    """What the decoder layers of a model have beside the `PARTS` that are overridden, or lack; None if they fit."""
    if not hasattr(getattr(model, "model", None), "layers"):
        return "it has no model.layers"
    for layer in model.model.layers:
        modules = {name for name, module in layer.named_modules() if name and not any(module.children())}
        more, less = sorted(modules - PARTS - set(HEAD_NORMS)), sorted(PARTS - modules)
        if more or less:
            parts = [f"{what} {', '.join(names[:3])}" for what, names in (("has", more), ("lacks", less)) if names]
            return f"{type(layer).__name__} {' and '.join(parts)}"
        for part, takes in FORWARDS.items():
            kind = type(layer.get_submodule(part))
            given = " ".join([*inspect.signature(kind.forward).parameters][1:])
            if given != takes:
                return f"{kind.__name__}.forward takes ({given}) in transformers {__version__}, expected ({takes})"
    return None


def head_norms(layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The norms of queries and keys, by head."""
    return (layer.self_attn.q_norm, layer.self_attn.k_norm) if hasattr(layer.self_attn, "q_norm") else None


def rotates(attention: nn.Module) -> bool:
    """Whether a layer's queries and keys get a rotary embedding."""
    return bool(getattr(attention, "use_rope", True))


def head_size(config: PreTrainedConfig) -> int:
    """Channels of a head; not all configs name them."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window(attention: nn.Module) -> int | None:
    """How many tokens back a layer's attention reaches; None for all."""
    holder = attention.config if isinstance(attention, MistralAttention) else attention
    return getattr(holder, "sliding_window", None)


def linears(lm: nn.Module) -> list[nn.Module]:
    """The linear layers of all decoder layers."""
    return [layer.get_submodule(name) for layer in lm.model.layers for names in LINEARS.values() for name in names]


def input_widths(lm_config: PreTrainedConfig) -> dict[str, int]:
    """Channels of each input of a decoder layer's linear layers, C, by the keys of `LINEARS`."""
    d, heads = lm_config.hidden_size, lm_config.num_attention_heads * head_size(lm_config)
    return {"qkv": d, "o": heads, "gate_up": d, "down": lm_config.intermediate_size}


def linear_work(lm_config: PreTrainedConfig) -> dict[str, int]:
    """Weights of one decoder layer of a Llama with this config, by the input that they share."""
    widths, kv = input_widths(lm_config), lm_config.num_key_value_heads * head_size(lm_config)
    outputs = {"qkv": widths["o"] + 2 * kv, "o": widths["qkv"], "gate_up": 2 * widths["down"], "down": widths["qkv"]}
    return {name: width * outputs[name] for name, width in widths.items()}
