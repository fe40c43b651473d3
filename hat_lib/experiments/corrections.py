"""What corrections learn in a few steps, by rank and by text: ``data/results/corrections.csv``.

Every run starts from the same thresholds, trains for a few steps from the same seed, and is measured at the same
executed share of the layers, the head in full, on text that it was not trained on: other addresses, news, and
docstrings. Runs that are not trained differ in the text that their thresholds come from. Short runs rank what acts
fast; the learning curve of a long one is beside its checkpoint, in ``validation.csv``.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure

from hat_lib.backbone.base import Base, load_base, parse_dtype
from hat_lib.calibration.capacity import calibrate
from hat_lib.config import CAPACITY_MIN, HatConfig, HatError, check_count
from hat_lib.evaluation.baselines import matched
from hat_lib.evaluation.perplexity import compare, score_each
from hat_lib.experiments.common import Perplexity, machine, markdown, perplexity, rounded, saved
from hat_lib.model.policies import Policy
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting import frontier
from hat_lib.plotting.findings import said
from hat_lib.text.blocks import at_even_distances, load_text
from hat_lib.text.mixture import training_text
from hat_lib.training.recipe import Recipe
from hat_lib.training.run import nominal_thresholds
from hat_lib.training.trainer import train_phase

ABOUT = "a short run with corrections of some rank, on some text, at equal work"
MINUTES = 60
KEY = ("change", "text", "capacity")
MEASURED = (("addresses", "validation"), ("news", "validation"), ("docstrings", "test"))
"""text and split that runs are measured on; docstrings are shown, not chosen by"""
CAPACITIES = (0.62, 0.5)
"""shares of the layers' work"""
MIXTURE = "addresses+openings"
START_TOKENS, PROBE_TOKENS = 8192, 2048
"""for the thresholds of a start"""


@dataclass(frozen=True)
class Change:
    """One run: the text of its thresholds and, where it is trained, that of its training and the rank of corrections;
    None trains routers alone."""

    name: str
    rank: int | None = None
    trained_on: str = ""
    start: str = "addresses"


CHANGES = (
    Change("untrained"),
    Change("routers alone", None, MIXTURE),
    Change("rank 0", 0, MIXTURE),
    Change("rank 1", 1, MIXTURE),
    Change("rank 4", 4, MIXTURE),
    Change("rank 16", 16, MIXTURE),
    Change("on addresses", 4, "addresses"),
    Change("on openings", 4, "openings"),
    Change("on self", 4, "self"),
    Change("thresholds of openings", start="openings"),
    Change("thresholds of self", start="self"),
    Change(f"thresholds of {MIXTURE}", start=MIXTURE),
)


@dataclass(frozen=True)
class Row(Perplexity):
    change: str
    trained_on: str
    start: str
    rank: int | None
    parameters: int  # that were trained
    steps: int
    split: str
    capacity: float
    realised: float
    base: str
    dtype: str


def rows(
    done: Collection = (),
    *,
    base: str = "bundled",
    steps: int = 24,
    tokens: int = 2048,
    dtype: str = "fp32",
    changes: Sequence[str] = tuple(change.name for change in CHANGES),
) -> Iterator[Row]:
    """Rows for each of ``changes``, after ``steps`` steps of 1,024 tokens, on ``tokens`` tokens per text.

    Raises `HatError` for a change that is not in `CHANGES`.
    """
    parse_dtype(dtype)
    check_count("steps", steps, 1), check_count("tokens", tokens, 1024)
    known = {change.name: change for change in CHANGES}
    if odd := [name for name in changes if name not in known]:
        raise HatError(f"changes must be among {', '.join(known)}, got {odd[0]!r}")
    starts = {}
    for change in map(known.get, changes):
        points = {at: [c for c in CAPACITIES if (change.name, at[0], c) not in done] for at in MEASURED}
        if any(points.values()):
            hat = _started(load_base(base, dtype=dtype), change, starts)
            if change.trained_on:
                _train(hat, change.trained_on, steps)
            trained = steps if change.trained_on else 0
            for at, capacities in points.items():
                yield from _on_text(hat, change, trained, *at, capacities, tokens)
            gc.collect()  # models and their hooks refer to each other, and the collector does not see their size


def _started(base: Base, change: Change, starts: dict) -> HierarchicalTransformer:
    """The model before its first step; ``starts`` keeps the tables of each text, and the sensitivities that they are
    for."""
    blocks = training_text(base, change.start, START_TOKENS, progress=False)  # before the base carries anything
    hat = HierarchicalTransformer(base, HatConfig.default(base, correction_rank=change.rank))
    if change.start not in starts:
        calibrate(hat, blocks["input_ids"], probe_tokens=PROBE_TOKENS, head=False, progress=False)
        starts[change.start] = hat.calibration, {k: v.clone() for k, v in hat.routers.state_dict().items()}
    hat.calibration = starts[change.start][0]
    hat.routers.load_state_dict(starts[change.start][1])
    return hat


def _train(hat: HierarchicalTransformer, text: str, steps: int) -> None:
    recipe = Recipe.channel("full", router_epochs=1, log_steps=steps, save_steps=steps)
    tokens = steps * recipe.batch_size * recipe.block_size
    plain = load_base(hat.base.name, dtype=hat.base.dtype)
    blocks = training_text(plain, text, tokens, block_size=recipe.block_size, progress=False)
    with TemporaryDirectory() as folder:
        train_phase(
            hat, blocks, recipe, "routers", nominal_thresholds(hat), Path(folder), max_steps=steps, progress=False
        )
    hat.eval()


def _on_text(hat, change: Change, steps: int, text: str, split: str, capacities, tokens: int) -> Iterator[Row]:
    blocks = load_text(text, hat.base.tokenizer, split=split, block_size=512)
    mean = sum(map(len, blocks["input_ids"])) / len(blocks)
    blocks, thresholds = at_even_distances(blocks, round(tokens / mean)), nominal_thresholds(hat)

    def family(dial: float) -> Policy:
        return hat.threshold_policy(thresholds(max(dial, CAPACITY_MIN)))

    for capacity in capacities:
        policy = matched(hat, family, blocks, capacity)
        around = partial(_correcting, hat, policy, hat.correction_strength(capacity))
        dense, (found,) = score_each(hat, blocks, [around], progress=False)
        parts = hat.hat_parameters() if steps else {}
        yield rounded(
            Row,
            **machine(hat.base) | vars(found.agreement) | perplexity(compare(dense, found)) | vars(change),
            change=change.name,
            parameters=sum(p.numel() for name, p in parts.items() if not name.startswith("gates.")),
            steps=steps,
            text=text,
            split=split,
            capacity=capacity,
            realised=found.layer_capacity,
        )


@contextmanager
def _correcting(hat: HierarchicalTransformer, policy: Policy, strength: float):
    with hat.dense(), hat.using(policy), hat.correcting(strength):
        yield


def figures(results: Path | None = None) -> dict[str, Figure]:
    return {"corrections": frontier.changes(saved("corrections", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    table = saved("corrections", results)
    cells = {(r.change, r.text, r.capacity): f"{said(r._asdict())}, {r.kl:.3f}" for r in table.itertuples()}
    ways = [(text, capacity) for text, _ in MEASURED for capacity in CAPACITIES]
    header = ["run", "parameters trained", *(f"{text} at {capacity:g}: perplexity, KL" for text, capacity in ways)]
    first = table.drop_duplicates("change")
    lines = [[r.change, f"{r.parameters:,}" if r.steps else None, *(cells.get((r.change, *way)) for way in ways)]
             for r in first.itertuples()]  # fmt: skip
    return {"corrections": markdown(header, lines)}
