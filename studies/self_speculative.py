"""Is self-speculative text the base's own, and is it fast? One row per prompt: ``data/results/self_speculative.csv``.

Prompt by prompt, four ways to the base's greedy text take turns: plain transformers, our own dense path,
`hat_lib.decoding.speculation`, and transformers' own self-speculation (`assistant_early_exit`, which reads drafts
from a layer through the final norm and the LM head). In fp32 the text must be the base's; in bf16 a forward over more
tokens rounds differently, so two texts may part where the base itself is undecided.
"""

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hat_lib.base.load import parse_dtype
from hat_lib.config import check_capacity
from hat_lib.decoding.speculation import Speculation
from hat_lib.decoding.speed import Variant, now, take_turns
from hat_lib.hat import HierarchicalTransformer
from studies.common import CHECKPOINTS, SPEEDS, Machine, machine, markdown, ratios, rounded, saved, times
from studies.plotting import speed
from studies.prompts import KINDS, Prompt, prompts
from studies.timing import plain_copy

ABOUT = "a prompt, four ways to its text"
MINUTES = 27
KEY = ("granularity", "capacity", "weights", "dtype", "prompt")
EARLY_EXITS = 10


@dataclass(frozen=True)
class Row(Machine):
    """Times are milliseconds per new token, the prompt's pass included: medians over rounds."""

    granularity: str
    capacity: float  # requested for drafts
    weights: str  # format of the engine's weights that drafts read; verification reads the base's own
    prompt: int
    kind: str
    new_tokens: int
    identical: bool  # to plain transformers' greedy text
    parted_at: int | None  # new tokens before the first that differs
    gap_ulp: float | None  # between the base's two best logits at that place, in ulps of a bf16
    drafted: int
    accepted: int
    passes: int
    draft_share: float  # work of a drafting step / work of a dense one
    ideal: float  # speedup over dense if time followed the weights read
    ms_hf: float
    ms_dense: float
    ms_lossless: float
    ms_early_exit: float | None  # slow, so only beside dense drafts, for one in `EARLY_EXITS` rounds of kinds
    over_dense_low: float | None  # ms_dense / ms_lossless in the slowest round; None where there was only one
    over_dense_high: float | None
    rounds: int


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    capacities: Sequence[float] = (1.0, 0.6),
    weights: str = "q4",
    dtypes: Sequence[str] = ("fp32", "bf16"),
    count: int = 20,
    max_new_tokens: int = 48,
    rounds: int = 3,
) -> Iterator[Row]:
    """A row for each dtype, capacity of the drafts and each of ``count`` prompts; drafts read ``weights``."""
    capacities, parsed = [check_capacity(c) for c in capacities], [parse_dtype(dtype) for dtype in dtypes]
    for dtype in parsed:
        hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
        hat.weight_format, plain = weights, plain_copy(hat)
        name = str(dtype).removeprefix("torch.")
        for number, prompt in enumerate(prompts(hat.base.tokenizer, count)):
            for capacity in capacities:
                if (hat.config.granularity, capacity, weights, name, number) not in done:
                    with hat.at(capacity, 0.0):
                        yield _measure(hat, plain, number, prompt, max_new_tokens, rounds)


def _measure(hat: HierarchicalTransformer, plain, number: int, prompt: Prompt, max_new_tokens: int, rounds: int) -> Row:
    ids = hat.base.tokenizer(prompt.text, return_tensors="pt").input_ids.to(hat.base.device)
    greedy = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens, "do_sample": False,
              "pad_token_id": hat.base.tokenizer.pad_token_id}  # fmt: skip

    def dense():
        with hat.dense(), hat.changed(weight_format="base"):
            return hat.lm.generate(ids, **greedy)

    def lossless():
        speculation = Speculation(hat)
        return hat.lm.generate(ids, **greedy, custom_generate=speculation), speculation

    ways = {
        "hf": lambda: plain.generate(ids, **greedy, output_logits=True, return_dict_in_generate=True),
        "dense": dense,
        "lossless": lossless,
        "early_exit": lambda: plain.generate(ids, **greedy, assistant_early_exit=hat.config.exit_layers[-1]),
    }
    slow = hat.capacity == 1 and number // KINDS % EARLY_EXITS == 0
    order = list(ways)[: 4 if slow else 3]
    found, variants = {}, [Variant(way, hat, torch.inference_mode) for way in order]

    def once(v: Variant) -> float:
        began = now(v.model)
        found[v.name] = ways[v.name]()
        return 1e3 * (now(v.model) - began)

    take_turns(variants, once, rounds)
    turns = {v.name: v.times for v in variants}
    over_dense = ratios(turns["dense"], turns["lossless"])
    text, (spoken, speculation) = found["hf"].sequences, found["lossless"]
    parted, gap = parting(text[0, ids.shape[1] :], spoken[0, ids.shape[1] :], found["hf"].logits)
    new = text.shape[1] - ids.shape[1]
    columns = {f"ms_{way}": statistics.median(times) / new for way, times in turns.items()}
    columns |= {"granularity": hat.config.granularity, "capacity": hat.capacity, "weights": hat.weight_format}
    columns |= {"prompt": number, "kind": prompt.kind, "ideal": speculation.ideal_speedup}
    columns |= {name: getattr(speculation, name) for name in ("new_tokens", "drafted", "accepted", "passes")}
    columns["draft_share"] = speculation.drafting / speculation.drafted if speculation.drafted else math.nan
    columns |= {"identical": parted is None, "parted_at": parted, "gap_ulp": gap, "rounds": rounds}
    columns["over_dense_low"] = min(over_dense) if rounds > 1 else None
    columns["over_dense_high"] = max(over_dense) if rounds > 1 else None
    return rounded(Row, KEY, **machine(hat.base) | {"ms_early_exit": None} | columns)


def parting(base: Tensor, other: Tensor, logits: Sequence[Tensor]) -> tuple[int | None, float | None]:
    """Where two texts of new tokens part, and how far apart the base's two best ``logits`` [1, V] are there, in bf16
    ulps; ``(None, None)`` for equal texts. A prefix parts at its end."""
    if torch.equal(base, other):
        return None, None
    short = min(len(base), len(other))
    differ = (base[:short] != other[:short]).nonzero()
    at = int(differ[0]) if len(differ) else short
    best, second = logits[min(at, len(logits) - 1)][0].float().topk(2).values.tolist()
    ulp = 2.0 ** (math.floor(math.log2(abs(best))) - 7) if best else 2.0**-133
    return at, round((best - second) / ulp, 3)


def figures(results: Path | None = None) -> dict:
    return {"05_lossless": speed.lossless(saved("self_speculative", results).query("capacity == 1"))}


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["grain", "drafts", "dtype", "text is the base's", "drafts that stood", "tokens/s", "by work alone",
              SPEEDS[1], "slowest and fastest turn of a prompt", SPEEDS[2], "over its early-exit drafts"]  # fmt: skip
    lines = []
    for (grain, capacity, weights, dtype), rows in saved("self_speculative", results).groupby(list(KEY[:4])):
        same, stood = rows["identical"].sum(), rows["accepted"].sum() / max(1, rows["drafted"].sum())
        dense, hf, early = (rows[f"ms_{way}"] / rows["ms_lossless"] for way in ("dense", "hf", "early_exit"))
        line = [grain, f"{weights}, at {capacity:.2f}", dtype, f"{same} of {len(rows)}", f"{stood:.0%}"]
        line += [f"{1e3 / rows['ms_lossless'].median():.0f}", times(rows["ideal"].median())]
        line += ["{} ({:.2f} to {:.2f})".format(times(dense.median()), *dense.quantile([0.1, 0.9]))]
        low, high = ((rows[f"over_dense_{end}"] / dense - 1).median() for end in ("low", "high"))
        line += [None if math.isnan(low) else f"{low:+.0%} and {high:+.0%}"]
        lines.append([*line, times(hf.median()), None if early.isna().all() else times(early.median())])
    return {"self_speculative": markdown(header, lines)}
