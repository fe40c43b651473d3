"""Is a target speedup met, and what does it cost? ``data/results/speed_targets.csv``.

For each checkpoint: the promised speedups, the largest that its `SpeedCurve` reaches, and one beyond it, which is
refused; for the channel grain with the engine's weights in each of several formats, over the dense path in the same
format. The curve was measured on one text; here other prompts are continued at the capacity it names, and the speedup
on those texts is measured again. For the channel grain, perplexity over the base's own is measured as those texts were
timed: at the capacity that they realised, steered, and decoded token by token with the same weights. The token grain's
is too high to be usable; see ``quality.csv``.
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DynamicCache, PreTrainedTokenizerBase

from hat_lib.config import check_count
from hat_lib.contexts import combined
from hat_lib.decoding.inference import AdaptiveInference
from hat_lib.decoding.speed import steer_to_capacity, timed
from hat_lib.evaluation.perplexity import Score, compare
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import WorkTally
from hat_lib.method.trace import Trace
from hat_lib.text.blocks import load_text, spread
from studies.claims import PROMISED
from studies.common import CHECKPOINTS, Machine, machine, markdown, rounded, saved, times
from studies.plotting.findings import increase_text
from studies.prompts import prompts
from studies.quality import MANY

ABOUT = "a target speedup, what came of it and what it costs on three kinds of text"
MINUTES = 25
KEY = ("granularity", "weights", "versus", "requested")
CLAIMED = dict(PROMISED.values())  # speedup -> increase in perplexity
TEXTS, BLOCK = tuple(MANY), 512
TOGETHER = 4  # blocks decoded at a time, each with decisions and steering of its own


@dataclass(frozen=True, kw_only=True)
class Row(Machine):
    checkpoint: str
    granularity: str
    weights: str  # as in ``decode.csv``
    versus: str
    requested: float
    reachable: bool  # False: refused
    largest: float  # the largest speedup the curve reaches
    capacity: float | None = None  # requested, as chosen for the target
    realised_capacity: float | None = None  # of the steps that were timed, median over prompts
    predicted: float | None = None
    measured: float | None = None  # on the generated texts, median over prompts
    lowest: float | None = None
    highest: float | None = None
    over_hf: float | None = None  # over plain transformers on the same texts, median
    prompts: int = 0
    new_tokens: int
    addresses: float | None = None  # increase in perplexity at the realised capacity, with its 95 % paired interval
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
    weights: Sequence[str] = ("base", "int8", "q4"),
    versus: str = "dense",
    count: int = 10,
    max_new_tokens: int = 60,
    tokens: int = 4_096,
    dtype: str = "fp32",
) -> Iterator[Row]:
    """Rows for each checkpoint and target; the speed curve comes from the user's cache or is measured first.

    ``versus`` is what speedups are relative to, dense (our own dense path) or hf (plain transformers); ``count`` is
    the number of prompts; ``tokens`` are scored of each text's test split, which takes most of the time.
    """
    check_count("tokens", tokens, 2 * BLOCK)
    for checkpoint, form in [*((channel, form) for form in weights), (token, "base")]:
        hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
        hat.weight_format = form
        infer = AdaptiveInference(hat, versus)
        curve = infer.curve()
        about = {"granularity": hat.config.granularity, "versus": versus}
        about["weights"] = str(hat.base.dtype).removeprefix("torch.") if form == "base" else form
        ends = {math.floor(1000 * curve.largest) / 1000, round(curve.largest + 0.5, 1)}
        found = {t: {} for t in sorted({*CLAIMED} | ends) if (*(about[k] for k in KEY[:3]), t) not in done}
        texts = [p.text for p in prompts(hat.base.tokenizer, count)]
        for target in found:
            if target <= curve.largest:
                found[target] = _continued(infer, texts, target, max_new_tokens)
        if hat.config.granularity == "channel":
            _price([made for target, made in found.items() if target in CLAIMED and made], hat, tokens)
        about |= machine(hat.base) | {"checkpoint": Path(checkpoint).name, "largest": curve.largest}
        for target, made in found.items():
            about |= {"requested": target, "reachable": bool(made), "new_tokens": max_new_tokens}
            yield rounded(Row, **about | made)


def _price(found: Sequence[dict], hat: HierarchicalTransformer, tokens: int) -> None:
    """Add the columns of perplexity to those of speed."""
    at = [partial(hat.at, columns["realised_capacity"], 0.0) for columns in found]
    for text in TEXTS if found else ():
        blocks = whole_blocks(text, hat.base.tokenizer, tokens)
        with hat.changed(weight_format="base"):
            base = decoded(hat, blocks, hat.dense)
        for columns, setting in zip(found, at, strict=True):
            scored = decoded(hat, blocks, partial(combined, setting, partial(steer_to_capacity, hat)))
            paired = compare(base, scored)
            columns |= paired.ends(text) | {f"{text}_realised": scored.capacity}
            columns["tokens"] = min(columns.get("tokens", tokens), paired.tokens)


@torch.inference_mode()
def decoded(hat: HierarchicalTransformer, blocks: Dataset, around: Callable) -> Score:
    """The score of ``hat`` inside ``around()`` on blocks of one length, read token by token after a KV cache: so the
    engine runs, and steering moves thresholds at every token."""
    nll, spent = [], WorkTally(hat)
    with hat.engine(), around():
        for ids in torch.tensor(blocks["input_ids"], device=hat.base.device).split(TOGETHER):
            cache, losses = DynamicCache(config=hat.lm.config), []
            with hat.collect() as steps:
                for token, following in zip(ids.T, ids.roll(-1, 1).T, strict=True):
                    logits = hat.lm(input_ids=token[:, None], cache=cache, use_cache=True).logits[:, 0].float()
                    losses.append(F.cross_entropy(logits, following, reduction="none"))
            nll.append(torch.stack(losses[:-1]).double().sum(0).cpu().numpy())
            spent.add(Trace.cat(steps))
    tokens = np.array([len(ids) - 1 for ids in blocks["input_ids"]])
    return Score(np.concatenate(nll), tokens, blocks["doc"], *spent.shares)


def whole_blocks(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """About ``tokens`` tokens of a test split, in evenly spaced whole blocks."""
    blocks = load_text(text, tokenizer, split="test", block_size=BLOCK)
    whole = [i for i, ids in enumerate(blocks["input_ids"]) if len(ids) == BLOCK]
    return spread(blocks.select(whole), tokens)


def _continued(infer: AdaptiveInference, texts: Sequence[str], target: float, max_new_tokens: int) -> dict:
    """The columns of speed; texts too short to be timed only count in none of them."""
    hat, measured, over_hf, realised = infer.hat, [], [], []
    for text in texts:
        made = infer.generate(text, target_speedup=target, max_new_tokens=max_new_tokens)
        if made.realised_speedup is not None:
            measured.append(made.realised_speedup)
            with hat.at(made.requested_capacity, 0.0), steer_to_capacity(hat), hat.collect() as states:
                over_hf.append(timed(hat, (infer.plain, torch.inference_mode), made.ids))
            realised.append(Trace.cat(states[1:]).capacity)  # the first fills the cache
    found = {"capacity": made.requested_capacity, "predicted": made.predicted_speedup, "prompts": len(measured)}
    if measured:
        found |= {"measured": statistics.median(measured), "lowest": min(measured), "highest": max(measured)}
        found |= {"over_hf": statistics.median(over_hf), "realised_capacity": round(statistics.median(realised), 4)}
    return found


def tables(results: Path | None = None) -> dict[str, str]:
    measured = "measured: median (lowest to highest prompt)"
    realised = "realised, timed / scored"
    header = ["grain", "weights", "target", "capacity chosen", realised, measured, "over plain transformers", *TEXTS,
              "most within reach"]  # fmt: skip
    brief = ["speed claimed", "speed measured (slowest to fastest prompt)", "perplexity claimed",
             "perplexity measured, worst of three texts (95 % interval)", "share of the work that ran, timed / scored",
             "speed over plain transformers"]  # fmt: skip
    lines, front = [], []
    for r in saved("speed_targets", results).query("versus == 'dense'").itertuples():
        row = r._asdict()
        costs = [increase_text(row, text) if r.tokens else None for text in TEXTS]
        found, over, chosen, ran = "refused", None, None, _realised(row)
        if r.reachable:
            found = f"{r.measured:.2f}x ({r.lowest:.2f}x to {r.highest:.2f}x)"
            over, chosen = times(r.over_hf), f"{r.capacity:.2f}"
        lines.append(
            [r.granularity, r.weights, f"{r.requested:.3g}x", chosen, ran, found, over, *costs, times(r.largest)]
        )
        if r.granularity == "channel" and r.weights == "float32" and r.requested in CLAIMED:
            price = increase_text(row, max(TEXTS, key=row.get)) if r.tokens else None
            front.append([f"{r.requested}x", found, f"{CLAIMED[r.requested]:+.0%}", price, ran, over])
    return {"speed_targets": markdown(header, lines), "promise": markdown(brief, front)}


def _realised(row: Mapping) -> str | None:
    """Capacity of the timed texts and, where there are any, from the least to the most of the scored ones."""
    scored = [row[f"{text}_realised"] for text in TEXTS if not math.isnan(row[f"{text}_realised"])]
    parts = [] if math.isnan(row["realised_capacity"]) else [f"{row['realised_capacity']:.3f}"]
    if scored:
        parts.append(" to ".join(dict.fromkeys((f"{min(scored):.3f}", f"{max(scored):.3f}"))))
    return " / ".join(parts) or None
