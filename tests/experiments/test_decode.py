"""Rows of the decode experiment, with few and short rounds; nothing is asserted about a speed."""

import sys
import types

import pytest

from hat_lib.config import HatError
from hat_lib.experiments import decode

pytestmark = [pytest.mark.slow, pytest.mark.bundled]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(decode, "SHAPE", "random:tiny")


@pytest.mark.usefixtures("small")
def test_rows(monkeypatch, tmp_path):
    class Llama:
        """What stands in for llama.cpp's."""

        def __init__(self, path, **settings):
            assert str(path).endswith(".gguf") and settings["n_threads"] >= 1
            self.seen = 0

        def reset(self):
            self.seen = 0

        def eval(self, tokens):
            self.seen += len(tokens)

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    found = list(decode.rows(capacities=[1.0, 0.5], rounds=2, steps=2, dtype="fp32"))
    ways = [(r.base, r.way, r.weights, r.capacity) for r in found]
    both = [
        ("hf", "float32", 1.0),
        ("reference", "float32", 1.0),
        *(("engine", f, c) for f in ("float32", "int8", "q4") for c in (1.0, 0.5)),
    ]
    assert ways == [("bundled", *w) for w in [*both, ("llama.cpp", "q4_1", 1.0)]] + [("random:tiny", *w) for w in both]
    for r in found:
        assert r.high <= r.ms <= r.low and r.tokens_per_second == pytest.approx(1e3 / r.ms, rel=1e-3)
        if r.way == "engine":
            assert abs(r.realised - r.capacity) < 0.15 and r.over_dense_low <= r.over_dense <= r.over_dense_high
            assert r.ideal == pytest.approx(1) if r.capacity == 1 else 1.2 < r.ideal < 2
        else:
            assert r.over_dense is None
    done = {tuple(getattr(r, name) for name in decode.KEY) for r in found}
    assert not list(decode.rows(done, capacities=[1.0, 0.5], rounds=1, steps=1, dtype="fp32"))


def test_a_checkpoint_of_the_other_grain():
    with pytest.raises(HatError, match="expected a checkpoint of the channel grain"):
        list(decode.rows(checkpoint=decode.CHECKPOINTS / "token"))


def test_without_llama_cpp(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert decode.llama_cpp(None, 1) is None
