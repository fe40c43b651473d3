"""The files of an analysis: `hat analyze --out`."""

from __future__ import annotations

import csv
from collections.abc import Mapping

import pandas as pd

from hat_lib.evaluation.report import colours
from hat_lib.evaluation.tokens import TokenTable
from hat_lib.plotting.routing import FIGURES
from hat_lib.plotting.style import png
from hat_lib.text.coloured import html, passages
from hat_lib.text.plain import cell

PAGE = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'


def files(found: TokenTable, tables: Mapping[str, pd.DataFrame]) -> dict[str, bytes]:
    """Tables (CSV), figures (PNG) and coloured text (HTML), by file name; ``tables`` are those of `routing.TABLES`."""
    made = {f"{name}.csv": _csv(table) for name, table in {"tokens": found.tokens, **tables}.items()}
    made |= {f"{name}.png": png(draw(tables[name])) for name, draw in FIGURES.items()}
    page = PAGE + html(*passages(found.tokens, "model_share"), **colours(found))
    return made | {"text.html": page.encode()}


def _csv(table: pd.DataFrame) -> bytes:
    """Numbers with six digits, and text that no terminal or spreadsheet will interpret."""
    safe = table.map(lambda value: cell(value) if isinstance(value, str) else value)
    return safe.to_csv(index=False, float_format="%.6g", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").encode()
