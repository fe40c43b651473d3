"""A damaged checkpoint is one `HatError` that names the file, or a sound model; the base stays as it was.

Random damage, the same on every run: bits, lengths, names, headers, tensors, and every leaf of the JSON.
"""

import copy
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_checkpoint import FILES, OLD, damage, replace_adapter, replace_tensors, stays_as_it_was
from tiny_runs import tiny

from hat_lib.config import HatError
from hat_lib.model.checkpoint import ADAPTER_FILE, CONFIG_FILE, read_checkpoint, write_checkpoint
from hat_lib.model.transformer import HierarchicalTransformer

IDS = torch.arange(24).view(1, 24) + 30


def fuzz(examples):
    """Deterministic, and without a clock: a slow machine must not fail a test."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A calibrated checkpoint with exit tables and a summary, so that the JSON has every kind of leaf."""
    found = read_checkpoint(OLD / "channel")
    exits = {"exit_capacities": [0.5, 1.0], "exit_rates": [[0.1, 0.5, 0.9]] * 2, "exit_scores": [[[3], [2], [1]]] * 2}
    summary = {"steps": 3, "loss": [0.5, 0.25], "done": True, "note": None}
    found = replace(found, calibration=replace(found.calibration, **exits), training=summary)
    return write_checkpoint(tmp_path_factory.mktemp("fuzz") / "a folder, ünïcode 模型", found)


@pytest.fixture(scope="module")
def load(pristine):
    """Load the damaged folder and check all that has to hold whatever was done to it.

    Returns the error's message, or "" for a model that loads and runs.
    """
    damaged, base = pristine.parent / "damaged", tiny()

    def attempt():
        with stays_as_it_was(base):
            try:
                hat = HierarchicalTransformer.from_pretrained(damaged, base)
            except HatError as error:
                message = str(error)
                assert str(damaged) in message and "\n" not in message, message
                assert len(message) < len(str(damaged)) + 400
                return message
            with torch.inference_mode():
                assert hat.lm(IDS).logits.isfinite().all()
            hat.unload()
            return ""

    return attempt


@pytest.fixture
def fresh(pristine):
    """A function that undoes all damage."""
    damaged = pristine.parent / "damaged"

    def undo():
        shutil.rmtree(damaged, ignore_errors=True)
        return shutil.copytree(pristine, damaged)

    return undo


def refused(message, *words):
    assert message, "loaded, although it is damaged"
    for word in words:
        assert word in message, message


# The files


def test_undamaged(fresh, load):
    fresh()
    assert load() == ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "a flipped bit", "bytes added", "something else"])
@fuzz(40)
@given(
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    extra=st.binary(max_size=300) | st.text(max_size=50).map(str.encode),
)
def test_other_bytes(fresh, load, name, how, where, bit, extra):
    file = fresh() / name
    before = file.read_bytes()
    at = int(where * len(before))
    after = {
        "truncated": before[:at],
        "a flipped bit": before[:at] + bytes([before[at] ^ 1 << bit]) + before[at + 1 :],
        "bytes added": before[:at] + extra + before[at:],
        "something else": extra,
    }[how]
    file.write_bytes(after)
    message = load()
    if message:
        refused(message, f"{name}: ", "SHA-256" if name == ADAPTER_FILE else "")
    elif after != before:  # a digit beyond a float's precision, or 1e5 for 1E5
        assert name == CONFIG_FILE and json.loads(after) == json.loads(before)


# The adapter, with its right hash in the JSON


@fuzz(60)
@given(data=st.data())
def test_other_tensors(fresh, load, data):
    folder = fresh()
    tensors = load_file(folder / ADAPTER_FILE)
    name = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["drop", "add", "rename", "reshape", "dtype", "value", "empty"]))
    if how == "drop":
        del tensors[name]
    elif how == "add":
        new = data.draw(st.text(min_size=1, max_size=300).filter(lambda text: text not in tensors))
        tensors[data.draw(st.sampled_from([new, f"routers.{new}", f"gates.{new}"]))] = torch.zeros(2)
    elif how == "rename":
        tensors[data.draw(st.sampled_from([name + "x", name[1:], name.upper(), "lm_head.weight"]))] = tensors.pop(name)
    elif how == "reshape":
        shape = data.draw(st.lists(st.integers(0, 5), max_size=9).filter(lambda s: s != list(tensors[name].shape)))
        tensors[name] = torch.zeros(shape)
    elif how == "dtype":
        kinds = ["float16", "bfloat16", "float64", "int64", "int8", "bool", "complex64", "float8_e4m3fn", "uint16"]
        tensors[name] = tensors[name].to(getattr(torch, data.draw(st.sampled_from(kinds))))
    elif how == "value":
        flat = tensors[name].view(-1)
        where = data.draw(st.integers(0, flat.numel() - 1))
        flat[where] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    else:
        tensors = {}
    replace_tensors(folder, tensors)
    words = {"value": "not finite", "dtype": "must be torch.float32", "reshape": "shape", "drop": f"'{name}'"}
    refused(load(), ADAPTER_FILE, words.get(how, "key"))


HEADER_VALUES = st.one_of(
    st.sampled_from(["F32", "F16", "F64", "BOOL", "F8_E8M0", "F4", "C64", "U64", "f32"]),
    st.sampled_from(["", None, -1, 2**31, 2**63, 2**64, 1.5]),
    st.lists(st.sampled_from([0, 1, 2, -1, 64, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, None, "1"]), max_size=9),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
BITS = {"F32": 32, "F16": 16, "BOOL": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "U64": 64}


def file_of(header, body, size=None):
    """A safetensors file, or what says that it is one."""
    text = json.dumps(header).encode()
    return (len(text) if size is None else size % 2**64).to_bytes(8, "little") + text + body


@fuzz(60)
@given(
    dtype=st.sampled_from(sorted(BITS)),
    shape=st.sampled_from([[], [0], [8], [2, 4], [1] * 65, [0, 2**63], [2**62, 0], [0] * 100]),
    name=st.text(max_size=200).map("routers.{}".format),
)
def test_a_tensor_that_torch_may_not_know(fresh, load, dtype, shape, name):
    size = BITS[dtype] * (0 if 0 in shape else math.prod(shape)) // 8
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    replace_adapter(fresh(), file_of(header, b"\1" * size))
    refused(load(), ADAPTER_FILE)


@fuzz(100)
@given(data=st.data())
def test_a_header_that_lies(fresh, load, data):
    folder = fresh()
    payload = (folder / ADAPTER_FILE).read_bytes()
    start, size = 8 + int.from_bytes(payload[:8], "little"), None
    header, body = json.loads(payload[8:start]), payload[start:]
    name = data.draw(st.sampled_from(sorted(header)))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "whole", "metadata", "size", "body", "none"]))
    if key in header[name]:
        header[name][key] = data.draw(HEADER_VALUES)
    elif key in ("whole", "metadata"):
        header[name if key == "whole" else "__metadata__"] = data.draw(HEADER_VALUES)
    elif key == "body":
        body = body[: data.draw(st.integers(0, len(body)))] + b"\0" * data.draw(st.integers(0, 9))
    elif key == "size":
        size = data.draw(st.sampled_from([0, 1, start - 9, start - 7, 2**31, 2**63, 2**64 - 1]))
    replace_adapter(folder, file_of(header, body, size))
    message = load()
    if message:
        refused(message, ADAPTER_FILE)
    else:  # the lie was none
        tensors = load_file(folder / ADAPTER_FILE)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_checkpoint(folder).tensors.items())


# The JSON

OTHER = [None, True, False, 0, 1, -1, 3, 0.5, 1e308, -1e308, 1e400, float("nan"), 10**30]
OTHER += ["", "x", "0.5", "\ud800", [], [1], [[]], {}, {"a": 1}]


def draw_change(data, meta):
    """Put something else somewhere, on a leaf or a branch, delete it, or add to it; every depth is as likely."""
    parent, node = None, meta
    while parent is None or (isinstance(node, dict | list) and node and data.draw(st.integers(0, 4))):
        parent = node
        key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        node = parent[key]
    what = data.draw(st.sampled_from(["replace", "replace", "delete", "add"]))
    value = copy.deepcopy(data.draw(st.sampled_from(OTHER)))
    if what == "delete":
        del parent[key]
    elif what == "replace":
        parent[key] = value
    elif isinstance(parent, dict):
        parent[data.draw(st.text(max_size=200))] = value
    else:
        parent.insert(key, value)


@pytest.mark.parametrize("by_hand", [False, pytest.param(True, marks=pytest.mark.slow)])
@fuzz(150)
@given(data=st.data())
def test_any_change_of_the_json(fresh, load, by_hand, data):
    """Without the digest a change may be taken; then it is a sound model that runs, which `load` checks."""
    folder = fresh()
    if by_hand:
        damage(folder, lambda meta: draw_change(data, meta))
        message = load()
        assert message == "" or CONFIG_FILE in message or ADAPTER_FILE in message
        if not message:
            write_checkpoint(folder, read_checkpoint(folder))  # and one that can be saved
            assert load() == ""
        return
    meta = json.loads((folder / CONFIG_FILE).read_text())
    before = json.dumps({**meta, "sha256": ""}, sort_keys=True)
    draw_change(data, meta)
    (folder / CONFIG_FILE).write_text(json.dumps(meta))
    message, same = load(), before == json.dumps({**meta, "sha256": ""}, sort_keys=True)
    if same and "sha256" not in meta:
        assert message == ""  # only the digest was deleted
    elif message or not same:
        refused(message, CONFIG_FILE)


@fuzz(40)
@given(
    text=st.recursive(
        st.none() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    ).map(json.dumps)
)
def test_other_json(fresh, load, text):
    (fresh() / CONFIG_FILE).write_text(text)
    refused(load(), CONFIG_FILE)
