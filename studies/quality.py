"""The quality of the trained checkpoints beside every control, at equal work: ``data/results/quality.csv``.

The rows are those of `hat_lib.evaluation.equal_work`, at the points of `plan`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hat_lib import checkpoint
from hat_lib.config import HatError
from hat_lib.evaluation import equal_work
from hat_lib.evaluation.controls import CONTROLS
from hat_lib.evaluation.equal_work import CHECKPOINTS, TEXTS, Point, Row, has_variant
from hat_lib.method.grain import GRAINS
from hat_lib.plotting import frontier
from studies.common import markdown, saved
from studies.plotting import findings
from studies.plotting.findings import increase_text

ABOUT = "a variant (trained, untrained, a control) at a point, at equal work"
MINUTES = 95
KEY = equal_work.KEY
SEEDS = 5
"""draws of random exits, whose rates are small"""
MANY = {"addresses": 20_480, "docstrings": 10_240, "encyclopedia": 20_480}
"""tokens on which the channel grain is compared with its start; of the addresses, all of the test part"""
FEW = 4_096
"""tokens of each text for what costs many times as much: controls, exits, the token grain"""


def plan(granularity: str) -> list[Point]:
    """The points of one grain; those on the same tokens of a text are adjacent."""
    if granularity == "channel":
        gates = "trained", "random_exits"
        # Just below 1.0 the dial is too steep to be matched to a rate of 0.1.
        exits = [((1.0,), 0.1, gates), ((1.0,), 0.3, (*gates, "no_exits")), ((0.75,), 0.1, ("trained", "no_exits"))]
        dial = [((0.9, 0.7, 0.55, 0.4), 0.0, ("trained",)), ((1.0,), 0.0, ("fine_tuned",))]
        more = [((0.9, 0.7, 0.55, 0.4), 0.0, ("untrained",)), ((0.7, 0.55, 0.4), 0.0, ("uncorrected",))]
        more += [((0.75, 0.62), 0.0, ("trained",))]
        beside = [((0.7, 0.55), 0.0, ("trained", *CONTROLS)), *exits]
        plans = [(text, tokens, dial + more * (text in TEXTS)) for text, tokens in MANY.items()]
        plans += [(text, FEW, beside) for text in TEXTS]
    else:
        exits = [((1.0,), 0.1, ("trained",)), ((0.75,), 0.1, ("trained",))]
        beside = [((0.7, 0.55), 0.0, ("trained", *CONTROLS)), ((0.9, 0.75, 0.62, 0.4), 0.0, ("trained",)), *exits]
        plans = [(text, FEW, beside) for text in TEXTS]
    return [
        Point(granularity, text, tokens, capacity, rate, variant, seed)
        for text, tokens, grid in plans
        for capacities, rate, variants in grid
        for capacity in capacities
        for variant in variants
        for seed in range(SEEDS if variant == "random_exits" else 1)
        if has_variant(granularity, variant)
    ]


def rows(
    done: Mapping[tuple, Row] | None = None,
    *,
    channel: Path = CHECKPOINTS / "default",
    channel_untrained: Path = CHECKPOINTS / "calibrated",
    token: Path = CHECKPOINTS / "token",
    token_untrained: Path = CHECKPOINTS / "calibrated_token",
    grains: Sequence[str] = tuple(GRAINS),
    points: Sequence[Point] | None = None,
    dtype: str = "fp32",
) -> Iterator[Row]:
    """See `hat_lib.evaluation.equal_work.rows`; by default, the points of `plan`."""
    checkpoints = {"channel": (channel, channel_untrained), "token": (token, token_untrained)}
    if unknown := set(grains) - set(checkpoints):
        raise HatError(f"grains must be among {', '.join(checkpoints)}, got {unknown.pop()!r}")
    points = [point for grain in grains for point in plan(grain)] if points is None else points
    yield from equal_work.rows(done or {}, {grain: checkpoints[grain] for grain in grains}, points, dtype)


def write_prices() -> None:
    """The measured increases of the committed checkpoints, into each of them."""
    own = {name: saved(name) for name in ("quality", "published", "stand_ins")}
    variants = (("default", "quality", "channel", "trained"), ("calibrated", "quality", "channel", "untrained"),
                ("token", "quality", "token", "trained"), ("published", "published", "token", "trained"),
                ("token_stand_ins", "stand_ins", "token", "trained"))  # fmt: skip
    for folder, file, granularity, variant in variants:
        checkpoint.write_prices(CHECKPOINTS / folder, equal_work.prices(own[file], granularity, variant))


def figures(results: Path | None = None) -> dict:
    table = saved("quality", results)
    both = table[table["text"].isin(TEXTS)]  # with controls and both grains
    controls = findings.beside_controls(table, "docstrings")
    return {"quality": frontier.quality(both), "divergence": findings.divergence(table), "06_quality": controls,
            "08_exits": findings.exits(table), "08_promised": findings.promised(table)}  # fmt: skip


def tables(results: Path | None = None) -> dict[str, str]:
    rows = saved("quality", results).query("granularity == 'channel' and exit_rate == 0")
    rows = rows.sort_values("tokens").drop_duplicates(["text", "variant", "capacity"], keep="last")
    lines = []
    for variant in ("trained", "uncorrected", "untrained", "fine_tuned"):
        here = rows[rows["variant"] == variant].sort_values("capacity", ascending=False)
        for capacity, at in here.groupby("capacity", sort=False):
            cells = {r.text: increase_text(r._asdict()) for r in at.itertuples()}
            name = variant.replace("_", " ")
            lines.append([name, f"{capacity:.2f}", f"{at['model_share'].mean():.2f}", *map(cells.get, MANY)])
    return {"quality": markdown(["channel grain", "capacity", "of the model's work", *MANY], lines)}
