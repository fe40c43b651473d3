"""The token grain with something in place of each skipped FFN: ``data/results/stand_ins.csv``.

The rows are as in `studies.quality`, for a checkpoint trained as ``token`` was, with a low-rank product in place of a
skipped FFN (`hat_lib.method.corrections`). Its work counts in the model share, not in the capacity.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from studies import published, quality
from studies.common import CHECKPOINTS, TEXTS, markdown, saved
from studies.plotting.findings import increase_text

ABOUT = "as in quality, for the token grain with low-rank stand-ins for skipped FFNs"
MINUTES = 3
KEY, Row = quality.KEY, quality.Row


def rows(
    done: Mapping[tuple, Row] | None = None, *, token: Path = CHECKPOINTS / "token_stand_ins", dtype: str = "fp32"
) -> Iterator[Row]:
    yield from published.rows(done, token=token, dtype=dtype)


def tables(results: Path | None = None) -> dict[str, str]:
    ways = {"nothing in its place": "quality", "a stand-in": "stand_ins"}
    asked = "granularity == 'token' and exit_rate == 0 and variant == 'trained'"
    found = {way: saved(name, results).query(asked).sort_values("tokens") for way, name in ways.items()}
    cells = {(way, r.text, r.capacity): f"{increase_text(r._asdict())} at {r.realised:.2f}, KL {r.kl:.2f}"
             for way, rows in found.items() for r in rows.itertuples()}  # fmt: skip
    lines = [[f"{c:.2f}", *(cells.get((way, text, c)) for text in TEXTS for way in ways)]
             for c in sorted(set(found["a stand-in"]["capacity"]), reverse=True)]  # fmt: skip
    return {"stand_ins": markdown(["capacity", *(f"{text}: {way}" for text in TEXTS for way in ways)], lines)}
