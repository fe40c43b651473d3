"""What each choice in the recipe is worth: short runs that differ in one thing, ``data/results/ablations.csv``.

Every run trains routers for a few steps from the same seed and is then measured at the same realised capacities of the
layers, with the head in full, on validation text from the domain it was trained on and on the other domain. Short runs
rank choices that act quickly; they say nothing about how a choice scales.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from matplotlib.figure import Figure

from hat_lib.backbone.base import load_base, parse_dtype
from hat_lib.calibration.capacity import calibrate
from hat_lib.config import GRANULARITIES, HatConfig, check_count
from hat_lib.evaluation.controls import as_in, matched
from hat_lib.evaluation.perplexity import compare, score_each
from hat_lib.experiments.common import Machine, Perplexity, machine, markdown, perplexity, rounded, saved
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting.findings import choices, said
from hat_lib.text.blocks import held_out, load_text
from hat_lib.training.recipe import Recipe
from hat_lib.training.run import CALIBRATION_TOKENS, Run, train
from hat_lib.training.validation import as_trained

ABOUT = "a short run that differs in one thing"
MINUTES = 140
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
    protected_tokens: int = 2
    corrections: bool = True


CHANGES = (
    Change("channel", "start", trained=False),
    Change("channel", "default"),
    Change("channel", "no corrections", corrections=False),
    Change("channel", "no learned split", {"split_lr": 0.0}),
    Change("channel", "uniform split, start", split="uniform", trained=False),
    Change("channel", "uniform split", split="uniform"),
    Change("channel", "no token sensitivity, start", token_sensitivity=False, trained=False),
    Change("channel", "no token sensitivity", token_sensitivity=False),
    Change("channel", "no protected tokens, start", protected_tokens=0, trained=False),
    Change("channel", "no protected tokens", protected_tokens=0),
    Change("channel", "text: addresses", {"text": "addresses"}),
    Change("channel", "text: openings", {"text": "openings"}),
    Change("channel", "temperature 0.2", {"temperature": 0.2}),
    Change("channel", "temperature 1", {"temperature": 1.0}),
    Change("channel", "Gumbel noise", {"noise": 1.0}),
    Change("token", "published"),
    Change("token", "no z-loss", {"z_weight": 0.0}),
    Change("token", "no entropy", {"entropy_weight": 0.0}),
    Change("token", "no z-loss, no entropy", {"z_weight": 0.0, "entropy_weight": 0.0}),
    Change("token", "no Gumbel noise", {"noise": 0.0}),
    Change("token", "no layer dropout", {"layer_dropout": 0.0}),
    Change("token", "one capacity", {"capacity": 0.75, "spread": 0.0, "anneal": 0.0}),
    Change("token", "budget weight 10", {"budget_weight": 10.0}),
    Change("token", "learning rate 2e-2", {"router_lr": 2e-2}),
    # what notebook 03 trains with, so as to learn in forty steps
    Change("token", "the last four together", {"layer_dropout": 0.0, "capacity": 0.75, "spread": 0.0, "anneal": 0.0,
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
    with TemporaryDirectory() as folder:
        for change in changes:
            points = product(CAPACITIES[change.granularity], MEASURED)
            lacking = {at for at in points if (change.granularity, change.name, at[0], at[1][0]) not in done}
            if change.granularity in grains and lacking:
                found = _trained(change, Path(folder), base, steps, dtype)
                yield from _measured(change, found, base, steps, lacking, tokens, dtype)
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


def _measured(change: Change, found: Path, base: str, steps: int, points, tokens: int, dtype: str) -> Iterator[Row]:
    hat = HierarchicalTransformer.from_pretrained(found, base, dtype=dtype)
    for text, split in MEASURED:
        if not (capacities := [c for c in CAPACITIES[change.granularity] if (c, (text, split)) in points]):
            continue
        blocks, family = load_text(text, hat.base.tokenizer, split=split, max_tokens=tokens), as_in(hat, found)
        around = [as_trained(hat, matched(hat, family, blocks, c, hat.correction_strength(c)), c) for c in capacities]
        dense, scores = score_each(hat, blocks, around, progress=False)
        for capacity, routed in zip(capacities, scores, strict=True):
            yield rounded(
                Row,
                **machine(hat.base) | vars(routed.agreement) | perplexity(compare(dense, routed)),
                granularity=change.granularity,
                change=change.name,
                text=text,
                split=split,
                steps=steps * change.trained,
                capacity=capacity,
                realised=routed.layer_capacity,
            )


def _calibrated(change: Change, folder: Path, base: str, block_size: int, dtype: str) -> Path:
    """The checkpoint in ``folder`` that a run starts from; runs that differ only in their recipe share it."""
    start = folder / f"{change.split}-{change.token_sensitivity}-{change.protected_tokens}"
    if not start.exists():
        loaded = load_base(base, dtype=dtype)
        hat = HierarchicalTransformer(loaded, HatConfig.default(loaded, protected_tokens=change.protected_tokens))
        blocks = held_out("addresses", loaded.tokenizer, CALIBRATION_TOKENS, block_size)["input_ids"]
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
