"""What is saved is what is loaded, to the bit; anything else is one error, and the base stays as it was."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from hat_lib import __version__
from hat_lib.backbone.base import exact_hash, load_base
from hat_lib.calibration import capacity as calibrate
from hat_lib.config import HatConfig, HatError
from hat_lib.model import checkpoint, schema
from hat_lib.model.checkpoint import (
    ADAPTER_FILE,
    CONFIG_FILE,
    Checkpoint,
    is_hat_parameter,
    read_checkpoint,
    write_checkpoint,
)
from hat_lib.model.thresholds import Calibration
from hat_lib.model.transformer import HierarchicalTransformer

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
    """Apply ``change`` to the parsed JSON and write it back, as a person would by hand."""
    meta = json.loads((folder / CONFIG_FILE).read_text())
    meta.pop("sha256", None)
    change(meta)
    (folder / CONFIG_FILE).write_text(json.dumps(meta))


def replace_adapter(folder, payload):
    """Another adapter, with its hash in the JSON: only what is inside can give it away."""
    (folder / ADAPTER_FILE).write_bytes(payload)
    damage(folder, lambda meta: meta.update(adapter_sha256=hashlib.sha256(payload).hexdigest()))


def replace_tensors(folder, tensors):
    replace_adapter(folder, save(tensors))


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


@pytest.mark.parametrize("name", [CONFIG_FILE, ADAPTER_FILE])
def test_what_is_no_file(folder, base, name):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, base, f"{name} is not a file")
    (folder / name).rmdir()
    (folder / name).symlink_to("nowhere")
    refused(folder, base, f"{name} is not a file")
    (folder / name).unlink()
    if hasattr(os, "mkfifo"):  # reading one would wait for ever
        os.mkfifo(folder / name)
        refused(folder, base, f"{name} is not a file")
        (folder / name).unlink()
    (folder / "elsewhere").write_bytes(content)
    (folder / name).symlink_to("elsewhere")  # as in the Hub's cache
    assert read_checkpoint(folder).base == "random:tiny"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(folder, base):
    (folder / ADAPTER_FILE).chmod(0)
    refused(folder, base, f"cannot read {folder / ADAPTER_FILE}: Permission denied")
    folder.chmod(0)
    refused(folder, base)
    folder.chmod(0o700)


def test_a_file_that_the_disk_refuses(folder, base, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    refused(folder, base, f"cannot read {folder / CONFIG_FILE}: Input/output error")


@pytest.mark.parametrize("name", ["n" * 300, "a\0b"])
def test_a_name_that_no_folder_can_have(pristine, tmp_path, base, name):
    refused(tmp_path / name, base, "no checkpoint folder")
    with pytest.raises(HatError, match="cannot write a checkpoint to"):
        write_checkpoint(tmp_path / name, read_checkpoint(pristine))


def test_the_home_folder(pristine, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint("~/mine", read_checkpoint(pristine))
    assert (tmp_path / "mine" / CONFIG_FILE).is_file() and read_checkpoint("~/mine").base == "random:tiny"


def test_a_pickle_is_never_opened(tmp_path, base):
    torch.save({KEY: torch.zeros(64)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, base, "pytorch_model.bin is a pickle")


# Refused: the weights


def test_a_missing_key(folder, base):
    tensors = load_file(folder / ADAPTER_FILE)
    del tensors[KEY]
    replace_tensors(folder, tensors)
    refused(folder, base, ADAPTER_FILE, f"missing key '{KEY}'", "expected shape (64,)")


def test_an_unexpected_key(folder, base):
    replace_tensors(folder, {**load_file(folder / ADAPTER_FILE), "routers.9_qkv.log_scale": torch.zeros(64)})
    refused(folder, base, ADAPTER_FILE, "unexpected key 'routers.9_qkv.log_scale' of shape (64,)")


def test_a_weight_of_the_base(folder, base):
    replace_tensors(folder, {**load_file(folder / ADAPTER_FILE), "lm_head.weight": torch.zeros(2)})
    refused(folder, base, ADAPTER_FILE, "unexpected key 'lm_head.weight'", "not a router's or a gate's")


def test_a_wrong_shape(folder, base):
    replace_tensors(folder, {**load_file(folder / ADAPTER_FILE), KEY: torch.zeros(65)})
    refused(folder, base, ADAPTER_FILE, f"'{KEY}' has shape (65,), expected (64,)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(folder, base, value):
    tensors = load_file(folder / ADAPTER_FILE)
    tensors[KEY][3] = value
    replace_tensors(folder, tensors)
    refused(folder, base, ADAPTER_FILE, KEY, "finite")


def test_a_weight_of_another_dtype(folder, base):
    tensors = load_file(folder / ADAPTER_FILE)
    replace_tensors(folder, {**tensors, KEY: tensors[KEY].half()})
    refused(folder, base, ADAPTER_FILE, KEY, "must be torch.float32, got torch.float16")


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
    replace_adapter(folder, b"not safetensors")
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
        ("base", 3, "base must be a line of 1 to 1000 characters, got 3"),
        ("base", "", "base must be a line of 1 to 1000 characters, got ''"),
        ("base", "a\nb", "base must be a line of 1 to 1000 characters, got 'a\\nb'"),
        ("base_fingerprint", None, "base_fingerprint must be 64 hex digits, got None"),
        ("base_fingerprint", "F" * 64, "base_fingerprint must be 64 hex digits, got 'FFFF"),
        ("adapter_sha256", ["x"], "adapter_sha256 must be 64 hex digits, got ['x']"),
        ("adapter_sha256", "../../elsewhere", "adapter_sha256 must be 64 hex digits, got '../../elsewhere'"),
        ("library_version", 0.1, "library_version must be a line of 1 to 1000 characters, got 0.1"),
        ("library_version", ..., "missing or unknown fields: ['library_version']"),
        ("surprise", 1, "missing or unknown fields: ['surprise']"),
        ("sha256", None, "sha256 is None, the rest has"),
        ("training", [1], "training must be an object or null, got [1]"),
        ("config", [], "missing or unknown: list"),
        ("config.surprise", 1, "missing or unknown: ['surprise']"),
        ("config.capacity", ..., "missing or unknown: ['capacity']"),
        ("config.capacity", 7, "capacity must be a number in [0.1, 1.0], got 7"),
        ("config.exit_layers", [3, 1], "exit layers must be sorted and distinct, got [3, 1]"),
        ("config.exit_layers", [9], "exit layers must lie in 1..3 for 4 layers, got 9"),
        ("config.n_layers", "4", "n_layers must be a whole number of at least 1, got '4'"),
        ("config.n_layers", 10**400, "not valid JSON: number out of range"),
        ("config.exit_layers", 3, "exit_layers must be a list, got 3"),
        ("config.capacity", "0.5", "capacity must be a number, got '0.5'"),
        ("config.capacity", 10**400, "not valid JSON: number out of range"),
        ("config.granularity", None, "granularity must be one of channel, token, got None"),
        ("config.exit_rate", 0.5, "exit_rate 0.5 needs trained exit gates, but calibration.exit_rates is null"),
        ("calibration", 3, "calibration must be an object or null, got 3"),
        ("calibration", [], "calibration must be an object or null, got []"),
        ("calibration.surprise", 1, "calibration: missing or unknown fields: ['surprise']"),
        ("calibration.shares", ..., "calibration: missing or unknown fields: ['shares']"),
        ("calibration.shares", "0.5", "calibration.shares must be a list, got '0.5'"),
        ("calibration.shares", None, "calibration.shares must be a list, got None"),
        ("calibration.shares", [], "calibration.shares must have 4 entries, got 0"),
        ("calibration.shares.0", [], "calibration.shares[0] must have 4 entries, got 0"),
        ("calibration.shares.1.2", [0.5, 1], "calibration.shares[1][2] must have {C} entries, got 2"),
        ("calibration.shares.1.2.0", -0.1, "calibration.shares[1][2][0] must be a number in [0, 1], got -0.1"),
        ("calibration.shares.1.2.0", True, "calibration.shares[1][2][0] must be a number in [0, 1], got True"),
        ("calibration.shares.1.2.0", [0.5], "calibration.shares[1][2][0] must be a number in [0, 1], got [0.5]"),
        ("calibration.thresholds.3.3.0", "low", "calibration.thresholds[3][3][0] must be a number in [-inf, inf]"),
        ("calibration.thresholds.3.3.0", float("nan"), "not valid JSON: number out of range: 'NaN'"),
        ("calibration.thresholds.3.3.0", -1, "calibration.thresholds[3][3] must be in falling order, got [-1,"),
        ("calibration.capacities", [], "calibration.capacities must have 1 entries, got 0"),
        ("calibration.capacities.0", 0.99, "calibration.capacities must be in rising order, got [0.99,"),
        ("calibration.capacities.{-1}", 0.99, "calibration.capacities must end at 1, got 0.99"),
        ("calibration.sites.0", "q", "calibration.sites must be ['qkv', 'o', 'gate_up', 'down'], got ['q',"),
        ("calibration.method", None, "calibration.method must be a str, got None"),
        ("calibration.text", 3, "calibration.text must be a str, got 3"),
        ("calibration.exit_rates", [[0.5, 0.1]], "calibration.exit_rates[0] must be in rising order, got [0.5, 0.1]"),
        ("calibration.exit_rates", [[0.1, 0.5]], "exit_rates and exit_scores must be all null or all lists"),
        ("calibration.exit_scores", [[[1, 2, 3]]], "exit_rates and exit_scores must be all null or all lists"),
        ("calibration.exit_capacities", [0.5], "exit_rates and exit_scores must be all null or all lists"),
        ("calibration.exit_capacities", [0.5, 0.4], "calibration.exit_capacities must be in rising order"),
    ],
)
def test_wrong_json(folder, base, path, value, words):
    capacities = len(json.loads((folder / CONFIG_FILE).read_text())["calibration"]["capacities"])
    path = path.replace("{-1}", str(capacities - 1))
    damage(folder, set_at(path, value))
    refused(folder, base, CONFIG_FILE, words.replace("{C}", str(capacities)))


def test_exit_tables(folder, base):
    tables = {
        "exit_capacities": [0.5],
        "exit_rates": [[0.1, 0.5, 0.9]],
        "exit_scores": [[[3, 2, 1], [2, 1, 0], [1, 0, -1]]],
    }
    damage(folder, lambda meta: meta["calibration"].update(tables))
    assert read_checkpoint(folder).calibration.exit_thresholds(0.5, 0.75) == [2, 1, 0]
    damage(folder, set_at("calibration.exit_scores.0.2", [1, 0]))
    refused(folder, base, CONFIG_FILE, "calibration.exit_scores[0][2] must have 3 entries, got 2")
    damage(folder, set_at("calibration.exit_scores", [[[3, 2, 1]]]))
    refused(folder, base, CONFIG_FILE, "calibration.exit_scores[0] must have 3 entries, got 1")


def test_every_table_of_a_calibration_is_checked():
    assert {*schema._TABLES, "sites", "method", "text"} == {field.name for field in fields(Calibration)}


@pytest.mark.parametrize("text", ['{"base": 1, "base": 2}', '{"training": {"a": [{"b": 1, "b": 1}]}}'])
def test_a_key_that_stands_twice(folder, base, text):
    (folder / CONFIG_FILE).write_text(text)
    refused(folder, base, CONFIG_FILE, "not valid JSON: duplicate key 'b")


@pytest.mark.parametrize("depth", [400, 980, 100_000])
def test_json_deeper_than_the_stack(folder, base, depth):
    damage(folder, set_at("training", {"a": 0}))
    text = (folder / CONFIG_FILE).read_text()
    for path in ('"a": 0', '"capacity": 0.75'):
        assert path in text
        deep = path.split(":")[0] + ": " + "[" * depth + "]" * depth
        (folder / CONFIG_FILE).write_text(text.replace(path, deep))
        if path == '"a": 0' and depth == 400:  # free JSON, and not too deep
            assert read_checkpoint(folder).training["a"]
        else:
            refused(folder, base, CONFIG_FILE)


@pytest.mark.parametrize("name, limit", [(CONFIG_FILE, 2**24), (ADAPTER_FILE, 2**30)])
def test_a_file_too_large_to_be_one_of_ours(folder, base, name, limit):
    os.truncate(folder / name, limit + 1)  # sparse: takes no room on the disk
    refused(folder, base, name, f"{limit + 1} bytes, expected at most {limit}")


def test_a_changed_digit_in_a_table_is_noticed(folder, base):
    file = folder / CONFIG_FILE
    meta = json.loads(file.read_text())
    meta["calibration"]["thresholds"][0][0][0] *= 1.001
    file.write_text(json.dumps(meta))
    refused(folder, base, CONFIG_FILE, f"sha256 is '{meta['sha256']}'", "the rest has", "delete the line sha256")
    del meta["sha256"]  # what the message says
    file.write_text(json.dumps(meta))
    assert read_checkpoint(folder).calibration.thresholds == meta["calibration"]["thresholds"]


def test_spaces_and_the_order_of_keys_do_not_matter(folder, pristine):
    meta = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(dict(reversed(meta.items())), indent=4))
    assert read_checkpoint(folder).calibration == read_checkpoint(pristine).calibration


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
    with pytest.raises(HatError, match=f"not saved: '{KEY}' holds a value that is not finite"):
        write_checkpoint(tmp_path / "new", found)
    assert not (tmp_path / "new").exists()


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"training": {"loss": float("nan")}}, "number out of range: 'NaN'"),
        ({"training": {"loss": torch.tensor(1.0)}}, "Tensor is not JSON serializable"),
        ({"training": {1: "a", "1": "b"}}, "duplicate key '1'"),
        ({"training": {"steps": 10**30}}, "number out of range"),
        ({"training": deep(600)}, "recursion|nested deeper than 500"),
        ({"training": deep(100_000)}, "recursion|nested deeper than 500"),
        ({"base": "two\nlines"}, "base must be a line"),
        ({"tensors": {"lm_head.weight": torch.zeros(2)}}, "unexpected key 'lm_head.weight'"),
        ({"calibration": {"exit_rates": [[0.5]]}}, "must be all null or all lists"),
        ({"config": HatConfig(5)}, "calibration.thresholds must have 5 entries, got 4"),
    ],
)
def test_what_could_not_be_read_again_is_not_saved(pristine, folder, changes, words):
    old = read_checkpoint(folder)
    if "calibration" in changes:
        changes = {"calibration": replace(old.calibration, **changes["calibration"])}
    with pytest.raises(HatError, match=f"not saved: .*{words}"):
        write_checkpoint(folder, replace(old, **{"tensors": {KEY: torch.zeros(3)}, **changes}))
    for name in (ADAPTER_FILE, CONFIG_FILE):
        assert (folder / name).read_bytes() == (pristine / name).read_bytes()


def test_the_summary_of_a_training_is_any_json(folder):
    training = {"phases": [{"steps": 100, "loss": 1.5e-3}], "text": "ünïcode 模型", "nothing": None, "deep": deep(100)}
    write_checkpoint(folder, replace(read_checkpoint(folder), training=training))
    assert read_checkpoint(folder).training == training
    hat = HierarchicalTransformer.from_pretrained(folder, tiny())
    assert hat.training_summary == training


def test_a_folder_that_cannot_be_written(pristine, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HatError, match="cannot write a checkpoint to .*file"):
        write_checkpoint(tmp_path / "file" / "sub", read_checkpoint(pristine))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_full_disk(folder, monkeypatch, calls):
    old, rename, seen = read_checkpoint(folder), os.replace, []

    def fail(source, target):
        seen.append(target)
        if len(seen) == calls:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(HatError, match="cannot write a checkpoint to .*: No space left"):
        write_checkpoint(folder, other(old))
    assert not list(folder.glob(".*"))  # nothing half-written
    assert state(folder) == (0 if calls < 3 else 1)
    monkeypatch.undo()
    write_checkpoint(folder, other(old))
    assert state(folder) == 1 and files(folder) == [ADAPTER_FILE, CONFIG_FILE]


# A process that is killed while it saves: old or new, never neither


def other(old, number=1):
    """State ``number`` of a checkpoint; the weights and the JSON both tell which."""
    changed = {**old.tensors, KEY: torch.full((64,), float(number))}
    return replace(old, tensors=changed, training={"state": number})


def state(folder):
    """0 for a checkpoint of `adapted`, else the number given to `other`."""
    found = read_checkpoint(folder)
    number = (found.training or {"state": 0})["state"]
    assert number == 0 or torch.equal(found.tensors[KEY], torch.full((64,), float(number)))
    return number


def files(folder):
    return sorted(p.name for p in folder.iterdir())


class Killed(BaseException):
    """Not an Exception: nobody handles it."""


def save_and_die(folder, found, step, monkeypatch):
    """Save; from the given step on, the process can't do anything any more. True if it came so far."""
    seen = []

    def dying(function):
        def call(*args, **options):
            seen.append(function)
            if len(seen) > step:
                raise Killed
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "fsync", "chmod", "fdopen"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(checkpoint.tempfile, "mkstemp", dying(checkpoint.tempfile.mkstemp))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        patch.setattr(Path, "mkdir", dying(Path.mkdir))
        try:
            write_checkpoint(folder, found)
        except Killed:
            return True
    return False


def copy_of(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_killed_at_any_step_and_again_while_saving_anew(folder, tmp_path, monkeypatch):
    old = read_checkpoint(folder)
    outcomes = []
    for first in range(100):
        once = copy_of(folder, tmp_path / f"{first}")
        died = save_and_die(once, other(old, 1), first, monkeypatch)
        outcomes.append(state(once))
        # The same state again (a resumed run) and another one, with what the first kill left around.
        for number in (1, 2):
            for second in range(0, 100, 3):
                twice = copy_of(once, tmp_path / f"{first}-{number}-{second}")
                if not save_and_die(twice, other(old, number), second, monkeypatch):
                    assert state(twice) == number and files(twice) == [ADAPTER_FILE, CONFIG_FILE]
                    break
                assert state(twice) in (outcomes[-1], number)
        if not died:
            break
    # Old up to the second rename, the JSON's; new from then on.
    assert outcomes == sorted(outcomes) and set(outcomes) == {0, 1} and len(outcomes) > 12


def test_killed_during_the_first_save(pristine, tmp_path, monkeypatch):
    old, seen = read_checkpoint(pristine), set()
    for step in range(100):
        folder = tmp_path / str(step)
        died = save_and_die(folder, other(old), step, monkeypatch)
        try:
            seen.add(state(folder))
        except HatError as error:
            assert "no checkpoint folder" in str(error) or f"{CONFIG_FILE} is missing" in str(error)
            seen.add(None)
        if not died:
            break
    assert seen == {None, 1} and files(folder) == [ADAPTER_FILE, CONFIG_FILE]


def test_a_backup_beside_the_files_is_left_alone(folder):
    (folder / f"{ADAPTER_FILE}.bak").write_text("mine")
    write_checkpoint(folder, other(read_checkpoint(folder)))
    assert files(folder) == [ADAPTER_FILE, f"{ADAPTER_FILE}.bak", CONFIG_FILE]


def save_for_ever(folder, started):
    """In a process of its own: alternate between two checkpoints."""
    torch.set_num_threads(1)
    states = [other(read_checkpoint(folder), number) for number in (1, 2)]
    while True:
        for found in states:
            write_checkpoint(folder, found)
        started.set()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_sigkill_at_random_times(folder):
    context = multiprocessing.get_context("forkserver")  # imports torch once, then forks
    context.set_forkserver_preload(["hat_lib.calibration.capacity", "pytest", __name__])
    delays = random.Random(0)
    for _ in range(10):
        started = context.Event()
        process = context.Process(target=save_for_ever, args=(folder, started), daemon=True)
        process.start()
        try:
            assert started.wait(60)
            time.sleep(delays.uniform(0, 0.03))
        finally:
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert state(folder) in (1, 2)
    write_checkpoint(folder, other(read_checkpoint(folder), 3))
    assert state(folder) == 3 and files(folder) == [ADAPTER_FILE, CONFIG_FILE]
