"""What is saved is what is loaded, to the bit; anything else is one error, and the base stays as it was."""

import hashlib
import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save

from hat_lib import __version__, calibrate
from hat_lib.base import exact_hash, load_base
from hat_lib.checkpoint import ADAPTER_FILE, CONFIG_FILE, Checkpoint, read_checkpoint, write_checkpoint
from hat_lib.config import HatConfig, HatError
from hat_lib.model import HierarchicalTransformer, is_hat_parameter

IDS = torch.arange(40).view(2, 20) + 30
KEY = "routers.2_qkv.log_scale"


def tiny():
    return load_base("random:tiny", dtype="fp32", device="cpu")


def logits(hat):
    with torch.inference_mode():
        return hat.lm(IDS).logits


def adapted(grain="channel"):
    """A calibrated model with random small weights in every router and gate."""
    base = tiny()
    hat = HierarchicalTransformer(base, HatConfig.default(base, granularity=grain))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in hat.hat_parameters().values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    blocks = torch.randint(5, 250, (6, 64), generator=generator).tolist()
    calibrate.calibrate(hat, blocks, probe_tokens=64, text="random ids", progress=False)
    return hat


@pytest.fixture(scope="module", params=["channel", "token"])
def saved(request, tmp_path_factory):
    """A checkpoint of either grain, with the logits that it stands for at capacity 0.6."""
    hat = adapted(request.param)
    folder = tmp_path_factory.mktemp("saved") / "a folder, ünïcode 模型"
    hat.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "token grain")
        hat.capacity = 0.6
    return folder, logits(hat), hat.trace.capacity


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "checkpoint"
    adapted().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A checkpoint of the channel grain, to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in pristine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def base():
    """A base of its own: whatever a failed load leaves behind would show here."""
    base = tiny()
    before = exact_hash(base.model)
    yield base
    assert exact_hash(base.model) == before
    assert not any("forward" in vars(module) for module in base.model.modules())
    assert not base.model.model._forward_pre_hooks and not base.model.model._forward_hooks


def damage(folder, change):
    """Apply ``change`` to the parsed JSON and write it back."""
    meta = json.loads((folder / CONFIG_FILE).read_text())
    change(meta)
    (folder / CONFIG_FILE).write_text(json.dumps(meta))


def replace_tensors(folder, tensors, **options):
    """Another adapter, with its hash in the JSON: only what is inside can give it away."""
    payload = save(tensors, **options)
    (folder / ADAPTER_FILE).write_bytes(payload)
    damage(folder, lambda meta: meta.update(adapter_sha256=hashlib.sha256(payload).hexdigest()))


def refused(folder, base, *words):
    """Loading fails with one line that has all the words."""
    with pytest.raises(HatError) as caught:
        HierarchicalTransformer.from_pretrained(folder, base)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in (str(folder), *words):
        assert word in message, message


# Round trip


@pytest.mark.filterwarnings("ignore:token grain")
def test_same_logits_after_loading(saved):
    folder, expected, capacity = saved
    hat = HierarchicalTransformer.from_pretrained(folder, tiny())
    assert hat.capacity == hat.config.capacity == 0.75
    hat.capacity = 0.6
    assert torch.equal(logits(hat), expected) and hat.trace.capacity == capacity < 0.9


@pytest.mark.filterwarnings("ignore:token grain")
def test_the_checkpoint_names_its_base(saved):
    hat = HierarchicalTransformer.from_pretrained(saved[0], dtype="fp32", device="cpu")
    assert hat.base.name == "random:tiny"
    assert HierarchicalTransformer.from_pretrained(saved[0], "random:tiny").base.name == "random:tiny"


def test_the_base_may_be_a_folder_on_disk(pristine, base, tmp_path):
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    hat = HierarchicalTransformer.from_pretrained(pristine, tmp_path / "base", dtype="fp32", device="cpu")
    assert hat.base.fingerprint == base.fingerprint


def test_only_the_adapter_is_saved_and_all_of_it(saved):
    folder = saved[0]
    assert sorted(p.name for p in folder.iterdir()) == [ADAPTER_FILE, CONFIG_FILE]
    tensors = load_file(folder / ADAPTER_FILE)
    assert tensors and all(is_hat_parameter(name) for name in tensors)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    found = read_checkpoint(folder)
    assert found.calibration.text == "random ids" and found.base == "random:tiny"
    assert json.loads((folder / CONFIG_FILE).read_text())["library_version"] == __version__


def test_saving_again_gives_the_same_bytes(pristine, tmp_path):
    HierarchicalTransformer.from_pretrained(pristine, tiny()).save_pretrained(tmp_path / "again")
    for name in (ADAPTER_FILE, CONFIG_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (pristine / name).read_bytes()


def test_uncalibrated_runs_everything_after_loading(base, tmp_path):
    hat = HierarchicalTransformer(base, HatConfig.default(base))
    hat.save_pretrained(tmp_path / "new")
    hat.unload()
    loaded = HierarchicalTransformer.from_pretrained(tmp_path / "new", base)
    assert loaded.calibration is None and loaded.capacity == 1.0
    loaded.unload()


# Refused: the wrong base, or not a checkpoint


def test_another_base_is_refused_by_fingerprint(folder, base):
    other = replace(base, fingerprint="f" * 64, name="another")
    refused(folder, other, "random:tiny", base.fingerprint[:12], "another has ffffffffffff")


def test_a_missing_folder(tmp_path, base):
    refused(tmp_path / "nowhere", base, "no checkpoint folder")


@pytest.mark.parametrize("name", [CONFIG_FILE, ADAPTER_FILE])
def test_a_missing_file(folder, base, name):
    (folder / name).unlink()
    refused(folder, base, f"{name} is missing")


def test_a_pickle_is_never_opened(tmp_path, base):
    torch.save({KEY: torch.zeros(64)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, base, "pytorch_model.bin is a pickle")


# Refused: the weights


def test_a_missing_key(folder, base):
    tensors = load_file(folder / ADAPTER_FILE)
    del tensors[KEY]
    replace_tensors(folder, tensors)
    refused(folder, base, f"missing key {KEY}", "expected shape (64,)")


def test_an_unexpected_key(folder, base):
    replace_tensors(folder, {**load_file(folder / ADAPTER_FILE), "routers.9_qkv.log_scale": torch.zeros(64)})
    refused(folder, base, "unexpected key routers.9_qkv.log_scale (64,)")


def test_a_wrong_shape(folder, base):
    replace_tensors(folder, {**load_file(folder / ADAPTER_FILE), KEY: torch.zeros(65)})
    refused(folder, base, f"{KEY} has shape (65,), expected (64,)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(folder, base, value):
    tensors = load_file(folder / ADAPTER_FILE)
    tensors[KEY][3] = value
    replace_tensors(folder, tensors)
    refused(folder, base, ADAPTER_FILE, KEY, "finite")


def test_a_weight_of_another_dtype(folder, base):
    tensors = load_file(folder / ADAPTER_FILE)
    replace_tensors(folder, {**tensors, KEY: tensors[KEY].half()})
    refused(folder, base, ADAPTER_FILE, KEY, "torch.float16")


@pytest.mark.parametrize("where", [0, 100, -1])
def test_a_flipped_bit(folder, base, where):
    data = bytearray((folder / ADAPTER_FILE).read_bytes())
    data[where] ^= 1
    (folder / ADAPTER_FILE).write_bytes(data)
    refused(folder, base, ADAPTER_FILE, "SHA-256", f"{CONFIG_FILE} expects")


def test_a_truncated_adapter(folder, base):
    data = (folder / ADAPTER_FILE).read_bytes()
    (folder / ADAPTER_FILE).write_bytes(data[: len(data) // 2])
    refused(folder, base, ADAPTER_FILE, "SHA-256")


def test_an_adapter_that_is_no_safetensors(folder, base):
    payload = b"not safetensors"
    (folder / ADAPTER_FILE).write_bytes(payload)
    damage(folder, lambda meta: meta.update(adapter_sha256=hashlib.sha256(payload).hexdigest()))
    refused(folder, base, ADAPTER_FILE, "not a safetensors file")


# Refused: the JSON


@pytest.mark.parametrize("text", ["", "{", "\ufeff{}", '{"config": 1', b"\xff\xfe{}"])
def test_no_json(folder, base, text):
    (folder / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, base, CONFIG_FILE, "not valid JSON")


def set_at(path, value):
    """A change that sets ``meta[a][b]...`` for the path "a.b...", or deletes it for ``...``."""

    def change(meta):
        *parents, last = [int(k) if k.isdigit() else k for k in path.split(".")]
        for key in parents:
            meta = meta[key]
        if value is ...:
            del meta[last]
        else:
            meta[last] = value

    return change


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("base", 3, "base must be a str, got 3"),
        ("base_fingerprint", None, "base_fingerprint must be a str, got None"),
        ("adapter_sha256", ["x"], "adapter_sha256 must be a str, got ['x']"),
        ("library_version", 0.1, "library_version must be a str, got 0.1"),
        ("library_version", ..., "missing or unknown: ['library_version']"),
        ("surprise", 1, "missing or unknown: ['surprise']"),
        ("training", [1], "training must be an object or null, got [1]"),
        ("config", [], "missing or unknown: list"),
        ("config.surprise", 1, "missing or unknown: ['surprise']"),
        ("config.capacity", ..., "missing or unknown: ['capacity']"),
        ("config.capacity", 7, "capacity must be a number in [0.1, 1.0], got 7"),
        ("config.exit_layers", [3, 1], "exit layers must be sorted and distinct, got [3, 1]"),
        ("config.exit_layers", [9], "exit layers must lie in 1..3 for 4 layers, got 9"),
        ("config.n_layers", "4", "n_layers must be a whole number of at least 1, got '4'"),
        ("config.exit_layers", 3, "exit_layers must be a list, got 3"),
        ("config.capacity", "0.5", "capacity must be a number, got '0.5'"),
        ("config.granularity", None, "granularity must be one of channel, token, got None"),
        ("calibration", 3, "missing or unknown: int"),
        ("calibration", [], "missing or unknown: list"),
        ("calibration.surprise", 1, "missing or unknown: ['surprise']"),
        ("calibration.work", ..., "missing or unknown: ['work']"),
        ("calibration.work", "0.5", "calibration.work must be 2 nested lists of finite numbers"),
        ("calibration.sensitivity.0", [], "calibration.sensitivity must cover 4 layers x 4 sites"),
        ("calibration.quantiles.0.0.0", "low", "calibration.quantiles must be 3 nested lists"),
        ("calibration.quantiles.0.0.0", float("nan"), "calibration.quantiles must be 3 nested lists"),
        ("calibration.budget_curve", None, "calibration.budget_curve must be 2 nested lists"),
        ("calibration.budget_curve", [[0.5]], "calibration.budget_curve must be two lists of one length"),
        ("calibration.budget_curve.0.0", 0.99, "calibration.budget_curve must be two lists of one length"),
        ("calibration.quantiles.0.0", [], "calibration.quantiles must be lists of scores in rising order"),
        ("calibration.quantiles.0.0.0", 9e9, "calibration.quantiles must be lists of scores in rising order"),
        ("calibration.work.1.2", -0.1, "calibration.work must be shares that sum to 1"),
        ("calibration.sites.0", "q", "calibration.sites must be ['qkv', 'o', 'gate_up', 'down'] for channel"),
        ("calibration.exponent.0.0", 1, "calibration.exponent must be numbers above 1, got 1"),
        ("calibration.floor", None, "calibration.floor must be a number in [0, 1], got None"),
        ("calibration.text", 3, "calibration.text must be a str, got 3"),
        ("calibration.exit_rates", [0.5, 0.1], "calibration.exit_rates must be rising numbers"),
        ("calibration.exit_scores", [[1, 2, 3]], "calibration.exit_rates must be rising numbers, got None"),
    ],
)
def test_wrong_json(folder, base, path, value, words):
    damage(folder, set_at(path, value))
    refused(folder, base, CONFIG_FILE, words)


def test_exits_without_thresholds_leave_the_base_alone(folder, base):
    damage(folder, set_at("config.exit_rate", 0.5))
    with pytest.raises(HatError, match="exit rate 0.5 needs trained exit gates"):
        HierarchicalTransformer.from_pretrained(folder, base)


def test_a_config_for_another_depth(tmp_path, base):
    other = replace(uncalibrated(base), config=HatConfig(5))
    write_checkpoint(tmp_path, other)
    with pytest.raises(HatError, match="the config is for 5 layers, random:tiny has 4"):
        HierarchicalTransformer.from_pretrained(tmp_path, base)


def uncalibrated(base):
    """An uncalibrated checkpoint for ``base``."""
    hat = HierarchicalTransformer(base, HatConfig.default(base))
    found = Checkpoint(hat.config, base.name, base.fingerprint, hat.hat_parameters())
    hat.unload()
    return found


# Writing


def test_weights_that_are_not_finite_are_not_saved(pristine, tmp_path):
    found = read_checkpoint(pristine)
    found.tensors[KEY][0] = float("nan")
    with pytest.raises(HatError, match=f"{KEY} holds a value that is not finite"):
        write_checkpoint(tmp_path / "new", found)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(pristine, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HatError, match="cannot write a checkpoint to .*file"):
        write_checkpoint(tmp_path / "file" / "sub", read_checkpoint(pristine))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("calls", [1, 2])
def test_an_interrupted_write_leaves_the_old_one_or_says_so(folder, base, monkeypatch, calls):
    old = read_checkpoint(folder)
    changed = {**old.tensors, KEY: old.tensors[KEY] + 1}
    rename, seen = os.replace, []

    def fail(source, target):
        seen.append(target)
        if len(seen) == calls:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(HatError, match="cannot write a checkpoint to .*: No space left"):
        write_checkpoint(folder, replace(old, tensors=changed))
    assert sorted(p.name for p in folder.iterdir()) == [ADAPTER_FILE, CONFIG_FILE]  # nothing half-written
    if calls == 1:
        assert torch.equal(read_checkpoint(folder).tensors[KEY], old.tensors[KEY])
    else:
        refused(folder, base, ADAPTER_FILE, "SHA-256", f"{CONFIG_FILE} expects")
    monkeypatch.undo()
    write_checkpoint(folder, replace(old, tensors=changed))
    assert torch.equal(read_checkpoint(folder).tensors[KEY], changed[KEY])
