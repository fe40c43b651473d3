"""What is saved is loaded bit for bit; anything else is a single error, and the base stays as it was.

``version_0/<grain>`` was written before files had a version: a checkpoint on ``random:tiny`` with exits and, in
``expected.safetensors``, what it did to a text: logits ``[3, V]`` of the last tokens, shares ``[L, S, 1, T]`` and
exit layers ``[1, T]``. No score of that text is within 0.5 % of its threshold.
"""

import copy
import json
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_runs import GRAINS, tiny, untrained

from hat_lib.backbone.base import exact_hash
from hat_lib.config import DATA, HatConfig, HatError
from hat_lib.model.checkpoint import (
    ADAPTER_FILE,
    CARD_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    Price,
    find_checkpoint,
    is_hat_parameter,
    push_to_hub,
    read_checkpoint,
    write_checkpoint,
    write_prices,
)
from hat_lib.model.threshold_table import EXIT_TABLES, HEAD_TABLES
from hat_lib.model.transformer import HierarchicalTransformer

pytestmark = pytest.mark.filterwarnings("ignore:token grain")

OLD = Path(__file__).with_name("version_0")
FILES = (ADAPTER_FILE, CONFIG_FILE)
KEY = "routers.2_qkv.log_scale"
NO_EXITS = dict.fromkeys(EXIT_TABLES)
PRICES = [Price("news", c, c + 0.01, 1 - c, None, None, 20.0, 4000) for c in (0.4, 0.7)]


def logits(hat, ids):
    with torch.inference_mode():
        return hat.lm(ids).logits


@pytest.fixture
def base():
    """A separate base: whatever a failed load leaves behind would show here."""
    base = tiny()
    before = exact_hash(base.model)
    yield base
    assert exact_hash(base.model) == before
    assert not any("forward" in vars(module) for module in base.model.modules())
    assert not base.model.model._forward_pre_hooks and not base.model.model._forward_hooks


@pytest.fixture
def folder(tmp_path):
    """A channel-grain checkpoint in the current format, with every kind of field."""
    return write_checkpoint(tmp_path / "a folder", replace(read_checkpoint(OLD / "channel"), prices=PRICES))


def change(folder, path, value):
    """Set ``meta[a][b]...`` in the JSON for the path "a.b...", or delete it for ``...``."""
    meta = json.loads((folder / CONFIG_FILE).read_text())
    *parents, last = path.split(".")
    place = meta
    for key in parents:
        place = place[key]
    place[last] = value
    if value is ...:
        del place[last]
    (folder / CONFIG_FILE).write_text(json.dumps(meta))


def refused(folder, base, *words):
    with pytest.raises(HatError) as caught:
        HierarchicalTransformer.from_pretrained(folder, base)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in (str(folder), *words))


@pytest.mark.parametrize("grain", GRAINS)
def test_version_0_decides_as_it_did(grain, base, tmp_path):
    expected = load_file(OLD / grain / "expected.safetensors")
    hat = HierarchicalTransformer.from_pretrained(OLD / grain, base)
    assert (hat.capacity, hat.exit_rate, hat.training_summary, hat.prices) == (0.6, 0.25, {"steps": 3}, [])
    found = logits(hat, expected["ids"])
    assert torch.equal(hat.trace.exit_layer.long(), expected["exit_layer"])
    ran = torch.arange(4).view(4, 1, 1, 1) < expected["exit_layer"]
    assert torch.equal((hat.trace.site_share * ran).float(), expected["site_share"] * ran)
    assert (found[0, -3:] - expected["logits"]).abs().max() < 1e-4
    hat.save_pretrained(tmp_path / "new")
    hat.unload()
    again = HierarchicalTransformer.from_pretrained(tmp_path / "new", base)
    assert torch.equal(logits(again, expected["ids"]), found)
    again.unload()
    assert (tmp_path / "new" / ADAPTER_FILE).read_bytes() == (OLD / grain / ADAPTER_FILE).read_bytes()


def test_fields_of_later_versions_take_their_defaults(folder):
    before, tables = read_checkpoint(folder), dict.fromkeys(HEAD_TABLES + EXIT_TABLES)
    config = (f"config.{name}" for name in ("exit_rate", "capacity", "granularity", "protected_tokens"))
    missing = ("format_version", "training", "prices", "calibration.method")
    for path in (*missing, *(f"calibration.{name}" for name in tables), *config):
        change(folder, path, ...)
    found = read_checkpoint(folder)
    assert (found.config, found.training, found.prices) == (HatConfig(4, exit_layers=(2,)), None, [])
    assert found.calibration == replace(before.calibration, method="damage", **tables)


@pytest.mark.parametrize("name", sorted(path.name for path in (DATA / "checkpoints").iterdir()))
def test_reference_checkpoints_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()  # an unrelated folder of that name
    assert find_checkpoint(name) == DATA / "checkpoints" / name
    found = read_checkpoint(name)
    assert found.base == "bundled" and found.tensors and found.calibration is not None
    write_checkpoint(name, replace(found, training={"mine": 1}))
    assert read_checkpoint(name).training == {"mine": 1}, "a local checkpoint comes first"


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", ""])
def test_unknown_name_lists_the_known_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HatError, match="calibrated_token, default|is missing"):
        read_checkpoint(name)


def test_round_trip(folder, base, tmp_path):
    hat = HierarchicalTransformer.from_pretrained(folder, base)
    hat.save_pretrained(tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes() for name in FILES)
    assert hat.prices == copy.deepcopy(hat).prices == PRICES
    hat.calibration = hat.calibration
    assert hat.prices == [], "measured with another calibration"
    hat.unload()


def test_base_by_the_name_in_the_checkpoint(folder):
    assert HierarchicalTransformer.from_pretrained(folder, dtype="bf16").base.name == "random:tiny"


@pytest.mark.parametrize("grain", GRAINS)
def test_only_the_adapter_is_saved_and_all_of_it(grain, base, tmp_path):
    hat = untrained(grain, base)
    with torch.no_grad():
        for number, parameter in enumerate(hat.hat_parameters().values()):
            parameter += number + 1
    hat.save_pretrained(tmp_path)
    hat.unload()
    tensors = load_file(tmp_path / ADAPTER_FILE)
    assert all(is_hat_parameter(name) for name in tensors) and {t.dtype for t in tensors.values()} == {torch.float32}
    loaded = HierarchicalTransformer.from_pretrained(tmp_path, base)
    assert loaded.calibration is None and loaded.capacity == 1.0
    assert tensors.keys() == loaded.hat_parameters().keys()
    assert all(torch.equal(p, hat.hat_parameters()[name]) for name, p in loaded.hat_parameters().items())
    loaded.unload()


def test_write_prices(folder):
    before = read_checkpoint(folder)
    write_prices(folder, PRICES[:1])
    after = read_checkpoint(folder)
    assert after.prices == PRICES[:1] and torch.equal(after.tensors[KEY], before.tensors[KEY])
    assert replace(after, tensors={}, prices=PRICES) == replace(before, tensors={})


def test_another_base_is_refused(folder, base):
    refused(folder, replace(base, fingerprint="f" * 64, name="another"), "random:tiny", "another has ffffffffffff")


def test_missing_files(folder, base, tmp_path):
    (folder / ADAPTER_FILE).unlink()
    refused(folder, base, ADAPTER_FILE)
    (folder / CONFIG_FILE).unlink()
    refused(folder, base, f"{CONFIG_FILE} is missing")
    (folder / "run.json").write_text("{}")
    refused(folder, base, f"hat train --resume {folder}")
    (tmp_path / "file").touch()
    with pytest.raises(HatError, match="cannot write a checkpoint"):
        write_checkpoint(tmp_path / "file" / "new", read_checkpoint(OLD / "channel"))


@pytest.mark.parametrize(
    "tensors", [{KEY: None}, {"routers.9_qkv.log_scale": torch.zeros(64)}, {KEY: torch.zeros(65)}], ids=str
)
def test_weights_of_another_model_are_refused(folder, base, tensors):
    found = read_checkpoint(folder)
    tensors = {name: tensor for name, tensor in (found.tensors | tensors).items() if tensor is not None}
    write_checkpoint(folder, replace(found, tensors=tensors))
    refused(folder, base, ADAPTER_FILE, "log_scale")


def test_changed_weights_are_refused(folder, base):
    save_file(read_checkpoint(folder).tensors | {KEY: torch.ones(64)}, folder / ADAPTER_FILE)
    refused(folder, base, ADAPTER_FILE)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format_version", FORMAT_VERSION + 1, "upgrade hat_lib"),
        ("surprise", 1, "surprise"),
        ("base_fingerprint", ..., "base_fingerprint"),
        ("config", [], ""),
        ("config.n_layers", ..., "n_layers"),
        ("config.surprise", 1, "surprise"),
        ("config.capacity", 7, "capacity must be"),
        ("config.exit_layers", [3, 1], "exit layers"),
        ("prices", [{"text": "news"}], "capacity"),
        ("calibration", 3, ""),
        ("calibration.shares", ..., "shares"),
        ("calibration.shares", "0.5", "calibration.shares"),
        ("calibration.exit_rates", [[0.5, 0.1]], "calibration.exit_rates"),
    ],
)
def test_wrong_json(folder, base, path, value, words):
    change(folder, path, value)
    refused(folder, base, CONFIG_FILE, words)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe{}"])
def test_no_json(folder, base, text):
    (folder / CONFIG_FILE).write_bytes(text)
    refused(folder, base, CONFIG_FILE)


@pytest.mark.parametrize(
    ("changes", "tables"),
    [({"n_layers": 5}, {}), ({}, {"sites": ["ffn"]}), ({"exit_rate": 0.2}, NO_EXITS)],
)
def test_constructor_that_fails_leaves_the_base_clean(base, changes, tables):
    found = read_checkpoint(OLD / "channel")
    with pytest.raises(HatError):
        HierarchicalTransformer(base, replace(found.config, **changes), replace(found.calibration, **tables))


@pytest.mark.parametrize(("renames", "saved"), [(0, False), (1, False), (2, True), (3, True)])
def test_killed_while_saving(folder, monkeypatch, renames, saved):
    """It leaves the old checkpoint or the new one, whichever rename is the last."""
    old = read_checkpoint(folder)
    new = replace(old, tensors=old.tensors | {KEY: torch.ones(64)}, training={"state": 1})
    rename, left = os.replace, iter(range(renames))

    def dying(source, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt) if renames < 3 else nullcontext():
            write_checkpoint(folder, new)
    found, expected = read_checkpoint(folder), new if saved else old
    assert found.training == expected.training and torch.equal(found.tensors[KEY], expected.tensors[KEY])
    write_checkpoint(folder, new)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


# The Hugging Face Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that records what is created and uploaded; ``private`` and ``card`` are its answers."""
    fake = SimpleNamespace(created=[], files={}, private=False, card=False)

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, *, private, exist_ok):
            fake.created.append((repo_id, private))

        def repo_info(self, repo_id):
            return SimpleNamespace(private=fake.private)

        def file_exists(self, repo_id, filename):
            return fake.card

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            fake.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return "https://hub/commit/1"

    def snapshot_download(repo_id, *, allow_patterns):
        folder = tmp_path / "cache"
        folder.mkdir()
        for name in set(fake.files) & set(allow_patterns):
            (folder / name).write_bytes(fake.files[name])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


def test_to_the_hub_and_back(hub, base):
    hat = HierarchicalTransformer.from_pretrained(OLD / "channel", base)
    assert hat.push_to_hub("owner/name") == "https://hub/commit/1" and hub.created == [("owner/name", False)]
    assert sorted(hub.files) == [CARD_FILE, *FILES]
    card = hub.files[CARD_FILE].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit" and 'from_pretrained("owner/name")' in card
    found = read_checkpoint("owner/name")
    assert asdict(replace(found, tensors={})) == asdict(replace(hat.checkpoint(), tensors={}))
    hat.unload()


def test_private_is_never_written_to_a_public_repository_and_a_card_is_kept(hub, folder):
    with pytest.raises(HatError, match="owner/name is public"):
        push_to_hub(read_checkpoint(folder), "owner/name", private=True)
    assert hub.files == {}
    hub.private = hub.card = True
    push_to_hub(read_checkpoint(folder), "owner/name", private=True)
    assert hub.created[-1] == ("owner/name", True) and sorted(hub.files) == sorted(FILES)


@pytest.mark.parametrize("name", ["models/llama", "~/llama", "llama.gguf"])
def test_a_local_base_needs_a_public_name(hub, folder, tmp_path, monkeypatch, name):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    local = replace(read_checkpoint(folder), base=name)
    with pytest.raises(HatError, match="base_model"):
        push_to_hub(local, "owner/name")
    assert hub.created == []
    push_to_hub(local, "owner/name", base_model="meta/llama")
    assert json.loads(hub.files[CONFIG_FILE])["base"] == "meta/llama"


def test_offline():
    with pytest.raises(HatError, match="can't be fetched from the Hub"):  # `conftest.py` sets HF_HUB_OFFLINE
        read_checkpoint("owner/no-such-checkpoint")
