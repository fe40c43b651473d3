"""What is saved is loaded bit for bit; anything else is a single error, and the base stays as it was.

``version_0/<grain>`` was written before files had a version: a checkpoint on ``random:tiny`` with exits and, in
``expected.safetensors``, what it did to a text: logits ``[3, V]`` of the last tokens, shares ``[L, S, 1, T]`` and
exit layers ``[1, T]``. No score of that text is within 0.5 % of its threshold.
"""

import copy
import hashlib
import json
import math
import pickle
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save
from tiny_runs import GRAINS, tiny

from hat_lib.base.load import exact_hash
from hat_lib.checkpoint import (
    ADAPTER_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    Price,
    find_checkpoint,
    largest,
    read_checkpoint,
    write_checkpoint,
    write_prices,
)
from hat_lib.config import DATA, HatError
from hat_lib.hat import HierarchicalTransformer
from hat_lib.hub import CARD_FILE, push_to_hub

pytestmark = pytest.mark.filterwarnings("ignore:token grain|.*below the lowest measured")

OLD = Path(__file__).with_name("version_0")
FILES = (ADAPTER_FILE, CONFIG_FILE)
KEY = "routers.2_qkv.log_scale"
PRICES = [Price("news", c, c + 0.01, 1 - c, None, None, 20.0, 4000) for c in (0.4, 0.7)]


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
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    place = meta
    for key in parents:
        place = place[key]
    place[last] = value
    if value is ...:
        del place[last]
    (folder / CONFIG_FILE).write_text(json.dumps(meta))


def same(a, b):
    tensors = a.tensors.keys() == b.tensors.keys() and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())
    return tensors and replace(a, tensors={}) == replace(b, tensors={})


@pytest.mark.parametrize("grain", GRAINS)
def test_version_0_decides_as_it_did(grain, base, tmp_path):
    expected = load_file(OLD / grain / "expected.safetensors")
    hat = HierarchicalTransformer.from_pretrained(OLD / grain, base)
    assert (hat.capacity, hat.exit_rate, hat.training_summary, hat.prices) == (0.6, 0.25, {"steps": 3}, [])
    with torch.inference_mode():
        found = hat.lm(expected["ids"]).logits
    assert torch.equal(hat.trace.exit_layer.long(), expected["exit_layer"])
    ran = torch.arange(4).view(4, 1, 1, 1) < expected["exit_layer"]
    assert torch.equal((hat.trace.site_share * ran).float(), expected["site_share"] * ran)
    assert (found[0, -3:] - expected["logits"]).abs().max() < 1e-4
    hat.save_pretrained(tmp_path / "new")
    for name in ("capacity", "exit_rate"):
        with pytest.warns(match="below the lowest measured"):
            setattr(hat, name, 0.2)
    hat.unload()
    assert (tmp_path / "new" / ADAPTER_FILE).read_bytes() == (OLD / grain / ADAPTER_FILE).read_bytes()


@pytest.mark.parametrize("name", sorted(path.name for path in (DATA / "checkpoints").iterdir()))
def test_reference_checkpoints_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()  # an unrelated folder of that name
    assert find_checkpoint(name) == DATA / "checkpoints" / name
    found = read_checkpoint(name)
    assert found.base == "bundled" and found.tensors and found.calibration is not None
    write_checkpoint(name, replace(found, training={"mine": 1}))
    assert read_checkpoint(name).training == {"mine": 1}, "a local checkpoint comes first"


@pytest.mark.parametrize(
    ("name", "words"),
    [(name, "calibrated_token, default") for name in ("nowhere", "./no/where", "~no/where", "x" * 5000, "a\0b")]
    + [("owner/no-such", "can't be fetched")],
)
def test_unknown_names(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HatError, match=words):  # `conftest.py` sets HF_HUB_OFFLINE
        read_checkpoint(name)


def test_prices(folder, base, tmp_path):
    hat = HierarchicalTransformer.from_pretrained(folder, base)
    hat.save_pretrained(tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes() for name in FILES)
    assert hat.prices == copy.deepcopy(hat).prices == PRICES
    hat.calibration = hat.calibration
    assert hat.prices == [], "measured with another calibration"
    hat.unload()
    write_prices(folder, PRICES[:1])
    assert same(replace(read_checkpoint(folder), prices=PRICES), read_checkpoint(tmp_path / "again"))
    assert read_checkpoint(folder).prices == PRICES[:1]
    written = (folder / CONFIG_FILE).stat().st_mtime_ns
    write_prices(folder, PRICES[:1])  # they did not change, so nothing is written
    assert (folder / CONFIG_FILE).stat().st_mtime_ns == written
    assert HierarchicalTransformer.from_pretrained(folder, dtype="bf16").base.name == "random:tiny"


def refusal(folder, base):
    """Why a checkpoint is refused, in one short line that begins with the file; "" if its logits are finite."""
    try:
        hat = HierarchicalTransformer.from_pretrained(folder, base)
    except HatError as error:
        line = str(error).removeprefix(str(folder))
        assert len(line) < min(len(str(error)), 400) and "\n" not in line
        return line
    with torch.inference_mode():
        assert hat.lm(torch.arange(40)[None]).logits.isfinite().all()
    hat.unload()
    return ""


def damage(folder, place, value):
    """Another value in the JSON, or another file: bytes or tensors, with the right hash, or a link."""
    file, found = folder / place, value
    if place not in FILES:
        return change(folder, place, value)
    if isinstance(value, dict):
        found = save({name: tensor for name, tensor in (load_file(file) | value).items() if tensor is not None})
    file.rename(folder / "run.json")
    if isinstance(found, bytes):
        file.write_bytes(found)
        if place == ADAPTER_FILE:
            change(folder, "adapter_sha256", hashlib.sha256(found).hexdigest())
    elif found:
        file.symlink_to(found)


WHOLE = (OLD / "channel" / ADAPTER_FILE).read_bytes()
TYPES = torch.float64, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64
WRONG = [None, torch.zeros(65), *(torch.zeros(64, dtype=dtype) for dtype in TYPES)]
WRONG += [torch.full([64], value) for value in (math.nan, math.inf, -1e38, 31.0)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # These links are to a folder, and to a file that cannot be read.
        *(({name: found}, name) for name in FILES for found in (None, b"", "/", "/proc/self/mem")),
        *(({ADAPTER_FILE: found}, ADAPTER_FILE) for found in (WHOLE[:-1], pickle.dumps({KEY: 1}))),
        *(({ADAPTER_FILE: {KEY: tensor}}, KEY) for tensor in WRONG),
        ({ADAPTER_FILE: {"routers.9_qkv.log_scale": torch.zeros(64)}}, "9_qkv"),
        ({CONFIG_FILE: None}, "hat train --resume"),
        ({CONFIG_FILE: b"[]"}, CONFIG_FILE),
        ({CONFIG_FILE: b"[" * 100_000}, CONFIG_FILE),
        ({"adapter_sha256": "0" * 64}, ADAPTER_FILE),
        ({"format_version": FORMAT_VERSION + 1, "library_version": ...}, "upgrade hat_lib"),
        ({"surprise": 1}, "surprise"),
        ({"base_fingerprint": "f" * 64}, "ffffffffffff"),
        ({"config.n_layers": ...}, "n_layers"),
        ({"config.n_layers": 5, "calibration": None}, "n_layers"),
        ({"config.translator_rank": 10**9}, "translator_rank"),
        ({"config.correction_rank": 10**9}, "correction_rank"),
        ({"prices.0": {"text": "news"}}, "capacity"),
    ],
)
def test_refused(folder, base, changes, words):
    for place, value in changes.items():
        damage(folder, place, value)
    assert words in refusal(folder, base)


def places(meta, path=""):
    """The path of every field, and of the first element of every list."""
    for key, value in meta.items() if isinstance(meta, dict) else enumerate(meta[:1]):
        yield f"{path}{key}"
        if isinstance(value, dict | list):
            yield from places(value, f"{path}{key}.")


@pytest.mark.parametrize(
    "value", [None, True, -0.5, 10**30, math.nan, math.inf, "x" * 5000, [], {}], ids=lambda v: f"{v}"[:9]
)
def test_another_value_is_refused_by_name_or_harmless(folder, base, value):
    text = (folder / CONFIG_FILE).read_text()
    for path in places(json.loads(text)):
        change(folder, path, value)
        line, words = refusal(folder, base), [word for word in re.split(r"[._]", path) if not word.isdigit()]
        free = value is not True or words[0] in ("training", "library")  # these hold what they like
        assert any(word in line for word in words) if line else free, path
        (folder / CONFIG_FILE).write_text(text)


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_are_refused_or_harmless(folder, base, name):
    draw, whole = random.Random(0), (folder / name).read_bytes()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 8])):
            data[int(len(data) * draw.random() ** 4)] = draw.randrange(256)  # mostly in the header
        damage(folder, name, bytes(data))
        refusal(folder, base)


@pytest.mark.parametrize("sign", [torch.ones_like, lambda tensor: torch.randn(tensor.shape).sign()])
def test_the_largest_values_give_finite_logits(folder, base, sign):
    old = read_checkpoint(folder)
    hat = HierarchicalTransformer(base, replace(old.config, correction_rank=2), old.calibration)
    found = hat.checkpoint()
    hat.unload()
    write_checkpoint(folder, replace(found, tensors={n: largest(n) * sign(t) for n, t in found.tensors.items()}))
    assert refusal(folder, base) == ""


def test_what_could_not_be_read_is_not_written(folder):
    found, before = read_checkpoint(folder), [(folder / name).read_bytes() for name in FILES]
    for wrong in ({"tensors": {KEY: torch.full([64], math.nan)}}, {"training": {"loss": math.nan}}):
        with pytest.raises(HatError, match=str(folder)):
            write_checkpoint(folder, replace(found, **wrong))
    assert [(folder / name).read_bytes() for name in FILES] == before and len(list(folder.iterdir())) == 2


# The Hugging Face Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that records what is created and uploaded; ``private`` and ``card`` are its answers."""
    fake = SimpleNamespace(created=[], files={}, private=False, card=False)

    def upload_folder(*, folder_path, **kwargs):
        fake.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return "https://hub/commit/1"

    def snapshot_download(repo_id, *, allow_patterns):
        folder = tmp_path / "cache"
        folder.mkdir()
        for name in set(fake.files) & set(allow_patterns):
            (folder / name).write_bytes(fake.files[name])
        return str(folder)

    api = SimpleNamespace(
        create_repo=lambda repo_id, *, private, exist_ok: fake.created.append((repo_id, private)),
        repo_info=lambda repo_id: SimpleNamespace(private=fake.private),
        file_exists=lambda repo_id, filename: fake.card,
        upload_folder=upload_folder,
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


def test_to_the_hub_and_back(hub, base):
    hat = HierarchicalTransformer.from_pretrained(OLD / "channel", base)
    assert hat.push_to_hub("owner/name") == "https://hub/commit/1" and hub.created == [("owner/name", False)]
    assert sorted(hub.files) == [CARD_FILE, *FILES]
    card = hub.files[CARD_FILE].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit" and 'from_pretrained("owner/name")' in card
    assert same(read_checkpoint("owner/name"), hat.checkpoint())
    hat.unload()


def test_private_is_never_written_to_a_public_repository_and_a_card_is_kept(hub, folder):
    with pytest.raises(HatError, match="owner/name is public"):
        push_to_hub(read_checkpoint(folder), "owner/name", private=True)
    assert hub.files == {}
    hub.private = hub.card = True
    push_to_hub(read_checkpoint(folder), "owner/name", private=True)
    assert hub.created[-1] == ("owner/name", True) and sorted(hub.files) == sorted(FILES)


@pytest.mark.parametrize("name", ["models/llama", "llama.gguf"])
def test_a_local_base_needs_a_public_name(hub, folder, tmp_path, monkeypatch, name):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    local = replace(read_checkpoint(folder), base=name)
    with pytest.raises(HatError, match="base_model"):
        push_to_hub(local, "owner/name")
    assert hub.created == []
    push_to_hub(local, "owner/name", base_model="meta/llama")
    assert json.loads(hub.files[CONFIG_FILE])["base"] == "meta/llama"
