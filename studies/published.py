"""The published recipe, measured like our own: ``data/results/published.csv``.

The rows are as in `studies.quality`, for the checkpoint trained with the published hyperparameters.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from hat_lib.evaluation.controls import CONTROLS
from studies import quality
from studies.common import CHECKPOINTS, TEXTS, markdown, saved
from studies.plotting.findings import increase_text

ABOUT = "as in quality, for the token grain trained by the published recipe"
MINUTES = 3
KEY, Row = quality.KEY, quality.Row


def rows(
    done: Mapping[tuple, Row] | None = None, *, token: Path = CHECKPOINTS / "published", dtype: str = "fp32"
) -> Iterator[Row]:
    """The points of the token grain that are trained and without exits."""
    points = [p for p in quality.plan("token") if p.variant == "trained" and p.exit_rate == 0]
    yield from quality.rows(done, token=token, grains=["token"], points=points, dtype=dtype)


def tables(results: Path | None = None) -> dict[str, str]:
    asked = "granularity == 'token' and exit_rate == 0"
    ours, theirs = (saved(name, results).query(asked).sort_values("tokens") for name in ("quality", "published"))
    ways = ("our recipe", "published recipe", "best control")
    lines = []
    for capacity in sorted(set(ours["capacity"]) & set(theirs["capacity"]), reverse=True):
        line = [f"{capacity:.2f}"]
        for text in TEXTS:
            here = [rows[(rows["text"] == text) & (rows["capacity"] == capacity)] for rows in (ours, theirs)]
            for rows in here:
                row = rows[rows["variant"] == "trained"].iloc[-1]
                line.append(f"{increase_text(row)} at {row['realised']:.2f}")
            rivals = here[0][here[0]["variant"].isin(CONTROLS)].sort_values("increase").to_dict("records")
            line.append(f"{increase_text(rivals[0])}, {rivals[0]['variant']}" if rivals else None)
        lines.append(line)
    return {"published": markdown(["capacity", *(f"{text}: {way}" for text in TEXTS for way in ways)], lines)}
