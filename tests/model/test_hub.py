"""With a fake Hub: what is requested, what is uploaded, and that nothing is requested for local paths."""

import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import tiny, untrained

from hat_lib.config import HatConfig, HatError
from hat_lib.model import hub
from hat_lib.model.checkpoint import (
    ADAPTER_FILE,
    CONFIG_FILE,
    Checkpoint,
    is_hat_parameter,
    read_checkpoint,
    write_checkpoint,
)
from hat_lib.model.transformer import HierarchicalTransformer

SIZE_OF_THE_BASE = 200_000  # bytes; `random:tiny` has more, the adapter less
UPLOADED = ["README.md", ADAPTER_FILE, CONFIG_FILE]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    hat = untrained(capacity=0.5)
    hat.training_summary = {"steps": 3}
    folder = tmp_path_factory.mktemp("hub") / "saved"
    hat.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A Hub that records requests and uploads; ``asked.private`` and ``asked.card`` are its answers."""
    hub_ = SimpleNamespace(calls=[], files={}, private=False, card=False, error=None)

    def call(name, **options):
        if hub_.error:
            raise hub_.error
        hub_.calls.append((name, options))

    class Api:
        def __init__(self, token=None):
            call("HfApi", token=token)

        def create_repo(self, repo_id, *, private, exist_ok):
            call("create_repo", repo_id=repo_id, private=private, exist_ok=exist_ok)

        def repo_info(self, repo_id):
            return SimpleNamespace(private=hub_.private)

        def file_exists(self, repo_id, filename):
            return hub_.card

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            call("upload_folder", repo_id=repo_id, commit_message=commit_message)
            hub_.files = {p.name: p.read_bytes() for p in Path(folder_path).rglob("*")}
            return "https://hub/commit/1"

    def snapshot_download(repo_id, *, allow_patterns):
        call("snapshot_download", repo_id=repo_id, allow_patterns=allow_patterns)
        folder = tmp_path / "cache"
        folder.mkdir(exist_ok=True)
        for name in set(hub_.files) & set(allow_patterns):
            (folder / name).write_bytes(hub_.files[name])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub_


def test_the_model_is_imported_without_the_hub():
    for path in Path(hub.__file__).parent.glob("*.py"):
        for line in path.read_text().splitlines():
            assert not re.match(r"(from|import) (huggingface_hub|yaml|hat_lib\.model\.hub)\b", line), path.name


# Loading


def test_local_paths_never_ask_the_hub(asked, saved, monkeypatch):
    monkeypatch.chdir(saved.parent.parent)
    relative = f"{saved.parent.name}/{saved.name}"  # looks like a Hub id
    for name in (saved, str(saved), relative, Path(relative)):
        assert hub.local_folder(name) == Path(name)
        assert HierarchicalTransformer.from_pretrained(name).base.name == "random:tiny"
    assert asked.calls == []


@pytest.mark.parametrize("name", ["/no/where", "./no/where", "~/where", "nowhere", "a/b/c", ".", "", "a/b\0", None])
def test_what_is_neither_a_folder_nor_an_id_is_not_looked_for(asked, name):
    with pytest.raises(HatError):
        HierarchicalTransformer.from_pretrained(name)
    assert asked.calls == []


@pytest.mark.parametrize("kind", [str, Path])
def test_from_the_hub(asked, saved, kind):
    with pytest.raises(HatError, match=f"owner/name on the Hub is not a HAT checkpoint: {CONFIG_FILE} is missing"):
        HierarchicalTransformer.from_pretrained("owner/name")
    asked.files = {p.name: p.read_bytes() for p in saved.iterdir()} | {"model.safetensors": b"x", "a.bin": b"x"}
    hat = HierarchicalTransformer.from_pretrained(kind("owner/name"))
    assert hat.base.name == "random:tiny" and hat.training_summary == {"steps": 3}
    what, options = asked.calls[-1]
    assert what == "snapshot_download" and options["repo_id"] == "owner/name"
    assert sorted(options["allow_patterns"]) == UPLOADED


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError("401"), None])
def test_a_hub_that_refuses_is_one_error_with_the_way_out(request, saved, error):
    if error:  # otherwise the real client, which makes no requests, as `conftest.py` sets HF_HUB_OFFLINE
        request.getfixturevalue("asked").error = error
    with pytest.raises(HatError) as caught:
        HierarchicalTransformer.from_pretrained("owner/no-such-checkpoint")
    message = str(caught.value)
    assert message.startswith("no folder owner/no-such-checkpoint, and it can't be fetched from the Hub: ")
    assert f"offline, pass a local folder with {CONFIG_FILE} and {ADAPTER_FILE}" in message and "\n" not in message
    with pytest.raises(HatError, match="cannot push to owner/name on the Hub: .*; offline, hand on the folder"):
        hub.push_to_hub(saved, "owner/name")


# Pushing


def test_only_the_adapter_of_a_folder_goes(asked, saved, tmp_path):
    """Whatever else is in the folder, above all the base's weights, stays here."""
    folder = shutil.copytree(saved, tmp_path / "full")
    tiny().model.save_pretrained(folder)
    (folder / ".env").write_text("password")
    address = hub.push_to_hub(folder, "owner/name", private=False, token="secret")
    assert address == "https://hub/commit/1"
    assert asked.calls == [
        ("HfApi", {"token": "secret"}),
        ("create_repo", {"repo_id": "owner/name", "private": False, "exist_ok": True}),
        ("upload_folder", {"repo_id": "owner/name", "commit_message": "Upload a HAT checkpoint"}),
    ]
    assert sorted(asked.files) == UPLOADED
    assert all(asked.files[name] == (saved / name).read_bytes() for name in (ADAPTER_FILE, CONFIG_FILE))
    assert not any(b"secret" in content for content in asked.files.values())
    assert sum(map(len, asked.files.values())) < SIZE_OF_THE_BASE < (folder / "model.safetensors").stat().st_size
    assert all(is_hat_parameter(name) for name in load_file(saved / ADAPTER_FILE))


def test_a_model_goes_up_and_neither_the_base_nor_a_damaged_checkpoint_is(asked, saved, tmp_path):
    with pytest.raises(HatError, match=f"{CONFIG_FILE} is missing"):
        hub.push_to_hub(tiny().model, "owner/name")
    folder = shutil.copytree(saved, tmp_path / "damaged")
    (folder / ADAPTER_FILE).write_bytes(b"damaged")
    with pytest.raises(HatError, match="SHA-256"):
        hub.push_to_hub(folder, "owner/name")
    assert asked.calls == []
    HierarchicalTransformer.from_pretrained(saved).push_to_hub("owner/name")
    assert HierarchicalTransformer.from_pretrained("owner/name").config.capacity == 0.5


@pytest.mark.parametrize("name", ["name", "a/b/c", "../name", "/a/folder", None, 3])
def test_a_name_that_is_no_id(asked, saved, name):
    with pytest.raises(HatError, match="repo_id must be a Hub id"):
        hub.push_to_hub(saved, name)
    if name is not None:
        with pytest.raises(HatError, match="base_model must be a Hub id"):
            hub.push_to_hub(saved, "owner/name", base_model=name)
    assert asked.calls == []


def test_private_is_never_written_to_a_public_repository_and_a_card_is_kept(asked, saved):
    with pytest.raises(HatError, match="owner/name is public on the Hub, but private=True"):
        hub.push_to_hub(saved, "owner/name", private=True)
    assert asked.files == {}
    asked.private = asked.card = True
    hub.push_to_hub(saved, "owner/name", private=True)
    assert asked.calls[-2] == ("create_repo", {"repo_id": "owner/name", "private": True, "exist_ok": True})
    assert sorted(asked.files) == [ADAPTER_FILE, CONFIG_FILE]


@pytest.mark.parametrize("name", ["{tmp}/models/llama", "models/llama", "~/llama", "llama.gguf"])
def test_a_local_base_needs_a_public_name(asked, saved, tmp_path, monkeypatch, name):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    name = name.format(tmp=tmp_path)
    write_checkpoint(tmp_path / "c", replace(read_checkpoint(saved), base=name))
    with pytest.raises(HatError, match=f"base is the local path {name}: pass base_model="):
        hub.push_to_hub(tmp_path / "c", "owner/name")
    assert asked.calls == []
    hub.push_to_hub(tmp_path / "c", "owner/name", base_model="meta/llama")
    assert json.loads(asked.files[CONFIG_FILE])["base"] == "meta/llama"
    assert not any(str(tmp_path).encode() in content for content in asked.files.values())


# The card


@pytest.mark.parametrize(
    "base, source",
    [
        ("bundled", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("TinyLlama/TinyLlama-1.1B", "TinyLlama/TinyLlama-1.1B"),
        ("random:tiny", None),
    ],
)
def test_the_card(base, source):
    tensors = {"gates.1.gate.bias": torch.zeros(2), "routers.0_qkv.log_scale": torch.zeros(1500)}
    found = Checkpoint(HatConfig(4, exit_layers=(1, 3), capacity=0.6), base, "ab" * 32, tensors)
    card = hub.model_card(found, "owner/name")
    assert card.startswith("---\n")
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "mit",
        "library_name": "hat_lib",
        "tags": ["hat", "adaptive-computation", "llama"],
        **({"base_model": source, "base_model_relation": "adapter"} if source else {}),
    }
    cells = f"| {base}, fingerprint {'ab' * 8}...", "| 1,502 |", "| 0.6 |", "| 1, 3 |", "calibrated on | nothing yet"
    for words in ('from_pretrained("owner/name")', *cells):
        assert words in card
