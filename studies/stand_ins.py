"""The token grain with something in place of each skipped FFN: ``data/results/stand_ins.csv``.

The rows are as in `studies.quality`, for a checkpoint trained as ``token`` was, with a low-rank product
that stands in for a skipped FFN (`hat_lib.model.corrections`). Its work counts in the model share, not in the
capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from studies import published, quality
from studies.common import CHECKPOINTS, TEXTS, markdown, saved
from studies.plotting.findings import increase_text

ABOUT = "as in quality, for the token grain with low-rank stand-ins for skipped FFNs"
MINUTES = 7
KEY, Row = quality.KEY, quality.Row


def rows(
    done: Mapping[tuple, quality.Row] | None = None,
    *,
    token: Path = CHECKPOINTS / "token_stand_ins",
    dtype: str | None = None,
) -> Iterator[quality.Row]:
    """The same points as of the published recipe."""
    yield from published.rows(done, token=token, dtype=dtype)


def tables(results: Path | None = None) -> dict[str, str]:
    """Each increase with its realised capacity, beside that of the same recipe with nothing in an FFN's place."""
    ways = {"nothing in its place": "quality", "a stand-in": "stand_ins"}
    asked = "granularity == 'token' and exit_rate == 0 and variant == 'trained'"
    found = {way: saved(name, results).query(asked).sort_values("tokens") for way, name in ways.items()}
    cells = {(way, r.text, r.capacity): f"{increase_text(r._asdict())} at {r.realised:.2f}, KL {r.kl:.2f}"
             for way, rows in found.items() for r in rows.itertuples()}  # fmt: skip
    lines = [[f"{c:.2f}", *(cells.get((way, text, c)) for text in TEXTS for way in ways)]
             for c in sorted(set(found["a stand-in"]["capacity"]), reverse=True)]  # fmt: skip
    return {"stand_ins": markdown(["capacity", *(f"{text}: {way}" for text in TEXTS for way in ways)], lines)}
