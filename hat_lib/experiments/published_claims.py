"""What is claimed for the published method, and what is there: ``data/results/published_claims.csv``.

Claimed for a frozen base: so much capacity, so many times as fast, for so much perplexity. Beside it, for both grains
and the claimed capacities, quality on the bundled base as ``quality.csv`` has it, and speed: on the bundled base
with the reference checkpoints, and on TinyLlama's exact shape with the shares and exits forced that the bundled base
realised.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from hat_lib import config
from hat_lib.backbone.base import BUNDLED, load_base
from hat_lib.config import HatConfig, HatError, scaled_exits
from hat_lib.evaluation.baselines.controls import RandomExits, exit_shares
from hat_lib.experiments import benchmark
from hat_lib.experiments.benchmark import PREFILL, Setting, forced_channels, forced_tokens, measure
from hat_lib.experiments.columns import CHECKPOINTS, TEXTS, rounded
from hat_lib.experiments.quality import Row as QualityRow
from hat_lib.experiments.rows import read_rows
from hat_lib.experiments.tables import markdown, saved, times
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting import findings, speed
from hat_lib.plotting.findings import said
from hat_lib.text.blocks import load_text

ABOUT = "a claimed point: quality from quality.csv, speed measured"
MINUTES = 15
READS = ("quality",)
KEY = ("base", "granularity", "capacity", "exit_rate")
SHAPE = "random:tinyllama"
PROMISED = {0.9: (1.1, 0.01), 0.7: (1.3, 0.03), 0.55: (1.6, 0.08), 0.4: (1.8, 0.12)}
"""capacity -> speedup and increase in perplexity"""
SETTINGS = [*(Setting(c) for c in PROMISED), Setting(1.0, 0.1), Setting(0.75, 0.1)]


@dataclass(frozen=True)
class Row:
    base: str
    granularity: str
    capacity: float
    exit_rate: float
    """both as requested"""
    promised_speedup: float | None
    promised_increase: float | None
    realised: float
    """capacity, in the timed decode, as are the next two"""
    realised_exit: float
    model_share: float
    ideal_decode: float
    decode_dense: float
    """measured speedup over our own dense path"""
    decode_hf: float
    """over plain transformers"""
    ideal_prefill: float
    prefill_dense: float
    prefill_hf: float
    addresses: float | None
    """increase in perplexity, of the bundled base, with its 95 % paired interval"""
    addresses_low: float | None
    addresses_high: float | None
    docstrings: float | None
    docstrings_low: float | None
    docstrings_high: float | None
    device: str
    dtype: str
    threads: int
    rounds: int


def rows(
    done: Collection = (),
    *,
    channel: Path = CHECKPOINTS / "default",
    token: Path = CHECKPOINTS / "token",
    results: Path | None = None,
    rounds: int = 5,
    steps: int = 64,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Rows of both bases, grain by grain.

    Args:
        channel, token: trained checkpoints.
        results: folder of ``quality.csv``, made with these checkpoints; data/results unless told.
        steps: decode steps of one turn; what a token grain realises in a few tokens says little.
    """
    if min(rounds, steps) < 1:
        raise HatError(f"rounds and steps must be at least 1, got {rounds} and {steps}")
    quality = (results or config.DATA / "results") / "quality.csv"
    known = {(r.granularity, r.text, r.capacity, r.exit_rate): r
             for r in read_rows(quality, QualityRow) if r.variant == "trained"}  # fmt: skip
    for granularity, checkpoint in (("channel", channel), ("token", token)):
        if lacking := [(t, s) for t in TEXTS for s in SETTINGS if (granularity, t, *s) not in known]:
            raise HatError(f"{quality} lacks {granularity} {lacking[0]}: run `hat reproduce quality` first")
        here = sum(key[1] == granularity for key in done)
        if here < 2 * len(SETTINGS):
            measured = _grain(checkpoint, known, rounds, steps, dtype)
            yield from (row for row in measured if tuple(getattr(row, name) for name in KEY) not in done)


def _grain(checkpoint: Path, known: Mapping, rounds: int, steps: int, dtype: str | None) -> Iterator[Row]:
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    ids = _text(hat)
    around = {s: partial(hat.at, *s) for s in SETTINGS}
    left = {s: _exits(hat, s, ids) for s in SETTINGS if s.exit_rate}
    timed = _both_phases(hat, around, ids, rounds, steps)
    yield from (_row(s, *timed[s], known) for s in SETTINGS)

    realised = {s: timed[s][0].realised for s in SETTINGS}
    shape, around = _forced(hat.config.granularity, realised, left, dtype, ids.shape[1])
    del hat
    gc.collect()  # gigabytes in cycles of models and hooks, which the collector does not see
    timed = _both_phases(shape, around, ids % shape.lm.config.vocab_size, rounds, steps)
    yield from (_row(s, *timed[s], {}) for s in SETTINGS)
    del shape, around
    gc.collect()


def _text(hat: HierarchicalTransformer) -> Tensor:
    """int64 ``[1, PREFILL]`` of docstrings."""
    blocks = load_text("docstrings", hat.base.tokenizer, split="test", max_tokens=4 * PREFILL)
    return torch.tensor(sum(blocks["input_ids"], []))[None, :PREFILL].to(hat.base.device)


def _exits(hat: HierarchicalTransformer, setting: Setting, ids: Tensor) -> list[float]:
    """Of the tokens that reach each exit, the share that leaves there."""
    with hat.at(*setting), hat.collect() as states, torch.inference_mode():
        hat.lm.model(input_ids=ids, use_cache=False)
    return list(exit_shares(states, hat.config.exit_layers).values())


def _forced(granularity: str, realised: Mapping[Setting, float], left: Mapping, dtype, tokens: int):
    """TinyLlama's shape, and a context for each setting that forces what the bundled base realised."""
    base = load_base(SHAPE, dtype=dtype)
    shaped = HatConfig.published if granularity == "token" else HatConfig.default
    hat = HierarchicalTransformer(base, shaped(base))
    gated = {s: c for s, c in realised.items() if c < 1}
    if granularity == "channel":
        text = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0)).to(base.device)
        with torch.inference_mode():
            policies = forced_channels(hat, text, gated.values())
    else:
        policies = {c: forced_tokens(hat, c, 1, tokens) for c in gated.values()}
    around = {s: partial(hat.using, policies[c]) if s in gated else hat.dense for s, c in realised.items()}
    depths = scaled_exits(hat.config.n_layers)
    for setting, rates in left.items():
        exits = RandomExits(dict(zip(depths, rates, strict=True)))
        around[setting] = partial(_leaving, hat, around[setting], exits)
    return hat, around


@contextmanager
def _leaving(hat: HierarchicalTransformer, around, exits: RandomExits):
    with around(), hat.exiting(exits):
        yield


def _both_phases(hat, around: Mapping, ids: Tensor, rounds: int, steps: int) -> dict[Setting, tuple]:
    plain = load_base(hat.base.name, dtype=hat.base.dtype, device=hat.base.device).model
    how = {"rounds": rounds, "steps": steps}
    decode, prefill = (measure(hat, plain, around, ids, phase=phase, **how) for phase in ("decode", "prefill"))
    return {s: (d, p) for s, d, p in zip(around, decode, prefill, strict=True)}


def _row(setting: Setting, decode: benchmark.Row, prefill: benchmark.Row, known: Mapping) -> Row:
    speedup, increase = PROMISED.get(setting.capacity, (None, None)) if not setting.exit_rate else (None, None)
    quality = {}
    for text in TEXTS:
        row = known.get((decode.granularity, text, *setting))
        quality |= {text: row and row.increase, f"{text}_low": row and row.increase_low,
                    f"{text}_high": row and row.increase_high}  # fmt: skip
    row = rounded(
        Row,
        **vars(decode),
        **dict.fromkeys(quality),
        promised_speedup=speedup,
        promised_increase=increase,
        ideal_decode=decode.ideal,
        decode_dense=decode.speedup_dense,
        decode_hf=decode.speedup_hf,
        ideal_prefill=prefill.ideal,
        prefill_dense=prefill.speedup_dense,
        prefill_hf=prefill.speedup_hf,
    )
    return replace(row, **quality)  # a quotation: to the digit


def figures(results: Path | None = None) -> dict[str, Figure]:
    table = saved("published_claims", results)
    return {
        "06_work_and_time": speed.work_and_time(table),
        "06_promise": speed.promise(table),
        "08_speeds": findings.speeds(table),
    }


def tables(results: Path | None = None) -> dict[str, str]:
    rows = saved("published_claims", results).query("exit_rate == 0")
    shape = {(r.granularity, r.capacity): r for r in rows[rows["base"] == SHAPE].itertuples()}
    header = ["grain", "capacity requested / realised", "claimed", *(f"perplexity, {text}" for text in TEXTS)]
    speeds = ["ideal", "over our own dense path", "over plain transformers"]
    header += [f"decode, {base}: {kind}" for base in ("bundled base", "TinyLlama's shape") for kind in speeds]
    lines, front = [], []
    for r in rows[rows["base"] == BUNDLED].itertuples():
        there, claimed = shape[r.granularity, r.capacity], f"{r.promised_speedup}x, {r.promised_increase:+.0%}"
        line = [r.granularity, f"{r.capacity:.2f} / {r.realised:.2f}", claimed]
        line += [said(r._asdict(), text) for text in TEXTS]
        for at in (r, there):
            line += [times(at.ideal_decode), times(at.decode_dense, at.ideal_decode), times(at.decode_hf)]
        lines.append(line)
        if r.granularity == "channel":
            measured = said(r._asdict(), "docstrings"), f"{r.model_share:.0%}", times(r.decode_dense, r.ideal_decode)
            front.append([f"{r.capacity:.0%}", claimed, *measured])
    brief = ["capacity", "published claim: decode speed, perplexity", "measured perplexity (95 % interval)",
             "share of the model's work", "measured decode speed, skipping alone"]  # fmt: skip
    return {"published_claims": markdown(header, lines), "frontpage": markdown(brief, front)}
