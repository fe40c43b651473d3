"""The files of a base are not trusted: what would have transformers open a pickle, or a file elsewhere, is refused."""

import json
from unittest.mock import Mock

import pytest
import torch
from gguf_file import write_gguf
from soak import bases

from hat_lib.base.load import load_base, tokenizer_of
from hat_lib.base.shapes import byte_tokenizer
from hat_lib.config import HatError

pytestmark = pytest.mark.usefixtures("no_grad")
INDEX, COMMIT = "model.safetensors.index.json", "0" * 40
HOSTILE = [(INDEX, {"weight_map": {"lm_head.weight": name}}) for name in ("x.bin", "../outside.safetensors")]
HOSTILE += [("adapter_config.json", {}), ("config.json", {"transformers_weights": "../outside.safetensors"})]
HOSTILE += [("tokenizer_config.json", {"tokenizer_class": name}) for name in ("LlamaForCausalLM", "pipeline")]


@pytest.fixture(params=["folder", "hub"])
def place(request, tiny_base, tmp_path, monkeypatch):
    """A base in shards, and what names it: its folder, or an id in the Hub's cache, whose snapshots are links."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--tiny"
    tiny_base.model.save_pretrained(repo / "blobs", max_shard_size="400KB")
    byte_tokenizer().save_pretrained(repo / "blobs")
    for folder in ("refs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    for file in ("adapter_config.json", "x.bin", *(path.name for path in (repo / "blobs").iterdir())):
        (repo / "snapshots" / COMMIT / file).symlink_to(repo / "blobs" / file)
    return repo / "blobs", "some/tiny" if request.param == "hub" else str(repo / "blobs")


def test_shards_are_loaded(place, tiny_base):
    assert load_base(place[1], dtype="fp32", device="cpu").fingerprint == tiny_base.fingerprint


@pytest.mark.parametrize(("file", "change"), HOSTILE)
def test_refused_before_anything_is_opened(place, file, change, monkeypatch):
    folder, name = place
    old = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(old | change))
    torch.save({}, folder / "x.bin")
    monkeypatch.setattr(torch, "load", opened := Mock())
    for load in (load_base, tokenizer_of):
        with pytest.raises(HatError, match="expected") as caught:
            load(name)
        assert str(caught.value).startswith(f"cannot load {name}: ") and not opened.called


def test_a_file_of_the_working_directory_is_not_taken_for_the_base(tiny_base, tmp_path, monkeypatch):
    write_gguf(tiny_base, tmp_path / "tiny.gguf")
    (tmp_path / "some").mkdir()
    monkeypatch.chdir(tmp_path / "some")
    for other in ("tiny", "tiny.gguf"):
        (tmp_path / "some" / other).write_bytes(b"another")
    load_base(tmp_path / "tiny.gguf", dtype="fp32", device="cpu")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HatError, match="unknown base 'some/tiny'"):
        load_base("some/tiny")


def test_damaged_at_random(tmp_path):
    bases.run(12, tmp_path)
