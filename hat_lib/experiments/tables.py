"""Markdown tables in README and docs, written from ``data/results``: a number is typed nowhere.

A document says where a table stands, and `fill` writes what is between the two lines:

    <!-- table: quality -->
    <!-- end -->

The names are those of the experiments (`hat_lib.experiments.registry.NAMES`), and what their ``tables()`` add.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from hat_lib import config
from hat_lib.config import HatError

START = re.compile(r"^<!-- table: (\S+) -->$", re.M)
MARKED = re.compile(r"^<!-- table: (\S+) -->\n.*?^<!-- end -->$", re.M | re.S)
NOISE = "above ideal: noise"


def saved(name: str, results: Path | None = None) -> pd.DataFrame:
    """The rows of a file of results; ``results`` is its folder, ``data/results`` unless told."""
    path = (results or config.DATA / "results") / f"{name}.csv"
    if not path.is_file():
        raise HatError(f"no {path}: make it with `hat reproduce {name}`")
    return pd.read_csv(path)


def markdown(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table, a line for each row; what is missing (None, nan) is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [["" if value is None or value != value else str(value) for value in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def times(speedup: float, ideal: float | None = None) -> str:
    """A speedup; skipping alone cannot beat its ideal, so a point above it says how large the noise is.

    >>> times(1.16), times(1.16, 1.1), times(1.104, 1.1)
    ('1.16x', '1.16x (above ideal: noise)', '1.10x')
    """
    return f"{speedup:.2f}x" + f" ({NOISE})" * (ideal is not None and round(speedup, 2) > round(ideal, 2))


def documents() -> list[Path]:
    """The files that may hold tables."""
    docs = sorted((config.REPO / "docs").rglob("*.md"))
    return [config.REPO / "README.md", config.REPO / "data" / "README.md", *docs]


def fill(text: str, tables: Mapping[str, str], where: str) -> str:
    """``text`` with every marked table as ``tables`` has it; `HatError` for an unknown name and a missing end."""

    def put(found: re.Match) -> str:
        name = found[1]
        if name not in tables:
            raise HatError(f"{where}: no table {name!r}; there are: {', '.join(tables)}")
        return f"<!-- table: {name} -->\n{tables[name]}<!-- end -->"

    if len(START.findall(text)) != len(MARKED.findall(text)):
        raise HatError(f"{where}: a table has no line `<!-- end -->`; tables: {', '.join(START.findall(text))}")
    return MARKED.sub(put, text)


def outdated(tables: Mapping[str, str]) -> dict[Path, str]:
    """Documents whose tables are not those of the data, with the text that they should have."""
    texts = {path: path.read_text(encoding="utf-8") for path in documents()}
    filled = {path: fill(text, tables, str(path.relative_to(config.REPO))) for path, text in texts.items()}
    return {path: text for path, text in filled.items() if text != texts[path]}
