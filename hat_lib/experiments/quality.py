"""What the trained checkpoints keep, beside every control, at equal work: ``data/results/quality.csv``.

One row for each grain, text, capacity and variant: perplexity over the base's with its paired interval, agreement
with the base, and the margin to the trained model on the same tokens. A control is turned until it executes what the
trained model executed on that very text; only its work is looked at for that, never its predictions.

Rows are written one by one, in the order of `plan`; a run that was stopped goes on with the next.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from hat_lib.config import HatError
from hat_lib.evaluation.baselines.controls import CONTROLS, RandomExits, as_in, exit_shares
from hat_lib.evaluation.baselines.equal_compute import matched
from hat_lib.evaluation.perplexity import Score, compare, score, states
from hat_lib.experiments.rows import RowWriter, read_rows
from hat_lib.experiments.tables import markdown, saved
from hat_lib.model.checkpoint import read_checkpoint
from hat_lib.model.schema import digest
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting.findings import said
from hat_lib.text.blocks import load_text, text_hash

TEXTS = ("addresses", "docstrings")
VARIANTS = ("trained", "untrained", *CONTROLS, "random_exits")
# A control is turned on this many tokens of the text, in blocks at even distances.
MATCH_TOKENS = 1024


class Grain(NamedTuple):
    """The checkpoints of one grain: trained, and calibrated without training."""

    trained: Path
    untrained: Path


class Point(NamedTuple):
    """What tells rows apart."""

    granularity: str
    text: str
    max_tokens: int
    capacity: float
    """requested"""
    exit_rate: float
    """requested"""
    variant: str
    """one of `VARIANTS`"""
    seed: int = 0
    """of what is drawn at random"""


@dataclass(frozen=True)
class QualityRow:
    """Perplexities are those of a 4-bit file, dequantised, when ``base`` is "bundled"."""

    granularity: str
    text: str
    max_tokens: int
    capacity: float
    exit_rate: float
    variant: str
    seed: int
    realised: float
    realised_exit: float
    model_share: float
    base_ppl: float
    ppl: float
    increase: float
    increase_low: float
    increase_high: float
    """95 % paired interval"""
    top1: float
    """share of tokens with the base's most likely next token"""
    kl: float
    """KL(base || variant), nats a token"""
    margin: float
    margin_low: float
    margin_high: float
    """perplexity over the trained model's at this point, less 1, and its 95 % paired interval; 0 for the trained"""
    tokens: int
    blocks: int
    text_hash: str
    base: str
    adapter: str
    """beginning of the SHA-256 of the parameters and tables behind the row; those of exits only where some leave"""
    device: str
    dtype: str
    threads: int


def plan(granularity: str) -> list[Point]:
    """The points of one grain, most telling ones first; those that share a text and a trained run stand together."""
    both, gates = ("trained", "untrained"), ("trained", "random_exits")
    long = [((0.75, 0.62), 0.0, both)]
    short = [((0.9, 0.7, 0.55), 0.0, (*both, *CONTROLS)), ((0.4,), 0.0, both)]
    short += [((1.0,), 0.1, gates), ((1.0,), 0.3, gates), ((0.75,), 0.1, ("trained",))]
    return [
        Point(granularity, text, tokens, capacity, rate, variant)
        for tokens, grid in ((20_000, long), (4_000, short))
        for text in TEXTS
        for capacities, rate, variants in grid
        for capacity in capacities
        for variant in variants
    ]


def quality(
    out: Path, grains: Mapping[str, Grain], *, dtype=None, points=plan, progress: bool = True
) -> Iterator[QualityRow]:
    """Measure what ``out`` lacks, yielding each row once it is written.

    Args:
        grains: checkpoints by granularity.
        points: granularity -> what to measure.

    Raises `HatError` for a checkpoint of another grain, an untrained one that was trained, and where ``out`` holds
    rows of other checkpoints.
    """
    for grain in grains.values():
        if read_checkpoint(grain.untrained).training is not None:
            raise HatError(f"{grain.untrained} was trained: expected a checkpoint as `hat calibrate` writes it")
    adapters = {
        (name, exits): _adapter(grain.trained, exits) for name, grain in grains.items() for exits in (False, True)
    }
    for row in read_rows(out, QualityRow) if out.exists() else []:
        if row.adapter != adapters.get((row.granularity, row.exit_rate > 0), row.adapter):
            raise HatError(f"{out} holds rows of another {row.granularity} checkpoint: remove it, or write elsewhere")
    with RowWriter(out, QualityRow, key=Point._fields) as writer:
        for granularity, grain in grains.items():
            missing = [p for p in points(granularity) if p not in writer.done]
            if not missing:
                continue
            hat = HierarchicalTransformer.from_pretrained(grain.trained, dtype=dtype)
            if hat.config.granularity != granularity:
                raise HatError(f"{grain.trained} has the {hat.config.granularity} grain, expected {granularity}")
            for (text, tokens), group in groupby(missing, key=lambda p: (p.text, p.max_tokens)):
                for row in _on_text(hat, grain, adapters, text, tokens, list(group), progress):
                    writer.write(row)
                    yield row


def _on_text(hat, grain: Grain, adapters, text: str, max_tokens: int, points, progress) -> Iterator[QualityRow]:
    blocks = load_text(text, hat.base.tokenizer, split="test", max_tokens=max_tokens)
    with hat.dense():
        base, against = score(hat, blocks, progress=False), states(hat, blocks, progress=False)
    run = partial(score, hat, blocks, against=against, progress=progress)
    sample = blocks.select(range(0, len(blocks), max(1, round(max_tokens / MATCH_TOKENS))))
    for (capacity, rate), group in groupby(points, key=lambda p: (p.capacity, p.exit_rate)):
        with hat.at(capacity, rate), hat.collect() as traces:
            trained = run()
        for point in group:
            if point.variant == "trained":
                found = trained
            elif point.variant == "random_exits":
                exits = RandomExits(exit_shares(traces, hat.config.exit_layers), point.seed)
                with hat.at(capacity, 0.0), hat.exiting(exits):
                    found = run()
            else:
                try:
                    control = _control(hat, grain, point, sample, trained.capacity)
                except HatError as error:  # out of this control's reach; the others are not lost for it
                    warnings.warn(f"no row for {point.variant} at {capacity} on {text}: {error}", stacklevel=2)
                    continue
                with hat.using(control):
                    found = run()
            yield _row(hat, adapters[point.granularity, rate > 0], point, blocks, base, trained, found)


def _control(hat, grain: Grain, point: Point, sample, capacity: float):
    capacity = max(0.1, capacity)
    if point.variant == "untrained":
        return matched(hat, as_in(hat, grain.untrained), sample, capacity)
    return CONTROLS[point.variant](hat, sample, capacity, point.seed)


def _row(hat, adapter: str, point: Point, blocks, base: Score, trained: Score, found: Score) -> QualityRow:
    paired, margin = compare(base, found), compare(trained, found)
    return QualityRow(
        *point,
        realised=round(found.capacity, 4),
        realised_exit=round(found.exit_rate, 4),
        model_share=round(found.model_share, 4),
        base_ppl=round(paired.base_ppl, 4),
        ppl=round(paired.ppl, 4),
        increase=round(paired.increase, 5),
        increase_low=round(paired.low, 5),
        increase_high=round(paired.high, 5),
        top1=round(found.agreement.top1, 4),
        kl=round(found.agreement.kl, 5),
        margin=round(margin.increase, 5),
        margin_low=round(margin.low, 5),
        margin_high=round(margin.high, 5),
        tokens=paired.tokens,
        blocks=paired.n_blocks,
        text_hash=text_hash(blocks)[:16],
        base=hat.base.name,
        adapter=adapter,
        device=hat.base.device.type,
        dtype=str(hat.base.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _adapter(checkpoint: Path, exits: bool) -> str:
    """Gates that are trained again leave the rows without exits as they are."""
    if not checkpoint.is_dir():
        raise HatError(f"no checkpoint at {checkpoint}: make it with `hat train`")
    found = read_checkpoint(checkpoint)
    parts = {name: t.numpy().tobytes() for name, t in found.tensors.items() if exits or name.startswith("routers.")}
    tables = asdict(found.calibration) if found.calibration else {}
    used = {k: v for k, v in tables.items() if exits or not k.startswith("exit_")}
    return digest({"tables": used, **{name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}})[:16]


def tables(results: Path | None = None) -> dict[str, str]:
    """The channel grain, trained and untrained at equal work."""
    rows = saved("quality", results).query("granularity == 'channel' and exit_rate == 0").sort_values("tokens")
    cells = {(r.capacity, r.text, r.variant): said(r._asdict()) for r in rows.itertuples()}  # on most tokens: the last
    ways = [(text, variant) for text in TEXTS for variant in ("trained", "untrained")]
    header = ["capacity", *(f"{text}, {variant}" for text, variant in ways)]
    lines = [[f"{c:.2f}", *(cells.get((c, *way)) for way in ways)] for c in sorted(set(rows["capacity"]), reverse=True)]
    return {"quality": markdown(header, lines)}
