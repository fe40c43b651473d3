"""What each mechanism is worth, on three kinds of text: ``data/results/mechanisms.csv``.

One row for each text, capacity and way to run, of an untrained and a trained checkpoint:

    layers       channels of the layers alone, by the thresholds of the untrained checkpoint; the head in full
    head         the same, plus the head's shortlist
    trained      the trained checkpoint: its scales, split of the budget and corrections, and the head's shortlist
    fine_tuned   the corrections with nothing skipped: what training alone does to the base, at full work

Measured on evenly spaced whole blocks of a test split. ``encyclopedia`` was not used to select anything.
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
from hat_lib.evaluation.perplexity import compare, coverage, score_each
from hat_lib.experiments import common
from hat_lib.experiments.common import CHECKPOINTS, machine, markdown, perplexity, rounded, saved
from hat_lib.experiments.quality import adapter_digest
from hat_lib.model.modes import together
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting import frontier
from hat_lib.plotting.findings import said
from hat_lib.text.blocks import at_even_distances, load_text, text_hash

ABOUT = "a way to run (layers alone, with the head, trained, fine-tuned) at a capacity, on three kinds of text"
MINUTES = 60
KEY = ("way", "text", "capacity")
TEXTS = ("addresses", "docstrings", "encyclopedia")
CAPACITIES = (0.9, 0.75, 0.7, 0.62, 0.55, 0.4)
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
    for checkpoint, own in ((untrained, ("layers", "head")), (trained, ("trained", "fine_tuned"))):
        asked = [way for way in ways if way in own]
        points = {t: [(w, c) for w in asked for c in _of(w, capacities) if (w, t, c) not in done] for t in texts}
        if not any(points.values()):
            continue
        hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
        if not hat.gates_head:
            raise HatError(f"{checkpoint} reads its head in full: make it anew with `hat calibrate` or `hat train`")
        for text in texts:
            if points[text]:
                yield from _on_text(hat, checkpoint, text, points[text], tokens)


def _of(way: str, capacities: Sequence[float]) -> Sequence[float]:
    return [1.0] if way == "fine_tuned" else capacities


def _on_text(hat, checkpoint: Path, text: str, points: list[tuple[str, float]], tokens: int) -> Iterator[Row]:
    blocks = whole_blocks(text, hat.base.tokenizer, tokens)
    base, found = score_each(hat, blocks, [_around(hat, *point) for point in points], progress=False)
    for (way, capacity), scored in zip(points, found, strict=True):
        yield rounded(
            Row,
            **machine(hat.base) | vars(scored.agreement) | perplexity(compare(base, scored)),
            text=text,
            way=way,
            capacity=capacity,
            realised=scored.capacity,
            coverage=coverage(base, scored),
            layer_capacity=scored.layer_capacity,
            model_share=scored.model_share,
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
