"""What each mechanism is worth, on three kinds of text: ``data/results/mechanisms.csv``.

One row for each text, capacity and way to run, of an untrained and a trained checkpoint:

    layers       channels of the layers alone, by the thresholds of the untrained checkpoint; the head in full
    head         the same, plus the head's shortlist
    trained      the trained checkpoint: its scales, split of the budget and corrections, and the head's shortlist
    fine_tuned   the corrections with nothing skipped: what training alone does to the base, at full work

Measured on evenly spaced whole blocks of a test split. What was chosen by which text: docs/measurements.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from hat_lib.config import HatError, check_capacity, check_count
from hat_lib.evaluation.perplexity import Score, compare, coverage, score_each
from hat_lib.experiments import common
from hat_lib.experiments.common import CHECKPOINTS, interval, machine, markdown, perplexity, rounded, saved
from hat_lib.experiments.quality import adapter_digest
from hat_lib.model.modes import together
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting import frontier
from hat_lib.plotting.findings import said
from hat_lib.text.blocks import at_even_distances, load_text, text_hash

ABOUT = "a way to run (layers alone, with the head, trained, fine-tuned) at a capacity, on three kinds of text"
MINUTES = 45
KEY = ("way", "text", "capacity")
TEXTS = ("addresses", "docstrings", "encyclopedia")
CAPACITIES = (0.9, 0.7, 0.55, 0.4)
WAYS = ("layers", "head", "trained", "fine_tuned")
BLOCK = 512


@dataclass(frozen=True)
class Row(common.Machine, common.Perplexity):
    way: str
    capacity: float
    realised: float
    layer_capacity: float
    model_share: float
    ppl: float
    coverage: float
    """of the interval, simulated on these very blocks (`hat_lib.evaluation.perplexity.coverage`)"""
    margin: float | None
    margin_low: float | None
    margin_high: float | None
    """perplexity over that of ``head`` at this capacity, on the same tokens, less 1, and its 95 % paired interval; None
    for ``fine_tuned``"""
    blocks: int
    documents: int
    text_hash: str
    adapter: str


def rows(
    done: Collection = (),
    *,
    trained: Path | None = CHECKPOINTS / "default",
    untrained: Path = CHECKPOINTS / "calibrated",
    texts: Sequence[str] = TEXTS,
    capacities: Sequence[float] = CAPACITIES,
    ways: Sequence[str] | None = None,
    tokens: int = 20_480,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Rows on about ``tokens`` tokens of each text; without ``trained``, only for the first two ways.

    Raises `HatError` for an unknown way or text, a capacity out of range, ways whose checkpoint is not given, and
    checkpoints that do not gate their head.
    """
    check_count("tokens", tokens, 2 * BLOCK)
    capacities = [check_capacity(c) for c in capacities]
    ways = ways or (WAYS if trained else WAYS[:2])
    if odd := [way for way in ways if way not in WAYS]:
        raise HatError(f"ways must be among {', '.join(WAYS)}, got {odd[0]!r}")
    if trained is None and {"trained", "fine_tuned"} & {*ways}:
        raise HatError("the ways trained and fine_tuned need a checkpoint with corrections: pass trained=DIR")
    hats: dict[Path, HierarchicalTransformer] = {}
    for text in texts:
        points = [(way, c) for way in ways for c in _of(way, capacities) if (way, text, c) not in done]
        if not points:
            continue
        # What margins are taken over is scored, too, where its own rows are done.
        over = [("head", c) for c in dict.fromkeys(c for way, c in points if way != "fine_tuned")]
        asked = {untrained: list(dict.fromkeys([*over, *(p for p in points if p[0] in WAYS[:2])]))}
        asked[trained] = [p for p in points if p[0] in WAYS[2:]]
        scored = {}
        for checkpoint, of in asked.items():
            if not of:
                continue
            if checkpoint not in hats:
                hats[checkpoint] = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
            hat = hats[checkpoint]
            if not hat.gates_head:
                raise HatError(f"{checkpoint} reads its head in full: make it anew with `hat calibrate` or `hat train`")
            blocks = whole_blocks(text, hat.base.tokenizer, tokens)
            base, found = score_each(hat, blocks, [_around(hat, *point) for point in of], progress=False)
            scored |= {point: (checkpoint, base, at) for point, at in zip(of, found, strict=True)}
        for point in points:
            yield _row(hat, text, blocks, *point, *scored[point], scored.get(("head", point[1])))


def _of(way: str, capacities: Sequence[float]) -> Sequence[float]:
    return [1.0] if way == "fine_tuned" else capacities


def _row(hat, text: str, blocks, way: str, capacity: float, checkpoint: Path, base: Score, found: Score, over) -> Row:
    margin = compare(over[2], found) if over else None
    low, high = interval(margin) if margin else (None, None)
    return rounded(
        Row,
        **machine(hat.base) | vars(found.agreement) | perplexity(compare(base, found)),
        text=text,
        way=way,
        capacity=capacity,
        realised=found.capacity,
        coverage=coverage(base, found),
        margin=margin and margin.increase,
        margin_low=low,
        margin_high=high,
        layer_capacity=found.layer_capacity,
        model_share=found.model_share,
        documents=len(set(blocks["doc"])),
        text_hash=text_hash(blocks)[:16],
        adapter=adapter_digest(checkpoint, exits=False),
    )


def whole_blocks(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """About ``tokens`` tokens of a test split, in evenly spaced whole blocks; rows of `load_text`."""
    blocks = load_text(text, tokenizer, split="test", block_size=BLOCK)
    whole = [i for i, ids in enumerate(blocks["input_ids"]) if len(ids) == BLOCK]
    return at_even_distances(blocks.select(whole), tokens // BLOCK)


def _around(hat: HierarchicalTransformer, way: str, capacity: float) -> Callable:
    at = partial(hat.at, capacity, 0.0)
    more = {"fine_tuned": (hat.dense, hat.correcting), "layers": (at, partial(hat.shortlisting, None))}
    return partial(together, *more.get(way, (at,)))


def figures(results: Path | None = None) -> dict[str, Figure]:
    """Controls and exits come from quality.csv, the same texts in other blocks."""
    return {"mechanisms": frontier.mechanisms(saved("mechanisms", results), saved("quality", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    """A line for each way and capacity, with all texts."""
    table = saved("mechanisms", results).sort_values("capacity", ascending=False)
    lines = []
    for way in WAYS:
        for capacity, at in table[table["way"] == way].groupby("capacity", sort=False):
            cells = {r.text: said(r._asdict()) for r in at.itertuples()}
            shares = (f"{at[name].mean():.2f}" for name in ("realised", "model_share"))
            lines.append([way.replace("_", " "), f"{capacity:.2f}", *shares, *(cells.get(text) for text in TEXTS)])
    return {"mechanisms": markdown(["way", "capacity", "realised", "of the model's work", *TEXTS], lines)}
