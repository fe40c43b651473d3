"""What is saved is loaded bit for bit; anything else is a single error, and the base stays as it was.

``version_0/<grain>`` was written before files had a version: a checkpoint on ``random:tiny`` with exits and, in
``expected.safetensors``, what it did to a text: logits ``[3, V]`` of the last tokens, shares ``[L, S, 1, T]`` and
exit layers ``[1, T]``. No score of that text is within 0.5 % of its threshold.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from tiny_runs import GRAINS, tiny, untrained

from hat_lib import __version__
from hat_lib.backbone.base import exact_hash, fingerprint
from hat_lib.config import DATA, HatConfig, HatError
from hat_lib.model import checkpoint
from hat_lib.model.checkpoint import ADAPTER_FILE, CONFIG_FILE, is_hat_parameter, read_checkpoint, write_checkpoint
from hat_lib.model.threshold_table import EXIT_TABLES, HEAD_TABLES, TABLES, Calibration
from hat_lib.model.transformer import HierarchicalTransformer

pytestmark = pytest.mark.filterwarnings("ignore:token grain")

OLD = Path(__file__).with_name("version_0")
FILES = (CONFIG_FILE, ADAPTER_FILE)
KEY = "routers.2_qkv.log_scale"


def logits(hat, ids):
    with torch.inference_mode():
        return hat.lm(ids).logits


@contextmanager
def stays_as_it_was(base):
    before = exact_hash(base.model), [p.stride() for p in base.model.parameters()]
    yield
    assert (exact_hash(base.model), [p.stride() for p in base.model.parameters()]) == before
    assert not any("forward" in vars(module) for module in base.model.modules())
    assert not base.model.model._forward_pre_hooks and not base.model.model._forward_hooks


@pytest.fixture
def base():
    """A separate base: whatever a failed load leaves behind would show here."""
    base = tiny()
    with stays_as_it_was(base):
        yield base


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A channel-grain checkpoint in the current format, with every kind of field."""
    folder = tmp_path_factory.mktemp("pristine") / "a folder, ünïcode 模型"
    write_checkpoint(folder, read_checkpoint(OLD / "channel"))
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of it, free to be damaged."""
    return shutil.copytree(pristine, tmp_path / "copy")


def damage(folder, change):
    """Apply ``change`` to the parsed JSON and write it back, like a person editing it by hand."""
    meta = json.loads((folder / CONFIG_FILE).read_text())
    meta.pop("sha256", None)
    change(meta)
    (folder / CONFIG_FILE).write_text(json.dumps(meta))


def set_at(folder, path, value):
    """Set ``meta[a][b]...`` for the path "a.b...", or delete it for ``...``."""

    def change(meta):
        *parents, last = [int(k) if k.isdigit() else k for k in path.split(".")]
        for key in parents:
            meta = meta[key]
        meta[last] = value
        if value is ...:
            del meta[last]

    damage(folder, change)


def replace_adapter(folder, payload):
    """Another adapter, with its hash in the JSON, so that only its contents can give it away."""
    (folder / ADAPTER_FILE).write_bytes(payload)
    damage(folder, lambda meta: meta.update(adapter_sha256=hashlib.sha256(payload).hexdigest()))


def replace_tensors(folder, tensors):
    replace_adapter(folder, save(tensors))


def refused(folder, base, *words):
    """Loading fails with one line that contains all the words."""
    with pytest.raises(HatError) as caught:
        HierarchicalTransformer.from_pretrained(folder, base)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in (str(folder), *words):
        assert word in message, message


# Versions


@pytest.mark.parametrize("grain", GRAINS)
def test_a_checkpoint_of_version_0_decides_as_it_did(grain, base, tmp_path):
    expected = load_file(OLD / grain / "expected.safetensors")
    hat = HierarchicalTransformer.from_pretrained(OLD / grain, base)
    assert (hat.capacity, hat.exit_rate, hat.training_summary) == (0.6, 0.25, {"steps": 3})
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
    assert json.loads((tmp_path / "new" / CONFIG_FILE).read_text())["format_version"] == checkpoint.FORMAT_VERSION >= 1
    assert (tmp_path / "new" / ADAPTER_FILE).read_bytes() == (OLD / grain / ADAPTER_FILE).read_bytes()


@pytest.mark.parametrize("folder", sorted((DATA / "checkpoints").iterdir()), ids=lambda folder: folder.name)
def test_published_checkpoints_are_read(folder):
    meta = json.loads((folder / CONFIG_FILE).read_text())
    assert meta.pop("sha256") == checkpoint.digest(meta)
    found = read_checkpoint(folder)
    assert found.base == "bundled" and found.config.to_dict() == {"correction_rank": None} | meta["config"]
    assert asdict(found.calibration) == dict.fromkeys(HEAD_TABLES) | meta["calibration"]
    assert found.training == meta["training"]


@pytest.mark.parametrize("version", [..., 0, checkpoint.FORMAT_VERSION])
def test_what_an_older_version_did_not_have_takes_its_default(folder, version):
    before = read_checkpoint(folder)
    tables = dict.fromkeys(HEAD_TABLES + EXIT_TABLES)
    config = (f"config.{name}" for name in ("exit_rate", "capacity", "granularity", "protected_tokens"))
    for path in ("training", "calibration.method", *(f"calibration.{name}" for name in tables), *config):
        set_at(folder, path, ...)
    set_at(folder, "format_version", version)
    found = read_checkpoint(folder)
    assert found.config == HatConfig(4, exit_layers=(2,))
    assert found.calibration == replace(before.calibration, method="damage", **tables)
    assert found.training is None


def test_a_newer_version_is_refused_before_anything_else_is_read(folder, base):
    newer = checkpoint.FORMAT_VERSION + 1
    damage(folder, lambda meta: meta.update(format_version=newer, invented_later=1, config={"also": "new"}))
    ours = f"hat_lib {__version__} reads versions up to {checkpoint.FORMAT_VERSION}: upgrade hat_lib"
    refused(folder, base, f"{CONFIG_FILE}: format_version is {newer}, {ours}")


# Round trip


def test_saving_again_gives_the_same_bytes(pristine, tmp_path):
    HierarchicalTransformer.from_pretrained(pristine, tiny()).save_pretrained(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (pristine / name).read_bytes()


def test_the_checkpoint_names_its_base_and_another_name_may_be_given(pristine, base, tmp_path):
    assert HierarchicalTransformer.from_pretrained(pristine, dtype="fp32", device="cpu").base.name == "random:tiny"
    assert HierarchicalTransformer.from_pretrained(pristine, "random:tiny").base.name == "random:tiny"
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    hat = HierarchicalTransformer.from_pretrained(pristine, tmp_path, dtype="fp32", device="cpu")
    assert hat.base.fingerprint == base.fingerprint and hat.base.name == str(tmp_path)


@pytest.mark.parametrize("grain", GRAINS)
def test_only_the_adapter_is_saved_and_all_of_it(grain, base, tmp_path):
    """Uncalibrated, so it runs everything after loading."""
    hat = untrained(grain, base)
    with torch.no_grad():
        for number, parameter in enumerate(hat.hat_parameters().values()):
            parameter += number + 1
    hat.save_pretrained(tmp_path)
    hat.unload()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    assert all(is_hat_parameter(name) for name in tensors) and {t.dtype for t in tensors.values()} == {torch.float32}
    loaded = HierarchicalTransformer.from_pretrained(tmp_path, base)
    assert loaded.calibration is None and loaded.capacity == 1.0
    parameters = loaded.hat_parameters()
    assert parameters.keys() == hat.hat_parameters().keys() == tensors.keys()
    assert all(torch.equal(p, hat.hat_parameters()[name]) for name, p in parameters.items())
    loaded.unload()


@pytest.mark.parametrize("grain", GRAINS)
def test_neither_use_nor_training_changes_the_base(grain, base):
    hat = HierarchicalTransformer.from_pretrained(OLD / grain, base)
    ids, before = load_file(OLD / grain / "expected.safetensors")["ids"], exact_hash(base.model)
    for capacity in (0.8, 1.0, 0.6):
        hat.capacity = capacity
        hat.lm.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert (fingerprint(hat.lm), exact_hash(hat.lm)) == (base.fingerprint, before)
    hat.train()
    step = torch.optim.SGD(hat.parameters(), lr=1.0)
    hat.lm(ids).logits.square().mean().backward()
    adapter = {name: parameter.clone() for name, parameter in hat.hat_parameters().items()}
    step.step()
    assert exact_hash(hat.lm) == before and all(p.grad is None for p in base.model.parameters())
    assert any(not torch.equal(parameter, adapter[name]) for name, parameter in hat.hat_parameters().items())
    hat.eval()
    hat.unload()


# Refused: the wrong base, or not a checkpoint


def test_another_base_is_refused_by_fingerprint(folder, base):
    other = replace(base, fingerprint="f" * 64, name="another")
    refused(folder, other, "random:tiny", base.fingerprint[:12], "another has ffffffffffff")


@pytest.mark.parametrize("name", ["file/nowhere", "n" * 300, "a\0b"])
def test_a_missing_folder_that_cannot_be_made(pristine, tmp_path, base, name):
    (tmp_path / "file").write_text("in the way")
    refused(tmp_path / name, base, "no checkpoint folder")
    with pytest.raises(HatError, match="cannot write a checkpoint to"):
        write_checkpoint(tmp_path / name, read_checkpoint(pristine))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file(folder, base, name):
    file = folder / name
    file.rename(folder / "elsewhere")
    refused(folder, base, f"{name} is missing")
    torch.save({KEY: torch.zeros(64)}, folder / "pytorch_model.bin")
    refused(folder, base, "pytorch_model.bin is a pickle")  # and is never opened
    kinds = [Path.mkdir, lambda path: path.symlink_to("nowhere")]
    if hasattr(os, "mkfifo"):  # reading one would block forever
        kinds.append(os.mkfifo)
    for make in kinds:
        make(file)
        refused(folder, base, f"{name} is not a file")
        file.rmdir() if file.is_dir() else file.unlink()
    file.symlink_to("elsewhere")  # as in the Hub's cache
    assert read_checkpoint(folder).base == "random:tiny"


def test_a_run_without_a_finished_phase_is_no_checkpoint_yet(base, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    refused(tmp_path, base, "holds a training run without a finished phase: hat train --resume")


def test_a_file_that_the_disk_refuses(folder, base, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    refused(folder, base, f"cannot read {folder / CONFIG_FILE}: Input/output error")


@pytest.mark.parametrize("name, limit", [(CONFIG_FILE, 2**24), (ADAPTER_FILE, 2**30)])
def test_a_file_too_large_to_be_one_of_ours(folder, base, name, limit):
    os.truncate(folder / name, limit + 1)  # sparse: takes no disk space
    refused(folder, base, name, f"{limit + 1} bytes, expected at most {limit}")


def test_the_home_folder(pristine, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint("~/mine", read_checkpoint(pristine))
    assert (tmp_path / "mine" / CONFIG_FILE).is_file() and read_checkpoint("~/mine").base == "random:tiny"


NO_EXITS = dict.fromkeys(EXIT_TABLES)


@pytest.mark.parametrize(
    "config, tables, words",
    [
        ({"n_layers": 5}, None, "the config is for 5 layers, random:tiny has 4"),
        ({"translator_rank": 10**13}, None, "translator_rank must be at most 64, the hidden size of"),
        ({"correction_rank": 65}, None, "correction_rank must be at most 64, the hidden size of random:tiny, got 65"),
        ({}, {"sites": ["ffn"]}, r"calibration.sites must be \['qkv',"),
        ({}, {"thresholds": [[[0.0]]]}, "calibration.thresholds must have 4 entries, got 1"),
        ({"exit_layers": (1, 2)}, {}, r"calibration.exit_scores\[0\]\[0\] must have 2 entries, got 1"),
        ({"exit_layers": (), "exit_rate": 0.2}, NO_EXITS, "without exit layers"),
        ({"exit_rate": 0.2}, NO_EXITS, "needs trained exit gates"),
    ],
)
def test_a_constructor_that_fails_leaves_the_base_clean(base, config, tables, words):
    calibration = tables if tables is None else replace(read_checkpoint(OLD / "channel").calibration, **tables)
    config = HatConfig(**{"n_layers": 4, "exit_layers": (2,), "capacity": 0.6, **config})
    with pytest.raises(HatError, match=words):
        HierarchicalTransformer(base, config, calibration)
    hat = HierarchicalTransformer(base, HatConfig(4))
    if "calibration" in words and config.exit_layers == (2,):
        with pytest.raises(HatError, match=words):
            hat.calibration = calibration
        assert hat.calibration is None
    hat.unload()


# Refused: the weights


@pytest.mark.parametrize(
    "changes, words",
    [
        ({KEY: None}, f"missing key '{KEY}', expected shape (64,)"),
        ({"routers.9_qkv.log_scale": torch.zeros(64)}, "unexpected key 'routers.9_qkv.log_scale' of shape (64,)"),
        ({"lm_head.weight": torch.zeros(2)}, "unexpected key 'lm_head.weight': not a parameter of a router"),
        ({KEY: torch.zeros(65)}, f"'{KEY}' has shape (65,), expected (64,)"),
        ({KEY: torch.full((64,), float("nan"))}, f"'{KEY}' holds a value that is not finite"),
        ({KEY: torch.zeros(64).half()}, f"'{KEY}' must be torch.float32, got torch.float16"),
    ],
)
def test_wrong_weights(folder, base, changes, words):
    tensors = load_file(folder / ADAPTER_FILE) | changes
    replace_tensors(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    refused(folder, base, ADAPTER_FILE, words)


# Refused: the JSON


TWICE = ['{"base": 1, "base": 2}', '{"training": {"a": [{"b": 1, "b": 1}]}}']


@pytest.mark.parametrize("text", ["", "{", "\ufeff{}", '{"config": 1', b"\xff\xfe{}", *TWICE])
def test_no_json(folder, base, text):
    (folder / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, base, CONFIG_FILE, "not valid JSON: " + ("duplicate key 'b" if text in TWICE else ""))


@pytest.mark.parametrize(("text", "shown"), [("[]", "[]"), ("3", "3"), ("null", "None")])
def test_json_of_no_object(folder, base, text, shown):
    (folder / CONFIG_FILE).write_text(text)
    refused(folder, base, CONFIG_FILE, f"expected an object, got {shown}")


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("base", "a\nb", "base must be a line of 1 to 1000 characters, got 'a\\nb'"),
        ("adapter_sha256", "../../elsewhere", "adapter_sha256 must be 64 hex digits, got '../../elsewhere'"),
        ("library_version", ..., "missing fields in the file: ['library_version']"),
        ("surprise", 1, "unknown fields in the file: ['surprise']"),
        ("sha256", None, "sha256 is None, the rest has"),
        ("format_version", "1", "format_version must be a whole number of at least 0, got '1'"),
        ("format_version", True, "format_version must be a whole number of at least 0, got True"),
        ("config", [], "config must be an object, got list"),
        ("training", 3, "training must be an object or null, got 3"),
        ("config.capacity", 7, "capacity must be a number in [0.1, 1.0], got 7"),
        ("config.exit_layers", [3, 1], "exit layers must be sorted and distinct, got [3, 1]"),
        ("config.exit_layers", 3, "exit_layers must be a list, got 3"),
        ("config.capacity", "0.5", "capacity must be a number, got '0.5'"),
        ("config.translator_rank", 65, "translator_rank must be at most 64, the hidden size of random:tiny, got 65"),
        ("training.steps", 2**63, "not valid JSON: number out of range: '9223372036854775808'"),
        ("config.capacity", 10**400, "not valid JSON: number out of range"),
        ("calibration", 3, "calibration must be an object, got int"),
        ("calibration.shares", ..., "missing fields in calibration: ['shares']"),
        ("calibration.shares", "0.5", "calibration.shares must be a list, got '0.5'"),
        ("calibration.shares.1.2", [0.5], "calibration.shares[1][2] must have 2 entries, got 1"),
        ("calibration.shares.1.2.0", -0.1, "calibration.shares[1][2][0] must be a number in [0, 1], got -0.1"),
        ("calibration.thresholds.3.3.0", "low", "calibration.thresholds[3][3][0] must be a number in [-inf, inf]"),
        ("calibration.thresholds.3.3.0", float("nan"), "not valid JSON: number out of range: 'NaN'"),
        ("calibration.thresholds.3.3.0", -1, "calibration.thresholds[3][3] must be in falling order, got [-1,"),
        ("calibration.capacities", [], "calibration.capacities must have 1 entries, got 0"),
        ("calibration.capacities", [0.7, 0.6, 1], "calibration.capacities must be in rising order, got [0.7,"),
        ("calibration.capacities.1", 0.99, "calibration.capacities must end at 1, got 0.99"),
        ("calibration.sites.0", "q", "calibration.sites must be ['qkv', 'o', 'gate_up', 'down'], got ['q',"),
        ("calibration.method", None, "calibration.method must be a str, got None"),
        ("calibration.exit_rates", [[0.5, 0.1]], "calibration.exit_rates[0] must be in rising order, got [0.5, 0.1]"),
        ("calibration.exit_capacities", None, "exit_rates and exit_scores must be all null or all lists"),
        ("calibration.exit_scores.0.0", [1, 0], "calibration.exit_scores[0][0] must have 1 entries, got 2"),
    ],
)
def test_wrong_json(folder, base, path, value, words):
    set_at(folder, path, value)
    refused(folder, base, CONFIG_FILE, words)


def test_exit_tables_and_all_others_are_checked(folder, base):
    for name in ("exit_capacities", "exit_rates", "exit_scores"):
        set_at(folder, f"calibration.{name}", None)
    refused(folder, base, "exit_rate 0.25 needs trained exit gates, but calibration.exit_rates is null")
    assert {*TABLES, "sites", "method", "text"} == {field.name for field in fields(Calibration)}


@pytest.mark.parametrize("depth", [400, 600, 980, 100_000])
@pytest.mark.parametrize("place", ['"steps": 3', '"capacity": 0.6'])
def test_json_deeper_than_the_stack(folder, base, place, depth):
    damage(folder, lambda meta: None)
    text = (folder / CONFIG_FILE).read_text()
    assert place in text
    (folder / CONFIG_FILE).write_text(text.replace(place, place.split(":")[0] + ": " + "[" * depth + "]" * depth))
    if "steps" in place and depth == 400:  # free-form JSON, and not too deep
        assert read_checkpoint(folder).training["steps"]
    else:
        refused(folder, base, CONFIG_FILE)


def test_a_changed_digit_in_a_table_is_noticed(folder, base):
    file = folder / CONFIG_FILE
    meta = json.loads(file.read_text())
    meta["calibration"]["thresholds"][0][0][0] *= 1.001
    file.write_text(json.dumps(meta))
    refused(folder, base, CONFIG_FILE, f"sha256 is '{meta['sha256']}'", "the rest has", "delete the line sha256")
    del meta["sha256"]  # as the message advises
    file.write_text(json.dumps(dict(reversed(meta.items())), indent=4))  # spaces and order do not matter
    assert read_checkpoint(folder).calibration.thresholds == meta["calibration"]["thresholds"]


# Writing


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
        ({"training": deep(100_000)}, "recursion|nested deeper than 500"),
        ({"base": "two\nlines"}, "base must be a line"),
        ({"tensors": {"lm_head.weight": torch.zeros(2)}}, "unexpected key 'lm_head.weight'"),
        ({"tensors": {KEY: torch.tensor(float("nan"))}}, f"'{KEY}' holds a value that is not finite"),
        ({"calibration": {"exit_rates": None}}, "must be all null or all lists"),
        ({"config": HatConfig(5)}, "calibration.thresholds must have 5 entries, got 4"),
    ],
)
def test_what_could_not_be_read_again_is_not_saved(pristine, folder, changes, words):
    old = read_checkpoint(folder)
    if "calibration" in changes:
        changes = {"calibration": replace(old.calibration, **changes["calibration"])}
    for target in (folder, folder / "new"):
        with pytest.raises(HatError, match=f"not saved: .*{words}"):
            write_checkpoint(target, replace(old, **{"tensors": {KEY: torch.zeros(3)}, **changes}))
    assert files(folder) == sorted(FILES)
    assert all((folder / name).read_bytes() == (pristine / name).read_bytes() for name in FILES)


def test_the_summary_of_a_training_is_any_json(folder):
    training = {"phases": [{"steps": 100, "loss": 1.5e-3}], "text": "ünïcode 模型", "nothing": None, "deep": deep(100)}
    write_checkpoint(folder, replace(read_checkpoint(folder), training=training))
    assert read_checkpoint(folder).training == training
    assert HierarchicalTransformer.from_pretrained(folder, tiny()).training_summary == training


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_full_disk(folder, monkeypatch, calls):
    old, rename, seen = read_checkpoint(folder), os.replace, []

    def fail(source, target):
        seen.append(target)
        if len(seen) == calls:
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(HatError, match="cannot write a checkpoint to .*: No space left"):
            write_checkpoint(folder, other(old))
    assert not list(folder.glob(".*"))  # nothing half-written
    assert state(folder) == (0 if calls < 3 else 1)
    (folder / f"{ADAPTER_FILE}.bak").write_text("the user's own")
    write_checkpoint(folder, other(old))
    assert state(folder) == 1 and files(folder) == [ADAPTER_FILE, f"{ADAPTER_FILE}.bak", CONFIG_FILE]


# A process killed while saving leaves the old state or the new one, never neither


def other(old, number=1):
    """State ``number`` of a checkpoint, recorded in both the weights and the JSON."""
    changed = {**old.tensors, KEY: torch.full((64,), float(number))}
    return replace(old, tensors=changed, training={"state": number})


def state(folder):
    """0 for the pristine checkpoint, else the number given to `other`."""
    found = read_checkpoint(folder)
    number = found.training.get("state", 0)
    assert number == 0 or torch.equal(found.tensors[KEY], torch.full((64,), float(number)))
    return number


def files(folder):
    return sorted(p.name for p in folder.iterdir())


class Killed(BaseException):
    """Not an Exception, so that nothing handles it."""


def save_and_die(folder, found, step, monkeypatch):
    """Save; from the given step on, the process can no longer do anything. True if it got that far."""
    seen = []

    def dying(function):
        def call(*args, **options):
            seen.append(function)
            if len(seen) > step:
                raise Killed
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        steps = [(os, name) for name in ("replace", "unlink", "fsync", "chmod", "fdopen")]
        for owner, name in [*steps, (checkpoint.tempfile, "mkstemp"), (Path, "unlink"), (Path, "mkdir")]:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            write_checkpoint(folder, found)
        except Killed:
            return True
    return False


def test_killed_at_any_step_and_again_while_saving_anew(folder, tmp_path, monkeypatch):
    old = read_checkpoint(folder)
    outcomes = []
    for first in range(100):
        once = shutil.copytree(folder, tmp_path / f"{first}")
        died = save_and_die(once, other(old, 1), first, monkeypatch)
        outcomes.append(state(once))
        # The same state again (a resumed run) and another one, with what the first kill left behind.
        for number in (1, 2):
            for second in range(0, 100, 3):
                twice = shutil.copytree(once, tmp_path / f"{first}-{number}-{second}")
                if not save_and_die(twice, other(old, number), second, monkeypatch):
                    assert state(twice) == number and files(twice) == sorted(FILES)
                    break
                assert state(twice) in (outcomes[-1], number)
        if not died:
            break
    # Old up to the second rename, that of the JSON; new from then on.
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
    assert seen == {None, 1} and files(folder) == sorted(FILES)
