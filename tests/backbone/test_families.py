"""Families other than Llama: loaded like one, or refused with the part that does not fit."""

import re

import pytest
import torch
from gguf_file import write_gguf
from tiny_runs import OTHERS, tiny
from transformers import AutoConfig

from hat_lib.backbone.base import config_of, fingerprint, load_base
from hat_lib.backbone.families import misfit, refusal, window
from hat_lib.backbone.shapes import byte_tokenizer
from hat_lib.config import HatError

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


SAVED = [*((name, "folder") for name in OTHERS), ("random:tiny", "tied"), *((name, "gguf") for name in OTHERS[1:3])]


@pytest.mark.parametrize(("name", "form"), SAVED)
def test_saved_and_loaded(name, form, tmp_path):
    base, ids, path = tiny(name=name), torch.arange(24).view(2, 12), tmp_path / f"saved.{form}"
    if form == "tied":
        base.model.config.tie_word_embeddings = True
        base.model.tie_weights()
    write_gguf(base, path) if form == "gguf" else save(base.model, path)
    loaded = load_base(path, dtype="fp32", device="cpu")
    assert form == "gguf" or loaded.fingerprint == fingerprint(base.model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, base.model(ids).logits, rtol=0, atol=1e-5)


def test_what_a_familys_attention_adds_is_part_of_the_fingerprint(tmp_path):
    base = tiny(name="random:tiny-mistral")
    assert {window(layer.self_attn) for layer in base.model.model.layers} == {9}
    base.model.config.sliding_window = None
    save(base.model, tmp_path)
    assert load_base(tmp_path, dtype="fp32", device="cpu").fingerprint != base.fingerprint


def test_a_forward_that_takes_something_else_is_refused(monkeypatch):
    lm = tiny().model
    assert misfit(lm) is None
    monkeypatch.setattr(type(lm.model.layers[0].mlp), "forward", lambda self, x, scale: x)
    assert misfit(lm).endswith("expected (x)") and "LlamaMLP.forward takes (x scale)" in misfit(lm)


@pytest.mark.parametrize(
    ("model_type", "part"),
    [
        ("gemma2", "Gemma2DecoderLayer has post_feedforward_layernorm, pre_feedforward_layernorm"),
        ("phi3", "Phi3DecoderLayer has mlp.activation_fn, mlp.gate_up_proj"),
        ("mixtral", "lacks mlp.act_fn, mlp.down_proj, mlp.gate_proj"),
        ("gpt2", "it has no model.layers"),
        ("granite", "it was never tried"),
    ],
)
def test_others_are_refused_by_the_part_that_does_not_fit(model_type, part, tmp_path):
    config = AutoConfig.for_model(model_type, **SMALL)
    assert part in refusal(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(HatError, match=re.escape(part)):
        config_of(str(tmp_path))
    with pytest.raises(HatError, match=f"cannot load .*{type(config).__name__.removesuffix('Config')}"):
        load_base(tmp_path)


def test_a_model_that_is_no_causal_lm(tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    for read in (config_of, load_base):
        with pytest.raises(HatError, match="cannot"):
            read(str(tmp_path))
