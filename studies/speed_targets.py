"""Is a target speedup met, and what does it cost? ``data/results/speed_targets.csv``.

For each checkpoint: the promised speedups, the largest that its `SpeedCurve` reaches, and one beyond it, which is
refused. The curve was measured on one text; here other prompts are continued at the capacity it names, and the speedup
on those texts is measured again, dense and adaptive in turns at each token. For the channel grain, perplexity is
measured as those texts were timed: at that very capacity, steered, and decoded token by token, on three kinds of text.
So speed and quality belong to one base, one checkpoint and one operating point, and a row says what both realised. The
token grain's perplexity is too high to be usable at any target; see ``quality.csv``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from hat_lib.config import check_count
from hat_lib.evaluation.perplexity import compare, score_decoded
from hat_lib.inference.generate import AdaptiveInference
from hat_lib.inference.speed import steer_to_capacity, timed
from hat_lib.model.modes import combined
from hat_lib.model.token_state import TokenState
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.blocks import load_text, spread
from studies.common import CHECKPOINTS, Machine, machine, markdown, rounded, saved, times
from studies.plotting import speed
from studies.plotting.findings import increase_text
from studies.prompts import prompts
from studies.published_claims import PROMISED
from studies.quality import MANY

ABOUT = "a target speedup, what came of it and what it costs on three kinds of text"
MINUTES = 20
KEY = ("granularity", "versus", "requested")
CLAIMED = dict(PROMISED.values())
"""speedup -> increase in perplexity, of the published claims"""
TEXTS, BLOCK = tuple(MANY), 512
TOGETHER = 4
"""blocks decoded at a time: weights are read once for all of them, while each has decisions and steering of its own"""


@dataclass(frozen=True, kw_only=True)
class Row(Machine):
    checkpoint: str
    granularity: str
    versus: str
    requested: float
    reachable: bool  # False: refused
    largest: float  # the largest speedup the curve reaches
    capacity: float | None = None  # requested, as chosen for the target
    realised_capacity: float | None = None  # of the steps that were timed, median over prompts
    predicted: float | None = None
    measured: float | None = None  # median over prompts of the speedup on the generated text
    lowest: float | None = None
    highest: float | None = None  # over prompts
    over_hf: float | None = None  # median over prompts of the speedup over plain transformers on the same text
    prompts: int = 0
    new_tokens: int
    addresses: float | None = None  # increase in perplexity at this capacity, with its 95 % paired interval
    addresses_low: float | None = None
    addresses_high: float | None = None
    addresses_realised: float | None = None  # capacity, of the text that was scored
    docstrings: float | None = None
    docstrings_low: float | None = None
    docstrings_high: float | None = None
    docstrings_realised: float | None = None
    encyclopedia: float | None = None
    encyclopedia_low: float | None = None
    encyclopedia_high: float | None = None
    encyclopedia_realised: float | None = None
    tokens: int = 0  # of each text; 0 where perplexity was not measured


def rows(
    done: Collection = (),
    *,
    channel: Path = CHECKPOINTS / "default",
    token: Path = CHECKPOINTS / "token",
    versus: str = "dense",
    count: int = 10,
    max_new_tokens: int = 60,
    tokens: int = 4_096,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Rows for each checkpoint and target; the speed curve comes from the user's cache or is measured first.

    ``versus`` is what speedups are relative to, dense (our own dense path) or hf (plain transformers); ``count`` is
    the number of prompts; ``tokens`` are taken from the test split of each text, in evenly spaced whole blocks: 8 by
    default, because decoding them one by one, at each target and dense, takes most of the time.
    """
    check_count("tokens", tokens, 2 * BLOCK)
    for checkpoint in (channel, token):
        hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
        infer = AdaptiveInference(hat, versus)
        curve = infer.curve()
        ends = {math.floor(1000 * curve.largest) / 1000, round(curve.largest + 0.5, 1)}
        grain = hat.config.granularity
        missing = [t for t in sorted({*CLAIMED} | ends) if (grain, versus, t) not in done]
        chosen = {target: curve.capacity_for(target) for target in missing if target <= curve.largest}
        priced = [c for target, c in chosen.items() if target in CLAIMED and grain == "channel"]
        prices = _prices(hat, priced, tokens)
        texts = [p.text for p in prompts(hat.base.tokenizer, count)]
        for target in missing:
            found = {"reachable": target in chosen, "largest": curve.largest}
            if target in chosen:
                found |= _continued(infer, texts, target, max_new_tokens) | prices.get(chosen[target], {})
            yield rounded(
                Row,
                **machine(hat.base) | found,
                checkpoint=Path(checkpoint).name,
                granularity=grain,
                versus=versus,
                requested=target,
                new_tokens=max_new_tokens,
            )


def _prices(hat: HierarchicalTransformer, capacities: Sequence[float], tokens: int) -> Mapping[float, dict]:
    """Capacity -> the columns of perplexity; on each text, the base is scored once for all capacities."""
    found = {capacity: {"tokens": tokens} for capacity in capacities}
    settings = [partial(combined, partial(hat.at, c, 0.0), partial(steer_to_capacity, hat)) for c in found]
    for text in TEXTS if found else ():
        blocks = whole_blocks(text, hat.base.tokenizer, tokens)
        base, scored = score_decoded(hat, blocks, settings, batch_size=TOGETHER, progress=False)
        for columns, at in zip(found.values(), scored, strict=True):
            paired = compare(base, at)
            low, high = paired.interval
            columns |= {text: paired.increase, f"{text}_low": low, f"{text}_high": high}
            columns[f"{text}_realised"] = at.capacity
            columns["tokens"] = min(columns["tokens"], paired.tokens)
    return found


def whole_blocks(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """About ``tokens`` tokens of a test split, in evenly spaced whole blocks; rows of `load_text`."""
    blocks = load_text(text, tokenizer, split="test", block_size=BLOCK)
    whole = [i for i, ids in enumerate(blocks["input_ids"]) if len(ids) == BLOCK]
    return spread(blocks.select(whole), tokens)


def _continued(infer: AdaptiveInference, texts: Sequence[str], target: float, max_new_tokens: int) -> dict:
    hat = infer.hat
    made = [infer.generate(text, target_speedup=target, max_new_tokens=max_new_tokens) for text in texts]
    measured = [m.realised_speedup for m in made if m.realised_speedup is not None]
    over_hf, realised = [], []
    for m in made:
        if m.realised_speedup is not None:
            with hat.at(m.requested_capacity, 0.0), steer_to_capacity(hat), hat.collect() as states:
                over_hf.append(timed(hat, (infer.plain, torch.inference_mode), m.ids))
            realised.append(TokenState.cat(states[1:]).capacity)  # the first fills the cache
    return {
        "capacity": made[0].requested_capacity,
        "realised_capacity": statistics.median(realised) if realised else None,
        "predicted": made[0].predicted_speedup,
        "measured": statistics.median(measured) if measured else None,
        "lowest": min(measured, default=None),
        "highest": max(measured, default=None),
        "over_hf": statistics.median(over_hf) if over_hf else None,
        "prompts": len(measured),
    }


def figures(results: Path | None = None) -> dict[str, Figure]:
    return {"05_targets": speed.targets(saved("speed_targets", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    measured = "measured: median (lowest to highest prompt)"
    realised = "realised, timed / scored"
    header = ["grain", "target", "capacity chosen", realised, measured, "over plain transformers", *TEXTS,
              "most within reach"]  # fmt: skip
    brief = ["speed claimed", "speed measured (slowest to fastest prompt)", "perplexity claimed",
             "perplexity measured, worst of three texts (95 % interval)", "share of the work that ran, timed / scored",
             "speed over plain transformers"]  # fmt: skip
    lines, front = [], []
    for r in saved("speed_targets", results).query("versus == 'dense'").itertuples():
        row = r._asdict()
        costs = [increase_text(row, text) if r.tokens else None for text in TEXTS]
        found = f"{r.measured:.2f}x ({r.lowest:.2f}x to {r.highest:.2f}x)" if r.reachable else "refused"
        over = times(r.over_hf) if r.reachable else None
        chosen = f"{r.capacity:.2f}" if r.reachable else None
        ran = _realised(row)
        lines.append([r.granularity, f"{r.requested:.3g}x", chosen, ran, found, over, *costs, times(r.largest)])
        if r.granularity == "channel" and r.requested in CLAIMED:
            worst = max(TEXTS, key=row.get) if r.tokens else None
            price = worst and increase_text(row, worst)
            front.append([f"{r.requested}x", found, f"{CLAIMED[r.requested]:+.0%}", price, ran, over])
    return {"speed_targets": markdown(header, lines), "promise": markdown(brief, front)}


def _realised(row: Mapping) -> str | None:
    """Capacity of the timed texts and, where there are any, from the least to the most of the scored ones."""
    scored = [row[f"{text}_realised"] for text in TEXTS if not math.isnan(row[f"{text}_realised"])]
    ends = " to ".join(dict.fromkeys(f"{of(scored):.3f}" for of in (min, max))) if scored else None
    timed = None if math.isnan(row["realised_capacity"]) else f"{row['realised_capacity']:.3f}"
    return " / ".join(filter(None, (timed, ends))) or None
