"""What is claimed for the published method, and what is measured: ``data/results/published_claims.csv``.

The claims are for a frozen base: at a given capacity, a speedup and its price in perplexity. Next to them, for both
grains at the claimed capacities: quality on the bundled base, from ``quality.csv``, and speed, both on the bundled base
with the reference checkpoints and on TinyLlama's exact shape with random weights, forced to the shares and exits that
the bundled base realised.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hat_lib import config
from hat_lib.backbone.base import BUNDLED, load_base
from hat_lib.config import HatConfig, HatError, check_count
from hat_lib.evaluation.controls import exit_shares
from hat_lib.model.modes import combined
from hat_lib.model.policies import Forced
from hat_lib.model.token_state import Masks
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.rows import read_rows
from hat_lib.text.blocks import load_text
from studies import common, quality
from studies.benchmark import PREFILL, Setting, forced, measure, plain_copy
from studies.common import CHECKPOINTS, SPEEDS, TEXTS, markdown, rounded, saved, speeds
from studies.plotting import findings, speed
from studies.plotting.findings import increase_text

ABOUT = "a claimed point: quality from quality.csv, speed measured"
MINUTES = 15
READS = ("quality",)
KEY = ("base", "granularity", "capacity", "exit_rate")
SHAPE = "random:tinyllama"
PROMISED = {0.9: (1.1, 0.01), 0.7: (1.3, 0.03), 0.55: (1.6, 0.08), 0.4: (1.8, 0.12)}
"""capacity -> speedup and increase in perplexity"""
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
    dtype: str | None = None,
) -> Iterator[Row]:
    """Rows for both bases, grain by grain; ``quality.csv`` in ``results`` must have been made with these checkpoints.

    A turn of decode has many ``steps``, because what the token grain realises over a few tokens says little.
    """
    check_count("rounds", rounds, 1), check_count("steps", steps, 1)
    path = (results or config.DATA / "results") / "quality.csv"
    measured = sorted(read_rows(path, quality.Row), key=lambda r: r.tokens)  # a later row replaces an earlier
    known = {(r.granularity, r.text, r.capacity, r.exit_rate): r for r in measured if r.variant == "trained"}
    for granularity, checkpoint in (("channel", channel), ("token", token)):
        if lacking := [(t, s) for t in TEXTS for s in SETTINGS if (granularity, t, *s) not in known]:
            raise HatError(f"{path} lacks {granularity} {lacking[0]}: run `python -m studies quality` first")
        if sum(key[1] == granularity for key in done) < 2 * len(SETTINGS):
            found = _grain(checkpoint, known, rounds, steps, dtype)
            yield from (row for row in found if tuple(getattr(row, name) for name in KEY) not in done)


def _grain(checkpoint: Path, known: Mapping, rounds: int, steps: int, dtype: str | None) -> Iterator[Row]:
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
    base = load_base(SHAPE, dtype=dtype)
    hat = HierarchicalTransformer(base, HatConfig.default(base, granularity=granularity))
    with torch.inference_mode():
        contexts, around = forced(hat, realised.values(), 1, ids.shape[1]), {}
    for setting in SETTINGS:
        draws = np.random.default_rng(0).random((len(left[setting]), *ids.shape))
        shares = zip(hat.config.exit_layers, left[setting], draws, strict=True)
        exits = Forced(Masks(exits={depth: torch.from_numpy(draw < share) for depth, share, draw in shares}))
        capacity = contexts[realised[setting]]
        leaving = partial(combined, capacity, partial(hat.using, exits=exits))
        around[setting] = leaving if setting.exit_rate else capacity
    yield from _rows(hat, around, ids % hat.lm.config.vocab_size, rounds, steps, {})
    del hat, contexts, around
    gc.collect()


def _rows(hat, around: Mapping, ids: Tensor, rounds: int, steps: int, known: Mapping) -> Iterator[Row]:
    plain = plain_copy(hat)
    both = (
        measure(hat, plain, around, ids, phase=phase, rounds=rounds, steps=steps) for phase in ("decode", "prefill")
    )
    for setting, decode, prefill in zip(around, *both, strict=True):
        speedup, increase = (None, None) if setting.exit_rate else PROMISED.get(setting.capacity, (None, None))
        quoted = {}
        for text in TEXTS:
            row = known.get((decode.granularity, text, *setting))
            for column in ("", "_low", "_high"):
                quoted[text + column] = row and getattr(row, f"increase{column}")
        row = rounded(
            Row,
            **vars(decode),
            **dict.fromkeys(quoted),
            promised_speedup=speedup,
            promised_increase=increase,
            ideal_decode=decode.ideal,
            decode_dense=decode.speedup_dense,
            decode_hf=decode.speedup_hf,
            ideal_prefill=prefill.ideal,
            prefill_dense=prefill.speedup_dense,
            prefill_hf=prefill.speedup_hf,
        )
        yield replace(row, **quoted)  # quoted, so not rounded again


def figures(results: Path | None = None) -> dict[str, Figure]:
    rows = saved("published_claims", results)
    # A speed above its ideal is a measuring error; `speeds` shows it beside the ideal, elsewhere it would mislead.
    above = rows["decode_dense"].round(2) > rows["ideal_decode"].round(2)
    drawn = {"06_work_and_time": speed.work_and_time(rows[~above]), "06_promise": speed.promise(rows)}
    return drawn | {"08_speeds": findings.speeds(rows)}


def tables(results: Path | None = None) -> dict[str, str]:
    rows = saved("published_claims", results).query("exit_rate == 0")
    shape = {(r.granularity, r.capacity): r for r in rows[rows["base"] == SHAPE].itertuples()}
    header = ["grain", "capacity requested / realised", "claimed", *(f"perplexity, {text}" for text in TEXTS)]
    header += [
        f"decode, {base}: {kind}" for base in ("bundled base", "TinyLlama's shape, random weights") for kind in SPEEDS
    ]
    lines = []
    for r in rows[rows["base"] == BUNDLED].itertuples():
        claimed, increases = (
            f"{r.promised_speedup}x, {r.promised_increase:+.0%}",
            [increase_text(r._asdict(), t) for t in TEXTS],
        )
        line = [r.granularity, f"{r.capacity:.2f} / {r.realised:.2f}", claimed, *increases]
        for at in (r, shape[r.granularity, r.capacity]):
            line += speeds(at.ideal_decode, at.decode_dense, at.decode_hf)
        lines.append(line)
    return {"published_claims": markdown(header, lines)}
