"""What two choices of the calibration are worth: ``data/results/ablations.csv``.

The untrained channel grain is calibrated on addresses with one thing changed, and scored at the same realised capacity
of the layers, with the head in full: on text of that kind and on another kind.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hat_lib.base.load import load_base
from hat_lib.calibration.capacity import calibrate
from hat_lib.config import HatConfig, check_count
from hat_lib.evaluation.controls import matched, own_choice, under
from hat_lib.evaluation.perplexity import Score, compare, score_each
from hat_lib.hat import HierarchicalTransformer
from hat_lib.text.blocks import held_out, load_text, spread
from studies.common import Machine, Perplexity, machine, markdown, perplexity, rounded, saved
from studies.plotting.findings import increase_text

ABOUT = "a calibration with one thing changed, at equal work of the layers"
MINUTES = 16
KEY = ("change", "capacity", "text")
CHANGES = {"none": {}, "uniform split": {"split": "uniform"}, "no token sensitivity": {"token_sensitivity": False}}
"""name -> keyword arguments of `calibrate`"""
CAPACITIES = (0.62, 0.4)
# (text, split) that is scored; calibration reads the training split of the first.
MEASURED = (("addresses", "validation"), ("docstrings", "test"))


@dataclass(frozen=True)
class Row(Machine, Perplexity):
    change: str
    split: str
    capacity: float
    realised: float
    margin: float
    margin_low: float | None
    margin_high: float | None
    """perplexity over that without a change, less 1, with its 95 % paired interval"""


def rows(
    done: Collection = (),
    *,
    base: str = "bundled",
    tokens: int = 3072,
    calibration_tokens: int = 8192,
    dtype: str = "fp32",
) -> Iterator[Row]:
    check_count("tokens", tokens, 1024), check_count("calibration_tokens", calibration_tokens, 1024)
    points = {name: [(name, c, text) for text, _ in MEASURED for c in CAPACITIES] for name in CHANGES}
    if all(point in done for of in points.values() for point in of):
        return
    loaded = load_base(base, dtype=dtype)
    texts = {(text, split): spread(load_text(text, loaded.tokenizer, split=split), tokens) for text, split in MEASURED}
    blocks = held_out("addresses", loaded.tokenizer, calibration_tokens, 512, ("train",))["input_ids"]
    first: Mapping[tuple, Score] = {}
    for name, how in CHANGES.items():
        if first and all(point in done for point in points[name]):
            continue
        hat = HierarchicalTransformer(loaded, HatConfig.default(loaded))
        calibrate(hat, blocks, head=False, progress=False, **how)
        found = {at: _scored(hat, text) for at, text in texts.items()}
        hat.unload()
        first = first or {(at, c): score for at, (_, scores) in found.items() for c, score in scores.items()}
        for (text, split), (dense, scores) in found.items():
            for capacity, score in scores.items():
                if (name, capacity, text) not in done:
                    columns = machine(loaded) | perplexity(dense, score)
                    columns |= compare(first[(text, split), capacity], score).ends("margin")
                    columns |= {"change": name, "text": text, "split": split}
                    yield rounded(Row, KEY, **columns | {"capacity": capacity, "realised": score.layer_capacity})


def _scored(hat: HierarchicalTransformer, blocks) -> tuple[Score, dict[float, Score]]:
    """The dense model, and the calibrated one at each of `CAPACITIES`."""
    settings = [under(hat, matched(hat, own_choice(hat), blocks, capacity)) for capacity in CAPACITIES]
    dense, scores = score_each(hat, blocks, settings, progress=False)
    return dense, dict(zip(CAPACITIES, scores, strict=True))


def tables(results: Path | None = None) -> dict[str, str]:
    lines = []
    table = saved("ablations", results).sort_values("capacity", ascending=False, kind="stable")
    for (capacity, change), of in table.groupby(["capacity", "change"], sort=False):
        found = {r.text: f"{increase_text(r._asdict())}, KL {r.kl:.3f}" for r in of.itertuples()}
        margins = {r.text: increase_text(r._asdict(), "margin") if change != "none" else None for r in of.itertuples()}
        cells = [cell for text, _ in MEASURED for cell in (found.get(text), margins.get(text))]
        lines.append([f"{capacity:.2f}", change, *cells])
    header = [name for text, _ in MEASURED for name in (text, "over no change")]
    return {"ablations": markdown(["capacity", "change", *header], lines)}
