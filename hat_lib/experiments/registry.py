"""The experiments: a module for each file of ``data/results``, named like it, all of one shape.

ABOUT         what a row is, in a line
MINUTES       how long all rows take on two cores
Row, KEY      the columns, and those that tell rows apart
rows(...)     measures; its keyword arguments are what `hat reproduce NAME --set` takes
figures(...)  the figures that rest on the saved rows, by file name
tables(...)   Markdown tables of README and docs from the saved rows, by name
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from hat_lib.config import HatError

NAMES = (
    "foundation",
    "benchmark",
    "quality",
    "published",
    "published_claims",
    "speed_targets",
    "self_speculative",
    "ablations",
    "step_cost",
)
"""in the order in which one may read another's file"""


def load(name: str) -> ModuleType:
    if name not in NAMES:
        raise HatError(f"no experiment {name!r}; there are: {', '.join(NAMES)}")
    return import_module(f"hat_lib.experiments.{name}")


def all_tables(results: Path | None = None) -> dict[str, str]:
    """Every Markdown table, by the name that its place in a document is marked with."""
    return {table: text for name in NAMES for table, text in load(name).tables(results).items()}
