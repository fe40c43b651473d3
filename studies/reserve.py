"""The text that stayed closed until the last measurement of a release: ``data/results/reserve.csv``.

The rows are as in `studies.quality`, for the trained channel grain without exits, and for its corrections alone.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from studies import quality
from studies.common import CHECKPOINTS, markdown, saved
from studies.plotting.findings import increase_text

ABOUT = "as in quality, on the text that stayed closed until now"
MINUTES = 8
KEY, Row = quality.KEY, quality.Row


def rows(
    done: Mapping[tuple, Row] | None = None, *, channel: Path = CHECKPOINTS / "default", dtype: str = "fp32"
) -> Iterator[Row]:
    """The points of the encyclopedia, which is as long."""
    points = [p._replace(text="reserve") for p in quality.plan("channel") if p.text == "encyclopedia"]
    yield from quality.rows(done, channel=channel, grains=["channel"], points=points, dtype=dtype)


def tables(results: Path | None = None) -> dict[str, str]:
    new = saved("reserve", results)
    old = saved("quality", results).query("granularity == 'channel' and exit_rate == 0").sort_values("tokens")
    found = pd.concat([old, new]).drop_duplicates(["text", "variant", "capacity"], keep="last")
    cells = {(r.variant, r.capacity, r.text): increase_text(r._asdict()) for r in found.itertuples()}
    texts = ["reserve", *quality.MANY]
    lines = []
    for row in new.itertuples():
        line = [row.variant.replace("_", " "), f"{row.capacity:.2f}"]
        lines.append([*line, *(cells.get((row.variant, row.capacity, text)) for text in texts)])
    return {"reserve": markdown(["channel grain", "capacity", *texts], lines)}
