"""Shapes with random weights and a byte tokenizer, for tests and timing: offline, in seconds.

- ``random:tiny``: a Llama of under 1 M parameters, weights large enough that logits and routing are far from uniform;
  ``random:tiny-qwen3`` and so on are of the other families.
- ``random:tinyllama``: the exact shape of TinyLlama-1.1B, for timing.

All are identical to the bit everywhere, and none touches the caller's random state.
"""

import math

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
N_BYTES = 256

TINY = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 260,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
SHAPES = {
    "random:tiny": TINY,
    "random:tiny-mistral": TINY | {"model_type": "mistral", "sliding_window": 9},
    "random:tiny-qwen2": TINY | {"model_type": "qwen2"},
    "random:tiny-qwen3": TINY | {"model_type": "qwen3", "head_dim": 128},  # as large as in every Qwen3
    "random:tiny-smollm3": TINY | {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "random:tinyllama": {
        "num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000,
        "num_attention_heads": 32, "num_key_value_heads": 4, "initializer_range": 0.02,
    },
}  # fmt: skip

# Values drawn once and reused cyclically: drawing 1.1 billion takes longer than all else. A prime, so that no two
# matrices of a model start at the same offset in it.
POOL = 16_777_213


def random_config(name: str) -> PreTrainedConfig:
    """The config behind one of `SHAPES`."""
    common = {
        "model_type": "llama", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attn_implementation": "sdpa",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
        "bos_token_id": N_BYTES, "eos_token_id": N_BYTES + 1, "pad_token_id": N_BYTES + 2,
    }  # fmt: skip
    return AutoConfig.for_model(**common | SHAPES[name])


def random_model(name: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A model on the CPU with weights N(0, initializer_range), biases too, and norm weights N(1, 0.1), in ``dtype``."""
    config = random_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    # RoPE's frequencies are a buffer that no checkpoint holds, and stay fp32 in every dtype.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    config.dtype = dtype

    n_params = sum(p.numel() for p in model.parameters())
    pool = _normal(min(n_params, POOL), seed)
    # Scaled in fp32 and rounded once, so that a name has the same fingerprint in every dtype.
    norms, matrices = (1 + 0.1 * pool).to(dtype), (config.initializer_range * pool).to(dtype)
    start = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rest, values = parameter.view(-1), norms if name.endswith("norm.weight") else matrices
            while len(rest):
                piece = values[start : start + len(rest)]
                rest[: len(piece)] = piece
                rest, start = rest[len(piece) :], (start + len(piece)) % len(pool)
    return model


def _normal(count: int, seed: int) -> torch.Tensor:
    """N(0, 1), fp32 ``[count]``, by the Box-Muller transform in fp64: differences between CPUs, on which `torch.randn`
    depends, are rounded away."""
    uniform = torch.rand(-(-count // 16), 2, 8, generator=torch.Generator().manual_seed(seed)).double()
    radius, angle = (-2 * torch.log1p(-uniform[:, 0])).sqrt(), 2 * math.pi * uniform[:, 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()[:count].float()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte (ids 0-255, by rank in the byte-level alphabet), then BOS, EOS and PAD, never added
    by itself."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([BOS, EOS, PAD])
    marks = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **marks)
