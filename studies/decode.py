"""Decoding on a CPU, in milliseconds per token: ``data/results/decode.csv``.

On the bundled base at the capacities of a trained checkpoint, and on the exact shapes of other models, with random
weights, forced to shares, `WAYS` take turns after the same text: the engine with its weights in several formats; plain
transformers right after the engine, and before its first step alone. What a speed costs: `studies.frontier`. Several
sequences at a time: `studies.answers`.
"""

import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hat_lib.base.families import linears
from hat_lib.base.load import BUNDLED, Base, load_base
from hat_lib.base.shapes import SHAPES
from hat_lib.config import HatConfig, HatError, check_capacity
from hat_lib.decoding.generate import WEIGHT_FORMATS
from hat_lib.decoding.speed import take_turns
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import Work, state_cost
from hat_lib.text.blocks import load_text
from studies.common import CHECKPOINTS, Machine, machine, markdown, over_dense, ratios, rounded, saved, spread, times
from studies.plotting import speed
from studies.timing import CONTEXT, decode_ms, forced, plain_copy

ABOUT = "milliseconds a token: plain transformers, and the engine by shape, format and capacity"
MINUTES = 25
KEY = ("base", "way", "weights", "capacity")
SHAPES |= {
    "random:llama-3.2-1b": {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256,
        "num_attention_heads": 32, "num_key_value_heads": 8, "initializer_range": 0.02, "tie_word_embeddings": True,
    },
    "random:qwen3-0.6b": {
        "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072,
        "vocab_size": 151936, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "initializer_range": 0.02, "tie_word_embeddings": True,
    },
}  # fmt: skip
TIMED = {"random:tinyllama": "TinyLlama-1.1B", "random:llama-3.2-1b": "Llama-3.2-1B", "random:qwen3-0.6b": "Qwen3-0.6B"}
SHAPE_FORMATS = "base", "q4"
WAYS = {"hf": "plain transformers", "hf_before": "plain transformers, before the engine's first step",
        "reference": "the reference path", "read": "a plain read of as much memory",
        "engine": "the engine"}  # fmt: skip
LAYERS = "attention", "ffn", "exited_kv"
READ = {"int8": (1.0, 0.0), "q4": (0.5, 3 / 32)}
"""bytes that a format reads for each weight of a kept channel, and for each weight kept or not (scales of groups)"""
HEAD = 1 + 2 / 32
"""the same of a head in eight bits; its preview has four"""


@dataclass(frozen=True)
class Row(Machine):
    way: str  # one of `WAYS`
    weights: str  # bfloat16, float32; int8, a scale for each output; q4, four bits in groups of 32
    capacity: float  # requested, or forced
    realised: float
    ms: float  # per token: the median, the fastest and the slowest round
    low: float
    high: float
    tokens_per_second: float
    ideal: float | None  # speedup over dense if time followed the weights read
    over_dense: float | None  # over our own fastest dense path in this format, paired by round
    over_dense_low: float | None
    over_dense_high: float | None
    over_hf: float | None
    copy_mib: float | None  # the engine's own copy of weights
    steps: int
    rounds: int


@dataclass
class Way:
    """One way to decode: ``once()`` returns milliseconds per token."""

    name: str
    weights: str
    capacity: float
    once: Callable[[], float]
    columns: dict = field(default_factory=dict)
    around: Callable = nullcontext
    times: list[float] = field(default_factory=list)


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    capacities: Sequence[float] = (1.0, 0.9, 0.75, 0.6, 0.5, 0.4),
    shape_capacities: Sequence[float] = (1.0, 0.75, 0.55, 0.4),
    rounds: int = 5,
    steps: int = 32,
    dtype: str = "fp32",
    shape_dtype: str = "bf16",
) -> Iterator[Row]:
    """Rows for all bases; the ``checkpoint`` has the channel grain and the bundled base.

    A turn has ``steps`` tokens. Shapes run in ``shape_dtype`` and in four bits, at ``shape_capacities``.
    """
    asked, shape_asked = ([1.0, *(check_capacity(c) for c in cs if c != 1)] for cs in (capacities, shape_capacities))
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    if hat.base.name != BUNDLED or hat.config.granularity != "channel":
        raise HatError(f"{checkpoint}: expected a checkpoint of the channel grain for the bundled base")
    if not hat.decoding.startswith("engine"):
        raise HatError(f"there is no engine to measure: {hat.decoding}")
    blocks = load_text("docstrings", hat.base.tokenizer, max_tokens=CONTEXT + steps)
    ids = torch.tensor([sum(blocks["input_ids"], [])])
    if not _measured(hat.base, WEIGHT_FORMATS, done):
        yield from _base(hat, ids, {c: partial(hat.at, c, 0.0) for c in asked}, WEIGHT_FORMATS, rounds, steps, done)
    del hat
    for shape in TIMED:
        gc.collect()  # gigabytes in cycles of models and hooks, whose size the collector cannot see
        base = load_base(shape, dtype=shape_dtype)
        if not _measured(base, SHAPE_FORMATS, done):
            hat = HierarchicalTransformer(base, HatConfig.default(base, exit_layers=()))
            around = forced(hat, shape_asked, CONTEXT + steps)
            text = ids % base.model.config.vocab_size
            yield from _base(hat, text, around, SHAPE_FORMATS, rounds, steps, done)
            del hat, around


def _measured(base: Base, forms: Sequence[str], done: Collection) -> bool:
    """Whether the last row of a base is there."""
    return (base.name, "engine", _name(base, forms[-1]), 1.0) in done


def _name(base: Base, form: str) -> str:
    return str(base.dtype).removeprefix("torch.") if form == "base" else form


def _base(
    hat, ids: Tensor, around: dict, forms: Sequence[str], rounds: int, steps: int, done: Collection
) -> Iterator[Row]:
    plain, own, bundled = plain_copy(hat), _name(hat.base, "base"), hat.base.name == BUNDLED
    hf = Way("hf", own, 1.0, lambda: decode_ms(plain, ids, steps, CONTEXT))
    before = [Way("hf_before", own, 1.0, hf.once)] if bundled else []
    take_turns(before, lambda way: way.once(), rounds)
    reference = Way("reference", own, 1.0, lambda: _within(hat, ids, steps, hat.dense, "base", hat.reference))
    read = Way("read", own, 1.0, _plain_read(hat.lm))
    first, *others = (list(_engine(hat, ids, around, steps, form)) for form in forms)
    # Plain transformers between two turns of the engine.
    turns = [reference, read, *first, hf, *sum(others, [])]
    take_turns(turns, lambda way: way.once(), rounds)
    turns = sorted([*before, *turns], key=lambda way: [*WAYS].index(way.name))
    for way in turns:
        if (hat.base.name, way.name, way.weights, way.capacity) not in done:
            yield _row(hat, way, turns, steps, rounds)


def _engine(hat, ids: Tensor, around: dict, steps: int, form: str) -> Iterator[Way]:
    """The engine's ways in one format, with the columns that are not times."""
    before = hat.packed_bytes
    _within(hat, ids, 1, hat.dense, form)  # packs the weights before anything is collected
    copied = (hat.packed_bytes - before) / 2**20
    for capacity, enter in sorted(around.items(), reverse=True):
        enter = hat.dense if capacity == 1 else enter
        with hat.collect() as states:
            _within(hat, ids, steps, enter, form)
        trace = states[-1]
        ideal = _ideal(state_cost(hat, trace), hat.base.dtype.itemsize, form)
        columns = {"realised": trace.capacity, "copy_mib": copied, "ideal": ideal}
        yield Way("engine", _name(hat.base, form), capacity, partial(_within, hat, ids, steps, enter, form), columns)


def _within(hat, ids: Tensor, steps: int, enter: Callable, form: str, path: Callable = nullcontext) -> float:
    with hat.changed(weight_format=form), enter(), path():  # which keeps the weights of other formats
        return decode_ms(hat, ids, steps, CONTEXT)


def _plain_read(lm) -> Callable[[], float]:
    """Measures milliseconds in which the engine's threads read, in order, as much memory as a dense step."""
    from hat_lib.engine import team
    from hat_lib.engine.compiling import compiled

    @compiled(reorder=True)
    def read(t, threads, barrier, memory, sums):
        total, each = 0, len(memory) // threads
        for number in memory[t * each : (t + 1) * each]:
            total += number
        sums[t] = total

    memory = np.ones(sum(linear.weight.nbytes for linear in (*linears(lm), lm.lm_head)) // 8, np.int64)
    threads, repeats = torch.get_num_threads(), 5
    sums = np.zeros(threads, np.int64)

    def once() -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            team.run(read, (memory, sums), threads)
        return 1e3 * (time.perf_counter() - began) / repeats

    return once


def _row(hat, way: Way, ways: Sequence[Way], steps: int, rounds: int) -> Row:
    (hf,) = (w for w in ways if w.name == "hf")
    columns = dict.fromkeys(("ideal", "over_dense", "over_dense_low", "over_dense_high", "copy_mib"))
    columns |= {"way": way.name, "weights": way.weights, "capacity": way.capacity, "realised": 1.0, **way.columns}
    columns |= spread(way.times) | {"steps": steps, "rounds": rounds}
    if way.name == "engine":
        (dense,) = (w for w in ways if (w.name, w.weights, w.capacity) == ("engine", way.weights, 1))
        columns |= over_dense(dense.times, way.times)
    columns["over_hf"] = None if way is hf else statistics.median(ratios(hf.times, way.times))
    columns["tokens_per_second"] = 1e3 / columns["ms"]
    return rounded(Row, KEY, **machine(hat.base) | columns)


def _ideal(cost: Work, size: int, form: str) -> float:
    """Dense over executed weights, in the bytes that a format reads; ``size`` is that of a base weight.

    In fewer bits, what a shortlist reads in full is counted as if it had four, too.
    """
    dense = {part: float(value.sum()) for part, value in cost.dense_weight_bytes.items()}

    def read(parts: dict[str, float]) -> float:
        if form not in READ:
            return sum(parts.values())
        (kept, always), parts = READ[form], dict(parts)
        layers = sum(parts.pop(part, 0.0) for part in LAYERS)
        head, (preview, scales) = parts.pop("head"), READ["q4"]
        head = HEAD * head if head == dense["head"] else preview * head + scales * dense["head"]
        parts["corrections"] = parts.get("corrections", 0.0) * 2 / size  # in bf16
        return (kept * layers + always * sum(dense.get(p, 0.0) for p in LAYERS) + head) / size + sum(parts.values())

    return read(dense) / read({part: float(value.sum()) for part, value in cost.weight_bytes.items()})


def figures(results: Path | None = None) -> dict:
    drawn = saved("decode", results).query("way not in ('hf_before', 'read')")
    return {"decode": speed.decode(drawn)}


def tables(results: Path | None = None) -> dict[str, str]:
    table = saved("decode", results)
    header = ["weights", "way", "capacity realised", "ms a token", "tokens/s", "ideal", "over our own dense path",
              "over plain transformers", "copy, MiB"]  # fmt: skip
    lines = []
    for r in table[table["base"] == BUNDLED].itertuples():
        line = [r.weights, WAYS[r.way], f"{r.realised:.2f}", f"{r.ms:.1f} ({r.low:.1f} to {r.high:.1f})"]
        over = f" ({r.over_dense_low:.2f} to {r.over_dense_high:.2f})"
        speeds = (r.ideal, ""), (r.over_dense, over), (r.over_hf, "")
        line += [f"{r.tokens_per_second:.0f}", *(None if pd.isna(x) else times(x) + more for x, more in speeds)]
        lines.append([*line, None if pd.isna(r.copy_mib) else f"{r.copy_mib:.0f}"])
    shapes = table[table["base"].isin(TIMED)]
    return {
        "decode_bundled": markdown(header, lines),
        "decode_fixed": _fixed(table[table["base"] == BUNDLED]),
        "decode_shapes": _shapes(shapes),
    }


def _shapes(table: pd.DataFrame) -> str:
    """By shape and format: plain transformers, and the engine at each capacity."""
    lines, capacities = [], sorted(table.loc[table["way"] == "engine", "capacity"].unique(), reverse=True)
    for (base, weights), rows in table[table["way"] == "engine"].groupby(["base", "weights"], sort=False):
        (plain,) = table.loc[(table["base"] == base) & (table["way"] == "hf"), "ms"]
        cells = {r.capacity: f"{r.ms:.1f}, {r.over_dense:.2f}x ({r.over_dense_low:.2f} to {r.over_dense_high:.2f})"
                 for r in rows.itertuples()}  # fmt: skip
        lines.append([TIMED[base], weights, f"{plain:.0f}", *map(cells.get, capacities)])
    return markdown(["shape", "weights", "plain transformers, ms", *(f"at {c:g}, ms" for c in capacities)], lines)


def _fixed(table: pd.DataFrame) -> str:
    """Milliseconds of a token that do not follow the work (the intercept of a line through time over work), and the
    speed over the dense path as a share of the ideal one."""
    lines, capacities = [], []
    engine = table[table["way"] == "engine"]
    for (base, weights), part in engine.groupby(["base", "weights"], sort=False):
        _, fixed = np.polyfit(1 / part["ideal"], part["ms"], 1)
        below = part[part["capacity"] < 1]
        capacities = [f"{c:g}" for c in below["capacity"]]
        lines.append([base, weights, f"{fixed:.2f}", *(f"{x:.2f}" for x in below["over_dense"] / below["ideal"])])
    return markdown(["base", "weights", "fixed, ms", *(f"of the ideal at {c}" for c in capacities)], lines)
