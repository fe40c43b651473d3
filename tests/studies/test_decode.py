"""Rows of the decode experiment, with few, short rounds; nothing is asserted about speed."""

import sys
import types

import pytest
import torch

from hat_lib.backbone.machine import cpu_name
from hat_lib.config import HatError
from hat_lib.model.cost import Work
from hat_lib.model.fast_path import WEIGHT_FORMATS
from studies import decode

pytestmark = [pytest.mark.slow, pytest.mark.bundled]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(decode, "SHAPE", "random:tiny")
    monkeypatch.setattr(decode, "HELD_OUT", 40)


@pytest.mark.usefixtures("small")
def test_rows(monkeypatch, tmp_path):
    class Llama:
        """A stand-in for llama.cpp's class."""

        def __init__(self, path, **settings):
            assert str(path).endswith(".gguf") and settings["n_threads"] >= 1
            self.seen = 0

        def reset(self):
            self.seen = 0

        def eval(self, tokens):
            self.seen += len(tokens)

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    found = list(decode.rows(capacities=[1.0, 0.5], together=2, rounds=1, steps=2, dtype="fp32"))
    names = ["float32", *WEIGHT_FORMATS[1:]]
    both = [
        ("hf", "float32", 1, 1.0),
        ("reference", "float32", 1, 1.0),
        ("read", "float32", 1, 1.0),
        *(("engine", name, 1, c) for name in names for c in (1.0, 0.5)),
        ("hf", "float32", 2, 1.0),
        *(("engine", name, 2, c) for name in names for c in (1.0, 0.5)),
    ]
    bundled = [both[0], ("hf_before", "float32", 1, 1.0), *both[1:]]
    bundled.insert(bundled.index(("hf", "float32", 2, 1.0)), ("llama.cpp", "q4_1", 1, 1.0))
    assert [(r.base, r.way, r.weights, r.sequences, r.capacity) for r in found] == [
        *(("bundled", *way) for way in bundled),
        *(("random:tiny", *way) for way in both),
    ]
    for r in found:
        assert r.low <= r.ms <= r.high and r.tokens_per_second == pytest.approx(1e3 / r.ms, rel=1e-3)
        assert (r.over_hf is None) == (r.way == "hf") and r.cpu == cpu_name()
        if r.way == "engine":
            assert abs(r.realised - r.capacity) < 0.15 and r.over_dense_low <= r.over_dense <= r.over_dense_high
            assert r.copy_mib > 0 and (r.ideal is None) == (r.sequences > 1)
            if r.ideal:
                assert r.ideal == pytest.approx(1) if r.capacity == 1 else 1.1 < r.ideal < 2.3
            if r.base == "bundled" and r.sequences == 1:
                low, high = (0.01, 1) if r.capacity < 1 else (-1e-6, 1e-6) if r.weights == "float32" else (1e-5, 0.1)
                assert low < r.kl < high, "dense is the base, fewer bits are near to it, less work is farther"
            else:
                assert r.kl is None
        else:
            assert r.over_dense is r.kl is r.copy_mib is None
    done = {tuple(getattr(r, name) for name in decode.KEY) for r in found}
    assert not list(decode.rows(done, capacities=[1.0, 0.5], together=2, rounds=1, steps=1, dtype="fp32"))


def test_a_format_s_ideal_is_in_the_bytes_that_it_reads():
    """Half of 1000 weights of the layers, 200 of the head; in four bits, all scales are read."""
    dense, executed = ({"ffn": torch.tensor(2.0 * n), "head": torch.tensor(400.0)} for n in (1000, 500))
    ideal = {form: decode._ideal(Work({}, executed, {}, dense), 2, form) for form in ("base", "int8", "q4")}
    assert ideal == {"base": 2400 / 1400, "int8": 1200 / 700, "q4": 825 / 575}
    assert set(decode.READ) >= set(WEIGHT_FORMATS) - {"base"}


def test_a_checkpoint_of_the_other_grain():
    with pytest.raises(HatError, match="expected a checkpoint of the channel grain"):
        list(decode.rows(checkpoint=decode.CHECKPOINTS / "token"))


@pytest.mark.usefixtures("small")
def test_without_an_engine(monkeypatch):
    monkeypatch.setattr("hat_lib.model.fast_path.UNAVAILABLE", "no numba")
    with pytest.raises(HatError, match="no engine to measure: reference path .no numba"):
        list(decode.rows(dtype="fp32"))


def test_without_llama_cpp(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert decode.llama_cpp(None, 1) is None
