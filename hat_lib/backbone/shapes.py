"""Llama shapes with random weights and a byte tokenizer, for tests and timing: offline, in seconds.

`LINEARS` names the linear layers in any Llama's decoder layer.

``random:tiny``       under 1 M parameters, weights large enough that logits and routing are far from uniform.
``random:tinyllama``  the exact shape of TinyLlama-1.1B, for timing; with channels skipped, it is only near that
                      model's speed, which depends on which ones the next token keeps again.

Both are identical to the bit everywhere, and neither touches the caller's random state.
"""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
N_BYTES = 256

SHAPES = {
    "random:tiny": {
        "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 260,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    },
    "random:tinyllama": {
        "num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000,
        "num_attention_heads": 32, "num_key_value_heads": 4, "initializer_range": 0.02,
    },
}  # fmt: skip

LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""the linear layers of a decoder layer, by the input that they share"""

# Values drawn once and reused cyclically: drawing 1.1 billion takes longer than all else. A prime, so that no two
# matrices of a model start at the same offset in it.
POOL = 16_777_213


def linears(lm: LlamaForCausalLM) -> list[torch.nn.Module]:
    """The linear layers of all decoder layers."""
    return [layer.get_submodule(name) for layer in lm.model.layers for names in LINEARS.values() for name in names]


def random_config(name: str) -> LlamaConfig:
    """The config behind ``random:tiny`` or ``random:tinyllama``."""
    return LlamaConfig(
        **SHAPES[name],
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=N_BYTES,
        eos_token_id=N_BYTES + 1,
        pad_token_id=N_BYTES + 2,
        attn_implementation="sdpa",
    )


def random_model(name: str, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A Llama on the CPU with weights N(0, initializer_range) and norm weights N(1, 0.1), in ``dtype``."""
    config = random_config(name)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")
    # RoPE's frequencies are a buffer that no checkpoint holds, and stay fp32 in every dtype.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    config.dtype = dtype

    n_params = sum(p.numel() for p in model.parameters())
    pool = _normal(min(n_params, POOL), seed)
    # Scaled in fp32 and rounded once, so that a name has the same fingerprint in every dtype.
    norms, matrices = (1 + 0.1 * pool).to(dtype), (config.initializer_range * pool).to(dtype)
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            rest, values = parameter.view(-1), norms if parameter.ndim == 1 else matrices
            while len(rest):
                piece = values[start : start + len(rest)]
                rest[: len(piece)] = piece
                rest, start = rest[len(piece) :], (start + len(piece)) % len(pool)
    return model


def _normal(count: int, seed: int) -> torch.Tensor:
    """N(0, 1), fp32 ``[count]``, by the Box-Muller transform in fp64.

    `torch.randn` rounds differently on CPUs with other vector instructions. Here the uniform numbers are bits of an
    integer generator, and differences between the fp64 cosines of different libraries are rounded away.
    """
    uniform = torch.rand(-(-count // 16), 2, 8, generator=torch.Generator().manual_seed(seed)).double()
    radius, angle = (-2 * torch.log1p(-uniform[:, 0])).sqrt(), 2 * math.pi * uniform[:, 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()[:count].float()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte (ids 0-255, by rank in the byte-level alphabet), then BOS, EOS and PAD; adds no special
    tokens by itself. ``decode(encode(text)) == text`` for every text."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([BOS, EOS, PAD])
    marks = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **marks)
