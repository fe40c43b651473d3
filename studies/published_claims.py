"""What is claimed for the published method, and what is measured: ``data/results/published_claims.csv``.

The claims are for a frozen base: at a given capacity, a speedup and its price in perplexity. Next to them, for both
grains: quality on the bundled base, from ``quality.csv``, and speed, on the bundled base and on TinyLlama's exact shape
with random weights, forced to the shares and exits that the bundled base realised.
"""

import gc
import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from hat_lib import config
from hat_lib.base.load import BUNDLED, load_base
from hat_lib.config import HatConfig, HatError
from hat_lib.contexts import combined
from hat_lib.decoding.speed import Variant, now, take_turns
from hat_lib.evaluation.controls import exit_shares
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import Work, state_cost
from hat_lib.method.trace import Trace
from hat_lib.rows import read_rows
from hat_lib.text.blocks import load_text
from studies import common, quality
from studies.claims import PROMISED
from studies.common import CHECKPOINTS, SPEEDS, TEXTS, markdown, ratios, rounded, saved, times
from studies.plotting import speed
from studies.plotting.findings import increase_text, promised
from studies.timing import decode_ms, forced, forced_exits, plain_copy, plain_part

ABOUT = "a claimed point: quality from quality.csv, speed measured"
MINUTES = 20
READS = ("quality",)
KEY = ("base", "granularity", "capacity", "exit_rate")
SHAPE = "random:tinyllama"
PREFILL = 512  # tokens of a timed prefill


class Setting(NamedTuple):
    capacity: float  # requested, like the next
    exit_rate: float = 0.0


SETTINGS = [*(Setting(c) for c in PROMISED), Setting(1.0, 0.1), Setting(0.75, 0.1)]


@dataclass(frozen=True)
class Row(common.Machine):
    granularity: str
    capacity: float
    exit_rate: float  # both as requested
    promised_speedup: float | None
    promised_increase: float | None
    realised: float  # capacity, in the timed decode, like the next two
    realised_exit: float
    model_share: float
    ideal_decode: float
    decode_dense: float  # measured speedup over our own dense path
    decode_hf: float  # over plain transformers
    ideal_prefill: float
    prefill_dense: float
    prefill_hf: float
    addresses: float | None  # increase in perplexity on the bundled base, with its 95 % paired interval
    addresses_low: float | None
    addresses_high: float | None
    docstrings: float | None
    docstrings_low: float | None
    docstrings_high: float | None
    rounds: int


def rows(
    done: Collection = (),
    *,
    channel: Path = CHECKPOINTS / "default",
    token: Path = CHECKPOINTS / "token",
    results: Path | None = None,
    rounds: int = 5,
    steps: int = 64,
    dtype: str = "fp32",
    shape_dtype: str = "bf16",
) -> Iterator[Row]:
    """Rows for both bases, each in its dtype, grain by grain; ``quality.csv`` in ``results`` must be of these
    checkpoints."""
    path = (results or config.DATA / "results") / "quality.csv"
    measured = sorted(read_rows(path, quality.Row), key=lambda r: r.tokens)  # a later row replaces an earlier
    known = {(r.granularity, r.text, r.capacity, r.exit_rate): r for r in measured if r.variant == "trained"}
    for granularity, checkpoint in (("channel", channel), ("token", token)):
        if lacking := [(t, s) for t in TEXTS for s in SETTINGS if (granularity, t, *s) not in known]:
            raise HatError(f"{path} lacks {granularity} {lacking[0]}: run `python -m studies quality` first")
        if sum(key[1] == granularity for key in done) < 2 * len(SETTINGS):
            found = _grain(checkpoint, known, rounds, steps, dtype, shape_dtype)
            yield from (row for row in found if tuple(getattr(row, name) for name in KEY) not in done)


def _grain(checkpoint: Path, known: Mapping, rounds: int, steps: int, dtype: str, shape_dtype: str) -> Iterator[Row]:
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    blocks = load_text("docstrings", hat.base.tokenizer, split="test", max_tokens=4 * PREFILL)
    ids = torch.tensor(sum(blocks["input_ids"], []))[None, :PREFILL].to(hat.base.device)
    granularity, realised, left = hat.config.granularity, {}, {}
    for setting in SETTINGS:
        with hat.at(*setting), hat.collect() as states, torch.inference_mode():
            hat.lm.model(input_ids=ids, use_cache=False)
        left[setting] = exit_shares(states, hat.config.exit_layers).values()
    for row in _rows(hat, {s: partial(hat.at, *s) for s in SETTINGS}, ids, rounds, steps, known):
        realised[row.capacity, row.exit_rate] = row.realised
        yield row

    # On TinyLlama's shape, forced to what the bundled base realised.
    del hat
    gc.collect()  # gigabytes in cycles of models and hooks, whose size the collector cannot see
    base = load_base(SHAPE, dtype=shape_dtype)
    hat = HierarchicalTransformer(base, HatConfig.default(base, granularity=granularity))
    with torch.inference_mode():
        contexts, around = forced(hat, realised.values(), ids.shape[1]), {}
    ids = ids % hat.lm.config.vocab_size
    for setting in SETTINGS:
        around[setting] = contexts[realised[setting]]
        if setting.exit_rate:
            exits = partial(hat.using, exits=forced_exits(hat, ids, left[setting]))
            around[setting] = partial(combined, around[setting], exits)
    yield from _rows(hat, around, ids, rounds, steps, {})
    del hat, contexts, around
    gc.collect()


def _rows(hat, around: Mapping, ids: Tensor, rounds: int, steps: int, known: Mapping) -> Iterator[Row]:
    plain, grain = plain_copy(hat), hat.config.granularity
    timed = (_timed(hat, plain, around, ids, phase, rounds, steps) for phase in ("prefill", "decode"))
    for setting, prefill, decode in zip(around, *timed, strict=True):
        speedup, increase = (None, None) if setting.exit_rate else PROMISED.get(setting.capacity, (None, None))
        columns = prefill | decode | {"promised_speedup": speedup, "promised_increase": increase, "rounds": rounds}
        for text in TEXTS:
            row = known.get((grain, text, *setting))
            columns |= {text + end: row and getattr(row, f"increase{end}") for end in ("", "_low", "_high")}
        yield rounded(Row, **common.machine(hat.base) | setting._asdict() | columns, granularity=grain)


def _timed(hat, plain, around: Mapping, ids: Tensor, phase: str, rounds: int, steps: int) -> Iterator[dict]:
    """Columns of one phase for each of ``around``, whose values make the context to run ``hat`` in: what ran, and the
    speedups, each the median of the rounds' ratios."""

    def once(model) -> float:
        if phase == "decode":
            return decode_ms(model, ids, steps)
        lm, start = plain_part(model), now(model)
        lm(input_ids=ids[:, :PREFILL], cache=DynamicCache(config=lm.config), use_cache=True, logits_to_keep=1)
        return 1e3 * (now(model) - start)

    hf, dense = Variant("hf", plain, torch.inference_mode), Variant("dense", hat, hat.dense)
    adaptive = [Variant(f"{setting}", hat, enter) for setting, enter in around.items()]
    take_turns([hf, dense, *adaptive], lambda v: once(v.model), rounds)
    for v in adaptive:
        with v.around(), hat.collect() as states, torch.inference_mode():
            once(hat)
            trace = Trace.cat(states[2:] if phase == "decode" else states)
            cost = state_cost(hat, trace)
        columns = {"realised": trace.capacity, "realised_exit": trace.exit_rate, "model_share": cost.model_share}
        columns |= {f"{phase}_{w.name}": statistics.median(ratios(w.times, v.times)) for w in (hf, dense)}
        yield columns | {f"ideal_{phase}": _ideal(cost, phase)}


def _ideal(cost: Work, phase: str) -> float:
    """Dense / executed: weights read for decode; FLOPs for prefill, where the head serves the last token alone."""
    dense, executed = cost.dense_weight_bytes, cost.weight_bytes
    if phase == "prefill":
        head = {"head": cost.dense_flops["head"].flatten()[0]}
        dense, executed = cost.dense_flops | head, cost.flops | head
    return float(sum(work.sum() for work in dense.values()) / sum(work.sum() for work in executed.values()))


def figures(results: Path | None = None) -> dict:
    rows = saved("published_claims", results)
    drawn = {"06_work_and_time": speed.work_and_time(rows), "06_promise": speed.promise(rows)}
    return drawn | {"08_promised": promised(saved("quality", results), rows)}


def tables(results: Path | None = None) -> dict[str, str]:
    rows = saved("published_claims", results).query("exit_rate == 0")
    shape = {(r.granularity, r.capacity): r for r in rows[rows["base"] == SHAPE].itertuples()}
    header = ["grain", "capacity requested / realised", "claimed", *(f"perplexity, {text}" for text in TEXTS)]
    for base in ("bundled base", "TinyLlama's shape, random weights"):
        header += [f"decode, {base}: {kind}" for kind in SPEEDS]
    lines = []
    for r in rows[rows["base"] == BUNDLED].itertuples():
        line = [r.granularity, f"{r.capacity:.2f} / {r.realised:.2f}"]
        line += [f"{r.promised_speedup}x, {r.promised_increase:+.0%}", *(increase_text(r._asdict(), t) for t in TEXTS)]
        for at in (r, shape[r.granularity, r.capacity]):
            line += [times(at.ideal_decode), times(at.decode_dense, at.ideal_decode), times(at.decode_hf)]
        lines.append(line)
    return {"published_claims": markdown(header, lines)}
