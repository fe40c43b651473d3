"""A GGUF file of a small model."""

import gguf


def write_gguf(base, path):
    """Write the model as an fp32 GGUF file in llama.cpp's layout (a Llama's RoPE pairs neighbouring rows there)."""
    config, tokenizer = base.model.config, base.tokenizer
    kind = config.model_type
    writer = gguf.GGUFWriter(path, kind)
    fields = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "rope_freq_base": config.rope_parameters["rope_theta"], "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size, "tokenizer_model": "gpt2", "token_merges": ["a b"],
        "token_list": [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab"],
        "token_types": [1] * 256 + [3] * 3 + [1], "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    }  # fmt: skip
    if hasattr(config, "head_dim"):
        fields |= {"key_length": config.head_dim, "value_length": config.head_dim}
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for name, weight in base.model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and kind == "llama":
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
