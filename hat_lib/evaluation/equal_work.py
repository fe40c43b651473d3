"""A trained checkpoint beside every control, at equal work: the rows of `hat sweep` and of the study `quality`.

A row for each grain, text, capacity and variant. A control is tuned until its share of the whole model's work, on the
very text that is scored, is within `EQUAL` of the trained model's: by its work, never by its predictions. ``static``,
``cosine`` and ``removal`` are made from a sample of that text, which favours them. No control has corrections;
``uncorrected`` is the trained model without its own, so that what is left of a margin is the choice alone;
``fine_tuned`` has them at full strength with nothing skipped. All keep the head's shortlist. Exits have two controls:
as many at random, and ``no_exits``, the trained model at a capacity that does the same work without any.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import groupby, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset

from hat_lib.base.load import chosen, tokenizer_of
from hat_lib.base.machine import Machine, machine
from hat_lib.checkpoint import Checkpoint, Price, digest, read_checkpoint
from hat_lib.config import CAPACITY_MIN, DATA, HatError, check_capacity, check_exit_rate
from hat_lib.contexts import combined
from hat_lib.evaluation import controls
from hat_lib.evaluation.controls import CONTROLS, EQUAL, Around, Family, OutOfReach
from hat_lib.evaluation.perplexity import Perplexity, Score, columns, compare, score_each
from hat_lib.hat import HierarchicalTransformer
from hat_lib.rows import rounded
from hat_lib.text.blocks import default_split, load_text, spread, text_hash
from hat_lib.text.corpora import CORPORA

CHECKPOINTS = DATA / "checkpoints"
TEXTS = ("addresses", "docstrings")
VARIANTS = ("trained", "uncorrected", "untrained", "random", "static", "cosine", "removal", "random_exits", "no_exits",
            "fine_tuned")  # fmt: skip
DRAWN = {"random", "static", "removal", "random_exits"}  # which differ from seed to seed
CHANNEL = {"uncorrected", "static", "no_exits", "fine_tuned"}  # with whole FFNs, no corrections, and static is removal
SAMPLE_TOKENS = 1024  # of the text, in evenly spaced blocks: what some controls are made of


class Point(NamedTuple):
    """What tells rows apart; capacity and exit rate as requested."""

    granularity: str
    text: str
    max_tokens: int
    capacity: float
    exit_rate: float
    variant: str  #: one of `VARIANTS`
    seed: int = 0  #: of random draws


KEY = Point._fields


@dataclass(frozen=True)
class Row(Machine, Perplexity):
    granularity: str
    max_tokens: int
    capacity: float
    exit_rate: float
    variant: str
    seed: int
    realised: float
    realised_exit: float
    model_share: float
    ppl: float
    margin: float
    margin_low: float | None
    margin_high: float | None
    """perplexity over the trained model's at this point, less 1, and its 95 % paired interval; 0 for that model"""
    blocks: int
    documents: int
    text_hash: str
    adapter: str
    """beginning of the SHA-256 of the parameters and tables behind the row; those of exits only if some tokens leave"""


def has_variant(granularity: str, variant: str) -> bool:
    return granularity == "channel" or variant not in CHANNEL


def grid(
    grains: Sequence[str],
    *,
    capacities: Sequence[float],
    exit_rates: Sequence[float] = (0.0,),
    seeds: Sequence[int] = (0,),
    texts: Sequence[str] = TEXTS,
    variants: Sequence[str] = VARIANTS,
    max_tokens: int = 4000,
) -> list[Point]:
    """The points of a sweep: by grain, text, capacity, then exit rate, the trained model first.

    Controls of routers are measured without exits and below capacity 1.0, those of exits with exits, ``fine_tuned`` at
    1.0; what draws nothing, with the first seed only. Raises `HatError` for a value out of range and for no point.
    """
    capacities = [check_capacity(capacity) for capacity in capacities]
    exit_rates = [check_exit_rate(rate) for rate in exit_rates]
    if unknown := [variant for variant in variants if variant not in VARIANTS]:
        raise HatError(f"variants must be among {', '.join(VARIANTS)}, got {unknown[0]!r}")

    def is_measured(p: Point) -> bool:
        where = p.variant == "trained" or (p.exit_rate == 0 and (p.capacity == 1) == (p.variant == "fine_tuned"))
        if p.variant in ("random_exits", "no_exits"):
            where = p.exit_rate > 0
        return where and has_variant(p.granularity, p.variant) and (p.seed == seeds[0] or p.variant in DRAWN)

    axes = product(grains, texts, [max_tokens], capacities, exit_rates, variants, seeds)
    points = list(filter(is_measured, dict.fromkeys(map(Point._make, axes))))
    if not points:
        raise HatError(
            "nothing to measure at these settings: controls of routers need a capacity below 1 and exit rate 0, "
            "random_exits and no_exits one above 0; static, uncorrected and no_exits the channel grain"
        )
    return points


def rows(
    done: Mapping[tuple, Row], checkpoints: Mapping[str, tuple[Path, Path]], points: Sequence[Point], dtype: str | None,
    file: Path | str = "the file",
) -> Iterator[Row]:  # fmt: skip
    """Rows for the ``points`` that are not ``done``, as the rows of ``file`` are; ``checkpoints`` are a trained and an
    untrained one for each grain.

    Raises `HatError` for checkpoints of other kinds and, before anything is measured, for a row that is done by another
    checkpoint or base, in another dtype, or on what was another text of that name. A control that cannot match the work
    of the trained model is left out with a warning.
    """
    found, adapters = {}, {}
    for grain, (trained, untrained) in checkpoints.items():
        found[grain] = read_checkpoint(trained)
        if found[grain].config.granularity != grain:
            raise HatError(f"{trained} has the {found[grain].config.granularity} grain, expected {grain}")
        if not (found[grain].training or {}).get("routers"):
            raise HatError(f"{trained} has no trained routers: expected a checkpoint as `hat train` writes it")
        if read_checkpoint(untrained).training is not None:
            raise HatError(f"{untrained} was trained: expected a checkpoint as `hat calibrate` writes it")
        adapters |= {(grain, exits): adapter_digest(found[grain], exits) for exits in (False, True)}

    tokenizer = cache(tokenizer_of)

    @cache
    def text_of(grain: str, text: str, max_tokens: int) -> tuple[Dataset, str]:
        """Its blocks, spread over all documents of a bundled text, the beginning of any other; and their hash."""
        made = SimpleNamespace(training_summary=found[grain].training, calibration=found[grain].calibration)
        how = {"split": default_split(text, made), "max_tokens": None if text in CORPORA else max_tokens}
        blocks = spread(load_text(text, tokenizer(found[grain].base), **how), max_tokens)
        return blocks, text_hash(blocks)[:16]

    asked = {(p.granularity, p.text) for p in points}
    for row in done.values():
        now = {"dtype": str(chosen(dtype)[0]).removeprefix("torch.")}
        if row.granularity in found:
            now |= {"adapter": adapters[row.granularity, row.exit_rate > 0], "base": found[row.granularity].base}
        if (row.granularity, row.text) in asked:  # whatever its tokens: a price is of those with the most
            now["text_hash"] = text_of(row.granularity, row.text, row.max_tokens)[1]
        for name, value in now.items():
            if (before := getattr(row, name)) != value:
                raise HatError(
                    f"{file} has rows of {row.text}, {row.granularity} grain, with {name} {before}, now it is {value}: "
                    "measure all of them again, or write elsewhere"
                )
    missing = [p for p in points if p not in done]
    for p in missing:
        text_of(p.granularity, p.text, p.max_tokens)  # raises for a text that cannot be read
    for grain, (trained, untrained) in checkpoints.items():
        here = [p for p in missing if p.granularity == grain]
        if here:
            hat = HierarchicalTransformer.from_pretrained(trained, dtype=dtype)
            here = [p for p in here if p.variant != "fine_tuned" or hat.corrections]
        for (text, max_tokens), group in groupby(here, key=lambda p: (p.text, p.max_tokens)):
            blocks, its_hash = text_of(grain, text, max_tokens)
            about = machine(hat.base) | {"documents": len(set(blocks["doc"])), "text_hash": its_hash}
            for point, base, partner, scored in _scored(hat, untrained, blocks, list(group)):
                margin = compare(partner, scored).ends("margin")
                adapter = adapters[grain, point.exit_rate > 0]
                yield rounded(Row, KEY, **about | columns(base, scored) | point._asdict() | margin, adapter=adapter)


def _scored(hat, untrained: Path, blocks: Dataset, points: Sequence[Point]) -> Iterator[tuple]:
    """Each point, and three scores: of the base, of the trained model there, and of its variant; the trained model's
    points first."""
    at = {(p.capacity, p.exit_rate): partial(hat.at, p.capacity, p.exit_rate) for p in points}
    base, scores = score_each(hat, blocks, list(at.values()), progress=False)
    trained, settings = dict(zip(at, scores, strict=True)), {}

    @cache
    def family(variant: str, seed: int) -> Family:
        if variant in CONTROLS:
            return CONTROLS[variant](hat, spread(blocks, SAMPLE_TOKENS), seed)
        return controls.checkpoint_family(hat, untrained) if variant == "untrained" else controls.own_choice(hat)

    for point in points:
        partner = trained[point.capacity, point.exit_rate]
        if point.variant == "trained":
            yield point, base, partner, partner
            continue
        try:
            settings[point] = _setting(hat, blocks, point, partner, family)
        except OutOfReach as error:
            _warn(point, error)
    scores = score_each(hat, blocks, list(settings.values()), progress=False)[1] if settings else []
    for point, found in zip(settings, scores, strict=True):
        partner = trained[point.capacity, point.exit_rate]
        fixed = point.variant in ("random_exits", "fine_tuned")  # by chance, or the dense model's
        if fixed or abs(found.model_share - partner.model_share) <= EQUAL:
            yield point, base, partner, found
        else:
            _warn(point, f"its share of the work is {found.model_share:.3f}, not {partner.model_share:.3f}")


def _setting(hat, blocks: Dataset, point: Point, partner: Score, family: Callable[[str, int], Family]) -> Around:
    """The context of a variant; that of a control does the work of the trained model, ``partner``, on ``blocks``."""
    at_capacity = partial(hat.at, point.capacity, 0.0)
    if point.variant == "fine_tuned":
        return partial(combined, hat.dense, hat.correcting)
    if point.variant == "random_exits":
        left = partner.exits.copy()
        left[-1] -= sum(min(len(ids), hat.config.protected_tokens) for ids in blocks["input_ids"])
        exits = controls.RandomExits(controls.leaving_shares(left, hat.config.exit_layers), point.seed)
        return partial(combined, at_capacity, partial(hat.using, exits=exits))

    uncorrected = partial(combined, at_capacity, partial(hat.correcting, 0.0))  # with the head as it is there

    def around(dial: float) -> Around:
        if point.variant == "no_exits":
            return partial(hat.at, max(dial, CAPACITY_MIN), 0.0)
        return controls.under(hat, family(point.variant, point.seed)(dial), uncorrected)

    return around(controls.turned(hat, around, blocks, partner.model_share, which=2))


def _warn(point: Point, why) -> None:
    warnings.warn(f"no row for {point.variant} at {point.capacity} on {point.text}: {why}", stacklevel=3)


def adapter_digest(found: Checkpoint, exits: bool) -> str:
    """Digest of the parameters and tables, without those of gates unless ``exits``."""
    parts = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
             for name, tensor in found.tensors.items() if exits or not name.startswith("gates.")}  # fmt: skip
    tables = asdict(found.calibration) if found.calibration else {}
    used = {n: table for n, table in tables.items() if table is not None and (exits or not n.startswith("exit_"))}
    return digest({"tables": used, **parts})[:16]


def prices(rows: pd.DataFrame, granularity: str, variant: str = "trained") -> list[Price]:
    """What a variant was measured at, without exits, for its checkpoint: at each capacity, on the most tokens. Raises
    `HatError` for rows in several dtypes."""
    if len(dtypes := sorted(set(rows["dtype"]))) > 1:
        raise HatError(f"prices must be of one dtype, got rows in {', '.join(dtypes)}")
    rows = rows[(rows["granularity"] == granularity) & (rows["variant"] == variant) & (rows["exit_rate"] == 0)]
    rows = rows.sort_values(["text", "capacity", "tokens"]).drop_duplicates(["text", "capacity"], keep="last")
    rows = rows.rename(columns={"increase_low": "low", "increase_high": "high", "base_ppl": "base_perplexity"})
    found = rows[[field.name for field in fields(Price)]].to_dict("records")
    return [Price(**{name: None if pd.isna(value) else value for name, value in row.items()}) for row in found]


def price_texts(prices: Sequence[Price], capacity: float) -> dict[str, str]:
    """Roughly what a capacity costs in perplexity, by text, such as "+4%": interpolated in the logarithm of perplexity,
    and below the lowest capacity "more than" its cost."""
    found = {}
    for text in dict.fromkeys(price.text for price in prices):
        rows = sorted((price.capacity, np.log1p(price.increase)) for price in prices if price.text == text)
        capacities, logs = zip(*rows, (1.0, 0.0), strict=True)
        more = "more than " if capacity < capacities[0] else ""
        found[text] = f"{more}{np.expm1(np.interp(capacity, capacities, logs)):+.0%}"
    return found
