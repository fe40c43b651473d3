"""Does a target speedup come true? ``data/results/speed_targets.csv``.

For each checkpoint the targets 1.1, 1.3 and 1.6, the largest that its `SpeedCurve` reaches, and one beyond, which is
refused. The curve was measured on one text; here other prompts are continued at the capacity that it names, and the
speedup of those texts is measured again, dense and adaptive in turns at each token.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from hat_lib.config import HatError
from hat_lib.experiments.common import CHECKPOINTS, Timed, machine, markdown, rounded, saved, times
from hat_lib.experiments.quality import prices
from hat_lib.inference.generate import AdaptiveInference
from hat_lib.inference.speed import VERSUS
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting import speed
from hat_lib.text.prompts import prompts

ABOUT = "a target speedup, and what came of it"
MINUTES = 15
READS = ("quality",)
KEY = ("granularity", "versus", "requested")
TARGETS = (1.1, 1.3, 1.6)


@dataclass(frozen=True, kw_only=True)
class Row(Timed):
    checkpoint: str
    granularity: str
    versus: str
    requested: float
    reachable: bool  # or else refused
    largest: float  # the largest speedup that the curve reaches
    capacity: float | None = None  # that the target was turned into, requested
    realised_capacity: float | None = None  # median over prompts
    perplexity: str | None = None  # about what that costs, as far as quality.csv knows
    predicted: float | None = None
    measured: float | None = None  # median over prompts of the speedup on the text that was generated
    lowest: float | None = None
    highest: float | None = None  # of the prompts
    prompts: int = 0
    new_tokens: int


def rows(
    done: Collection = (),
    *,
    channel: Path = CHECKPOINTS / "default",
    token: Path = CHECKPOINTS / "token",
    versus: str = "dense",
    results: Path | None = None,
    count: int = 10,
    max_new_tokens: int = 60,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Rows for each checkpoint and target; the speed curve comes from the user's cache or is measured first.

    ``versus`` is what speedups are held against, dense (our own dense path) or hf (plain transformers); ``count`` how
    many prompts; ``quality.csv`` in ``results`` says what a capacity costs.
    """
    for checkpoint in (channel, token):
        hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
        infer = AdaptiveInference(hat, versus)
        curve = infer.curve()
        texts = [p.text for p in prompts(hat.base.tokenizer, count)]
        for target in sorted({*TARGETS, math.floor(1000 * curve.largest) / 1000, round(curve.largest + 0.5, 1)}):
            if (hat.config.granularity, versus, target) in done:
                continue
            found = {"reachable": target <= curve.largest, "largest": curve.largest}
            if found["reachable"]:
                made = [infer.generate(text, target_speedup=target, max_new_tokens=max_new_tokens) for text in texts]
                measured = [m.realised_speedup for m in made if m.realised_speedup is not None]
                known = {}
                with suppress(HatError):  # no quality.csv
                    known = prices(checkpoint, made[0].requested_capacity, results)
                found |= {
                    "capacity": made[0].requested_capacity,
                    "perplexity": ", ".join(f"{text} {increase}" for text, increase in known.items()) or None,
                    "realised_capacity": statistics.median(m.capacity for m in made),
                    "predicted": made[0].predicted_speedup,
                    "measured": statistics.median(measured) if measured else None,
                    "lowest": min(measured, default=None),
                    "highest": max(measured, default=None),
                    "prompts": len(measured),
                }
            yield rounded(
                Row,
                **machine(hat.base) | found,
                checkpoint=Path(checkpoint).name,
                granularity=hat.config.granularity,
                versus=versus,
                requested=target,
                new_tokens=max_new_tokens,
            )


def figures(results: Path | None = None) -> dict[str, Figure]:
    return {"05_targets": speed.targets(saved("speed_targets", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    measured = "measured: median (lowest to highest prompt)"
    header = ["grain", "speed over", "target", "capacity chosen", "perplexity, about", measured, "most within reach"]
    lines = []
    for r in saved("speed_targets", results).itertuples():
        found = f"{r.measured:.2f}x ({r.lowest:.2f}x to {r.highest:.2f}x)" if r.reachable else "refused"
        chosen = f"{r.capacity:.2f}" if r.reachable else None
        line = [r.granularity, VERSUS[r.versus], f"{r.requested:.3g}x", chosen, r.perplexity, found]
        lines.append([*line, times(r.largest)])
    return {"speed_targets": markdown(header, lines)}
