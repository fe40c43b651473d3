"""What each choice in the recipe is worth: short runs that differ in one thing, ``data/results/ablations.csv``.

Every run trains routers for a few steps from the same seed and is then measured at the same realised capacities of the
layers, with the head in full, on validation text from the domain it was trained on and on the other domain. Short runs
rank choices that act quickly; they say nothing about how a choice scales.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from matplotlib.figure import Figure

from hat_lib.backbone.base import load_base, parse_dtype
from hat_lib.calibration.capacity import calibrate
from hat_lib.config import GRANULARITIES, HatConfig, check_count
from hat_lib.evaluation.controls import as_in, matched
from hat_lib.evaluation.perplexity import Score, compare, score_each
from hat_lib.experiments.common import Machine, Perplexity, interval, machine, markdown, perplexity, rounded, saved
from hat_lib.model.modes import together
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting.findings import choices, said
from hat_lib.text.blocks import held_out, load_text, spread
from hat_lib.training.recipe import Recipe
from hat_lib.training.run import CALIBRATION_TOKENS, Run, train

ABOUT = "a short run that differs in one thing"
MINUTES = 60
KEY = ("granularity", "change", "capacity", "text")
# (text, split) that a run is measured on. The second is reported, but selects nothing.
MEASURED = (("addresses", "validation"), ("docstrings", "test"))


@dataclass(frozen=True)
class Change:
    """One run: the recipe of its grain with one thing changed; ``trained=False`` is the start, with 0 steps."""

    granularity: str
    name: str
    recipe: dict = field(default_factory=dict)
    trained: bool = True
    # Channel grain: how the start is calibrated, see `calibrate`, and what is trained beside the routers.
    split: str = "damage"
    token_sensitivity: bool = True
    corrections: bool = True


CHANGES = (
    Change("channel", "start", trained=False),
    Change("channel", "default"),
    Change("channel", "no corrections", corrections=False),
    Change("channel", "uniform split, start", split="uniform", trained=False),
    Change("channel", "no token sensitivity, start", token_sensitivity=False, trained=False),
    Change("channel", "no token sensitivity", token_sensitivity=False),
    Change("token", "published"),
    Change("token", "no z-loss, no entropy", {"z_weight": 0.0, "entropy_weight": 0.0}),
    # what notebook 03 trains with, so as to learn in forty steps
    Change("token", "four changes together", {"layer_dropout": 0.0, "capacity": 0.75, "spread": 0.0, "anneal": 0.0,
                                              "budget_weight": 10.0, "router_lr": 2e-2}),
)  # fmt: skip
CAPACITIES = {"channel": (0.62, 0.4), "token": (0.75,)}
"""where the runs of a grain are compared"""
CORRECTION_RANK = 4
"""that of the checkpoint ``default``"""


@dataclass(frozen=True)
class Row(Machine, Perplexity):
    granularity: str
    change: str
    split: str
    steps: int
    capacity: float
    realised: float
    margin: float | None
    margin_low: float | None
    margin_high: float | None
    """perplexity over that of the grain's first change with as many steps, on the same tokens, less 1, with its 95 %
    paired interval; 0 for that change itself"""


def rows(
    done: Collection = (),
    *,
    base: str = "bundled",
    grains: Sequence[str] = GRANULARITIES,
    steps: int = 40,
    tokens: int = 4_000,
    dtype: str = "bf16",
    changes: Sequence[Change] = CHANGES,
) -> Iterator[Row]:
    """For each change, after ``steps`` training steps, a row per capacity and text, on ``tokens`` tokens per text."""
    parse_dtype(dtype)
    check_count("steps", steps, 1), check_count("tokens", tokens, 1024)
    references: dict[tuple, Score] = {}
    with TemporaryDirectory() as folder:

        def measure(change: Change, points: Sequence[tuple]) -> dict[tuple, tuple]:
            found = _trained(change, Path(folder), base, steps, dtype)
            return _scored(found, base, points, tokens, dtype)

        for change in changes:
            points = [(capacity, at) for at in MEASURED for capacity in CAPACITIES[change.granularity]]
            lacking = [at for at in points if (change.granularity, change.name, at[0], at[1][0]) not in done]
            if change.granularity not in grains or not lacking:
                continue
            kind = change.granularity, change.trained
            first = next(c for c in changes if (c.granularity, c.trained) == kind)
            scored = measure(change, points if change is first else lacking)
            if change is first:
                references |= {(kind, at): found for at, (_, found, _) in scored.items()}
            elif (kind, lacking[0]) not in references:  # a run that was stopped goes on
                references |= {(kind, at): found for at, (_, found, _) in measure(first, points).items()}
            for at in lacking:
                yield _row(change, steps * change.trained, *at, *scored[at], references[kind, at])
            gc.collect()  # models and their hooks refer to each other, and the collector cannot see their size


def _trained(change: Change, folder: Path, base: str, steps: int, dtype: str) -> Path:
    """The checkpoint of a run, in ``folder``."""
    make = Recipe.published if change.granularity == "token" else Recipe.channel
    # The same number of tokens per step for both grains, and no token twice.
    recipe = make("full", **{"batch_size": 2, "log_steps": steps, "save_steps": steps, **change.recipe})
    recipe = replace(recipe, tokens=steps * recipe.batch_size * recipe.block_size)
    start = rank = None
    if change.granularity == "channel":
        start = _calibrated(change, folder, base, recipe.block_size, dtype)
        rank = CORRECTION_RANK if change.corrections else None
    if not change.trained:
        return start
    found = Path(mkdtemp(dir=folder)) / "run"
    beside = {"start": start and str(start), "correction_rank": rank, "max_steps": steps}
    train(Run("routers", change.granularity, base, recipe, dtype, **beside), found, progress=False)
    return found


def _scored(found: Path, base: str, points: Sequence[tuple], tokens: int, dtype: str) -> dict[tuple, tuple]:
    """(capacity, (text, split)) -> scores of the dense model and of the checkpoint ``found``, and the machine."""
    hat, scored = HierarchicalTransformer.from_pretrained(found, base, dtype=dtype), {}
    for text, split in MEASURED:
        if not (capacities := [c for c, at in points if at == (text, split)]):
            continue
        blocks, family = spread(load_text(text, hat.base.tokenizer, split=split), tokens), as_in(hat, found)
        settings = []
        for capacity in capacities:  # the head in full, as in training
            around = partial(together, hat.dense, partial(hat.correcting, hat.correction_strength(capacity)))
            policy = matched(hat, family, blocks, capacity, around)
            settings.append(partial(together, around, partial(hat.using, policy)))
        dense, scores = score_each(hat, blocks, settings, progress=False)
        for capacity, routed in zip(capacities, scores, strict=True):
            scored[capacity, (text, split)] = dense, routed, machine(hat.base)
    return scored


def _row(change, steps: int, capacity: float, text: tuple[str, str], dense, routed, about: dict, first: Score) -> Row:
    margin = compare(first, routed)
    low, high = interval(margin)
    return rounded(
        Row,
        **about | vars(routed.agreement) | perplexity(compare(dense, routed)),
        granularity=change.granularity,
        change=change.name,
        text=text[0],
        split=text[1],
        steps=steps,
        capacity=capacity,
        realised=routed.layer_capacity,
        margin=margin.increase,
        margin_low=low,
        margin_high=high,
    )


def _calibrated(change: Change, folder: Path, base: str, block_size: int, dtype: str) -> Path:
    """The checkpoint in ``folder`` that a run starts from; runs that differ only in their recipe share it."""
    start = folder / f"{change.split}-{change.token_sensitivity}"
    if not start.exists():
        loaded = load_base(base, dtype=dtype)
        hat = HierarchicalTransformer(loaded, HatConfig.default(loaded))
        # Runs are scored on the validation split.
        blocks = held_out("addresses", loaded.tokenizer, CALIBRATION_TOKENS, block_size, ("train",))["input_ids"]
        calibrate(hat, blocks, split=change.split, token_sensitivity=change.token_sensitivity, progress=False)
        hat.save_pretrained(start)
    return start


def figures(results: Path | None = None) -> dict[str, Figure]:
    return {"08_choices": choices(saved("ablations", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    rows = saved("ablations", results).sort_values(["granularity", "capacity"], ascending=[True, False], kind="stable")
    lines = []
    for (grain, capacity, change), of in rows.groupby(["granularity", "capacity", "change"], sort=False):
        found = {r.text: f"{said(r._asdict())}, KL {r.kl:.3f}" for r in of.itertuples()}
        lines.append(
            [grain, f"{capacity:.2f}", change, of["steps"].iloc[0], *(found.get(text) for text, _ in MEASURED)]
        )
    return {"ablations": markdown(["grain", "capacity", "change", "steps", *(text for text, _ in MEASURED)], lines)}
