"""What corrections learn in a few steps, by rank and by text: ``data/results/corrections.csv``.

Every run starts from calibrated thresholds, trains for a few steps from the same seed, and is measured at several
capacities of the layers, with the head in full, on text it was not trained on. Training, and thresholds from another
text, change how much a capacity executes, so runs are compared at the work of the first (`at_equal_work`). Short runs
rank what acts quickly; the learning curve of a long one is beside its checkpoint, in ``validation.csv``.
"""

import gc
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from hat_lib.backbone.base import Base, load_base, parse_dtype
from hat_lib.calibration.capacity import calibrate
from hat_lib.config import HatConfig, HatError, check_count
from hat_lib.evaluation.perplexity import score_each
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting.training import at_equal_work
from hat_lib.text.blocks import load_text, spread
from hat_lib.text.mixture import training_text
from hat_lib.training.budget_split import BudgetSplit, Thresholds
from hat_lib.training.recipe import Recipe
from hat_lib.training.run import nominal_thresholds
from hat_lib.training.trainer import train_phase
from hat_lib.training.validation import as_trained
from studies import common
from studies.common import machine, markdown, perplexity, rounded, saved
from studies.plotting import findings

ABOUT = "a short run with corrections of some rank, on some text, at equal work"
MINUTES = 60
KEY = ("change", "text", "capacity")
MEASURED = (("addresses", "validation"), ("news", "validation"), ("docstrings", "test"))
"""text and split that runs are measured on; docstrings are reported, but nothing is chosen by them"""
CAPACITIES = (0.7, 0.62, 0.5, 0.42)
SHOWN = (0.62, 0.5)  # with a neighbour on either side, so that they can be interpolated to another run's work
MIXTURE = "addresses+openings"
START_TOKENS, PROBE_TOKENS = 8192, 2048  # for the thresholds a run starts from


@dataclass(frozen=True)
class Change:
    """One run."""

    name: str
    rank: int | None = None  # of corrections; None: there are none, and routers train alone
    trained_on: str = ""  # if empty, nothing is trained
    start: str = "addresses"  # text the thresholds come from
    alone: float | None = None  # the only capacity to train at; None: the recipe's range
    split_lr: float = 0.0  # of the split of the budget over layers and sites; 0 leaves it as calibrated


CHANGES = (
    Change("untrained"),
    Change("routers alone", None, MIXTURE),
    Change("rank 0", 0, MIXTURE),
    Change("rank 1", 1, MIXTURE),
    Change("rank 4", 4, MIXTURE),
    Change("rank 16", 16, MIXTURE),
    Change("rank 4, at 0.5 alone", 4, MIXTURE, alone=0.5),
    Change("routers and split", None, MIXTURE, split_lr=0.03),
    Change("rank 4 and split", 4, MIXTURE, split_lr=0.03),
    Change("on addresses", 4, "addresses"),
    Change("on openings", 4, "openings"),
    Change("on self", 4, "self"),
    Change("thresholds of openings", start="openings"),
    Change("thresholds of self", start="self"),
    Change(f"thresholds of {MIXTURE}", start=MIXTURE),
)


@dataclass(frozen=True)
class Row(common.Machine, common.Perplexity):
    change: str
    trained_on: str
    start: str
    rank: int | None
    parameters: int  # number trained
    steps: int
    split: str
    capacity: float
    realised: float


def rows(
    done: Collection = (),
    *,
    base: str = "bundled",
    steps: int = 24,
    tokens: int = 2048,
    dtype: str = "bf16",
    changes: Sequence[str] = tuple(change.name for change in CHANGES),
) -> Iterator[Row]:
    """Rows for each of ``changes``, after ``steps`` steps of 1,024 tokens, on ``tokens`` tokens per text."""
    parse_dtype(dtype)
    check_count("tokens", tokens, 1024)
    known = {change.name: change for change in CHANGES}
    if odd := [name for name in changes if name not in known]:
        raise HatError(f"changes must be among {', '.join(known)}, got {odd[0]!r}")
    starts = {}
    for change in map(known.get, changes):
        points = {at: [c for c in CAPACITIES if (change.name, at[0], c) not in done] for at in MEASURED}
        if any(points.values()):
            hat = _started(load_base(base, dtype=dtype), change, starts)
            thresholds = _train(hat, change, steps) if change.trained_on else nominal_thresholds(hat)
            trained = steps if change.trained_on else 0
            for at, capacities in points.items():
                yield from _on_text(hat, change, trained, thresholds, *at, capacities, tokens)
            gc.collect()  # models and their hooks refer to each other, and the collector cannot see their size


def _started(base: Base, change: Change, starts: dict) -> HierarchicalTransformer:
    """The model before its first step; ``starts`` caches calibration and routers of each text."""
    blocks = training_text(base, change.start, START_TOKENS, progress=False)  # before anything is attached to the base
    hat = HierarchicalTransformer(base, HatConfig.default(base, correction_rank=change.rank))
    if change.start not in starts:
        calibrate(hat, blocks["input_ids"], probe_tokens=PROBE_TOKENS, head=False, progress=False)
        starts[change.start] = hat.calibration, {k: v.clone() for k, v in hat.routers.state_dict().items()}
    hat.calibration = starts[change.start][0]
    hat.routers.load_state_dict(starts[change.start][1])
    return hat


def _train(hat: HierarchicalTransformer, change: Change, steps: int) -> Thresholds:
    """Trains ``hat``; returns the thresholds it was trained at in the end."""
    more = {} if change.alone is None else {"capacity": change.alone, "spread": 0.0}
    more |= {"split_lr": change.split_lr, "router_epochs": 1, "log_steps": steps, "save_steps": steps}
    recipe = Recipe.channel("full", **more)
    tokens = steps * recipe.batch_size * recipe.block_size
    plain = load_base(hat.base.name, dtype=hat.base.dtype)
    blocks = training_text(plain, change.trained_on, tokens, block_size=recipe.block_size, progress=False)
    start = nominal_thresholds(hat)
    with TemporaryDirectory() as folder:
        end = train_phase(hat, blocks, recipe, "routers", start, Path(folder), max_steps=steps, progress=False)
    hat.eval()
    return end.thresholds


def _on_text(
    hat, change: Change, steps: int, thresholds: Thresholds, text: str, split: str, capacities, tokens: int
) -> Iterator[Row]:
    blocks = spread(load_text(text, hat.base.tokenizer, split=split, block_size=512), tokens)
    around = [as_trained(hat, hat.threshold_policy(thresholds(capacity)), capacity) for capacity in capacities]
    dense, measured = score_each(hat, blocks, around, progress=False)
    trained = {n: p for n, p in hat.hat_parameters().items() if steps and "_token." not in n and "gates." not in n}
    parameters = sum(p.numel() for p in trained.values())
    if change.split_lr:
        parameters += BudgetSplit(hat.config.n_layers, hat.grain.sites).offsets.numel()
    columns = machine(hat.base) | vars(change) | {"change": change.name, "parameters": parameters, "steps": steps}
    columns |= {"text": text, "split": split}
    for capacity, found in zip(capacities, measured, strict=True):
        columns |= {"capacity": capacity, "realised": found.layer_capacity}
        yield rounded(Row, **columns | perplexity(dense, found))


def shown(results: Path | None = None) -> pd.DataFrame:
    """The rows of `SHOWN`, for each text at the work of the first run."""
    table = saved("corrections", results)
    order = pd.factorize(table["change"])[0]
    every = table.assign(tokens=order, share=table["realised"]).groupby("text", sort=False)
    table = pd.concat(at_equal_work(rows) for _, rows in every)
    return table[table["capacity"].isin(SHOWN)]


def figures(results: Path | None = None) -> dict:
    return {"corrections": findings.changes(shown(results))}


def tables(results: Path | None = None) -> dict[str, str]:
    table = shown(results)
    cells = {(r.change, r.text, r.capacity): f"{r.kl:.3f} ({r.increase:+.1%})" for r in table.itertuples()}
    ways = [(text, capacity) for text, _ in MEASURED for capacity in SHOWN]
    header = ["run", "parameters trained", *(f"{text} at {capacity:g}" for text, capacity in ways)]
    first = table.drop_duplicates("change")
    lines = [[r.change, f"{r.parameters:,}" if r.steps else None, *(cells.get((r.change, *way)) for way in ways)]
             for r in first.itertuples()]  # fmt: skip
    return {"corrections": markdown(header, lines)}
