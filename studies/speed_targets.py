"""Is a target speedup met, and what does it cost? ``data/results/speed_targets.csv``.

For each checkpoint: the promised speedups, the largest that its `SpeedCurve` reaches, and one beyond it, which is
refused; for the channel grain with weights in each format, over the dense path in the same format. The curve was
measured on one text; here other prompts are continued at the capacity it names, and the speedup on those texts is
measured again. For the channel grain, perplexity over the base's in fp32 is measured as those texts were timed: at the
capacity that they realised, steered, after `CONTEXT` tokens, and decoded token by token with the same weights. The
token grain's is too high to be usable; see ``quality.csv``.
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DynamicCache

from hat_lib.config import CAPACITY_MIN, HatError, check_count
from hat_lib.contexts import combined
from hat_lib.decoding.inference import AdaptiveInference
from hat_lib.decoding.speed import steer_to_capacity, timed
from hat_lib.evaluation.intervals import outcome
from hat_lib.evaluation.perplexity import Score, compare
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import WorkTally
from hat_lib.method.trace import Trace
from studies.claims import PROMISED
from studies.common import CHECKPOINTS, FORMATS, Machine, machine, markdown, rounded, saved, times
from studies.plotting.findings import increase_text
from studies.prompts import prompts, whole_blocks
from studies.quality import MANY

ABOUT = "a target speedup, what came of it and what it costs on three kinds of text"
MINUTES = 35
KEY = ("granularity", "weights", "versus", "requested")
CLAIMED = dict(PROMISED.values())  # speedup -> increase in perplexity
TEXTS, BLOCK = tuple(MANY), 512
CONTEXT = 64  # tokens of a block that are read, but neither scored nor counted: steering finds its place on them
TOGETHER = 8  # blocks decoded at a time, each with decisions and steering of its own
NEARLY = 0.03  # below a speed that was asked for


@dataclass(frozen=True, kw_only=True)
class Row(Machine):
    checkpoint: str
    granularity: str
    weights: str  # of `FORMATS`
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
    weights: Sequence[str] = tuple(FORMATS),
    versus: str = "dense",
    count: int = 10,
    max_new_tokens: int = 60,
    tokens: int = 4_096,
) -> Iterator[Row]:
    """Rows for each checkpoint and target; the speed curve comes from the user's cache or is measured first.

    ``versus`` is what speedups are relative to, dense (our own dense path) or hf (plain transformers); ``count`` is
    the number of prompts; ``tokens`` are read of each text's test split, which takes most of the time.
    """
    check_count("tokens", tokens, 2 * BLOCK)
    if unknown := [form for form in weights if form not in FORMATS]:
        raise HatError(f"weights must be of {', '.join(FORMATS)}, got {unknown[0]!r}")
    dense = HierarchicalTransformer.from_pretrained(channel, dtype="fp32")
    blocks = cache(partial(whole_blocks, tokenizer=dense.base.tokenizer, tokens=tokens, size=BLOCK, context=CONTEXT))
    base = cache(lambda text: decoded(dense, blocks(text), dense.dense))
    for checkpoint, form in [*((channel, form) for form in weights), (token, "float32")]:
        dtype, stored = FORMATS[form]
        hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
        hat.weight_format = stored
        infer = AdaptiveInference(hat, versus)
        curve = infer.curve()
        about = {"granularity": hat.config.granularity, "weights": form, "versus": versus}
        ends = {math.floor(1000 * curve.largest) / 1000, round(curve.largest + 0.5, 1)}
        found = {t: {} for t in sorted({*CLAIMED} | ends) if (*(about[k] for k in KEY[:3]), t) not in done}
        texts = [p.text for p in prompts(hat.base.tokenizer, count)]
        for target in found:
            if target <= curve.largest:
                found[target] = _continued(infer, texts, target, max_new_tokens)
        if hat.config.granularity == "channel":
            _price([made for target, made in found.items() if target in CLAIMED and made], hat, blocks, base)
        about |= machine(hat.base) | {"checkpoint": Path(checkpoint).name, "largest": curve.largest}
        for target, made in found.items():
            about |= {"requested": target, "reachable": bool(made), "new_tokens": max_new_tokens}
            yield rounded(Row, KEY, **about | made)


def _price(found: Sequence[dict], hat: HierarchicalTransformer, blocks: Callable, base: Callable) -> None:
    """Add the columns of perplexity to those of speed; ``blocks(text)`` were scored as ``base(text)`` by the base."""
    for text, columns in product(TEXTS, found):
        at = partial(hat.at, max(CAPACITY_MIN, columns["realised_capacity"]), 0.0)
        scored = decoded(hat, blocks(text), partial(combined, at, partial(steer_to_capacity, hat)))
        paired = compare(base(text), scored)
        columns |= paired.ends(text) | {f"{text}_realised": scored.capacity}
        columns["tokens"] = min(columns.get("tokens", paired.tokens), paired.tokens)


@torch.inference_mode()
def decoded(hat: HierarchicalTransformer, blocks: Dataset, around: Callable) -> Score:
    """The score of ``hat`` inside ``around()`` on blocks of one length and context, read token by token after a KV
    cache: so the engine runs, and steering moves thresholds at every token. Work is that of the scored tokens."""
    nll, spent, before = [], WorkTally(hat), max(1, blocks["n_context"][0]) - 1
    with hat.engine(), around():
        for ids in torch.tensor(blocks["input_ids"], device=hat.base.device).split(TOGETHER):
            cache, losses = DynamicCache(config=hat.lm.config), []
            with hat.collect() as steps:
                for token, following in zip(ids.T, ids.roll(-1, 1).T, strict=True):
                    logits = hat.lm(input_ids=token[:, None], cache=cache, use_cache=True).logits[:, 0].float()
                    losses.append(F.cross_entropy(logits, following, reduction="none"))
            nll.append(torch.stack(losses[before:-1]).double().sum(0).cpu().numpy())
            spent.add(Trace.cat(steps[before:]))
    tokens = np.array([len(ids) - 1 - before for ids in blocks["input_ids"]])
    return Score(np.concatenate(nll), tokens, blocks["doc"], *spent.shares)


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
    header = ["grain", "weights", "target", "capacity chosen", "realised, timed / scored",
              "measured: median (lowest to highest prompt)", "over plain transformers", *TEXTS,
              "most within reach"]  # fmt: skip
    table, lines = saved("speed_targets", results).query("versus == 'dense'"), []
    for row in table.to_dict("records"):
        line = [row["granularity"], row["weights"], f"{row['requested']:.3g}x"]
        if row["reachable"]:
            ran = [row[name] for name in (f"{text}_realised" for text in TEXTS)] if row["tokens"] else []
            scored = " / " + " to ".join(dict.fromkeys(f"{end(ran):.3f}" for end in (min, max))) if ran else ""
            line += [f"{row['capacity']:.2f}", f"{row['realised_capacity']:.3f}{scored}", speed_text(row)]
            line += [times(row["over_hf"]), *(increase_text(row, text) if row["tokens"] else None for text in TEXTS)]
        else:
            line += [None, None, "refused", *[None] * (1 + len(TEXTS))]
        lines.append([*line, times(row["largest"])])
    return {"speed_targets": markdown(header, lines), "promise": _promise(table)}


def _promise(table: pd.DataFrame) -> str:
    """The claims, and what each cost in the base's own format and in bf16."""
    lines = [["perplexity claimed", *(f"{price:+.0%}" for price in CLAIMED.values())]]
    for weights, name in (("q4", "4 bits, the base's own"), ("bfloat16", "bf16")):
        cells = table.query(f"granularity == 'channel' and weights == {weights!r}").set_index("requested")
        lines.append([name, *(_verdict(cells.loc[speed].to_dict() | {"requested": speed}) for speed in CLAIMED)])
    return markdown(["weights", *(f"{speed}x claimed" for speed in CLAIMED)], lines)


def _verdict(row: Mapping) -> str:
    """One cell: whether the price claimed for a speed is kept, the price, and the speed."""
    if not row["reachable"]:
        return f"**out of reach**: at most {times(row['largest'])}"
    worst = max(TEXTS, key=row.get)
    word = outcome(row[f"{worst}_low"], row[f"{worst}_high"], at_most=CLAIMED[row["requested"]])
    return f"**{word}**: {increase_text(row, worst)} at {speed_text(row)}, {row['realised_capacity']:.2f} of the work"


def speed_text(row: Mapping) -> str:
    """The speed that was measured: met by the slowest prompt, or nearly by the median, or too slow."""
    met = row["lowest"] >= row["requested"]
    nearly = ", within 3 %" if row["measured"] >= (1 - NEARLY) * row["requested"] else ", too slow"
    return f"{row['measured']:.2f}x ({row['lowest']:.2f}x to {row['highest']:.2f}x){'' if met else nearly}"
