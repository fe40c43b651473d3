"""The studies: one module per file of ``data/results``, with the same name and interface. To add one, write the module
and put its name into `NAMES`.

    ABOUT, MINUTES  what a row is, in one line; about how long all rows take on two idle cores
    READS           other files it reads, if any
    Row, KEY        a dataclass, whose fields are the columns, and the fields that tell rows apart
    rows(done)      measures the rows whose keys are not in ``done``, one by one; its keyword arguments are the options
    figures()       the figures of the saved rows, by file name, if any
    tables()        the tables of README and docs of the saved rows, in Markdown, by name, if any

A document marks the place of a table, and `fill` writes what is between the two lines:

    <!-- table: quality -->
    <!-- end -->
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from hat_lib import config
from hat_lib.config import HatError
from hat_lib.rows import RowWriter
from studies.common import markdown

NAMES = ("decode", "benchmark", "quality", "corrections", "published", "stand_ins", "layer_shares",
         "published_claims", "speed_targets", "token_time", "self_speculative", "ablations", "step_cost")  # fmt: skip
"""ordered so that each comes after those whose files it reads"""
MARKED = re.compile(r"^<!-- table: (\S+) -->$((?:(?!^<!-- table).)*?^<!-- end -->$)?", re.M | re.S)


def load(name: str) -> ModuleType:
    if name not in NAMES:
        raise HatError(f"no study {name!r}; there are: {', '.join(NAMES)}")
    return import_module(f"studies.{name}")


def measure(name: str, results: Path, *, again: bool = False, **options) -> Iterator:
    """Measure what ``results/NAME.csv`` lacks, yielding each row once it is written.

    Args:
        again: measure everything, and replace the file once it is complete.
        options: keyword arguments of the study's ``rows``.
    """
    study = load(name)
    if reads := getattr(study, "READS", ()):  # what was measured here takes precedence over what is committed
        here = all((results / f"{other}.csv").is_file() for other in reads)
        options = {"results": results if here else None} | options
    path = results / f"{name}.csv"
    unfinished = results / f"{name}.csv.new"  # where a stopped run resumes
    with RowWriter(unfinished if again else path, study.Row, study.KEY) as writer:
        for row in study.rows(writer.done, **options):
            writer.write(row)
            yield row
    if again:
        unfinished.replace(path)


def parse(name: str, settings: Sequence[str]) -> dict:
    """``["rounds=3", "channel=0.9,0.7"]`` as keyword arguments of the study's ``rows``, checked by type."""
    kinds, found = option_kinds(name), {}
    for setting in settings:
        option, equals, text = setting.partition("=")
        if not equals or option not in kinds:
            raise HatError(f"{name} takes {', '.join(f'{k}=' for k in kinds)}, got {setting!r}")
        kind, many = kinds[option]
        try:
            found[option] = [kind(part.strip()) for part in text.split(",") if part.strip()] if many else kind(text)
        except ValueError:
            raise HatError(f"{name}: {option} takes {'numbers' if many else 'a number'}, got {text!r}") from None
    return found


def option_kinds(name: str) -> dict[str, tuple[type, bool]]:
    """Option -> (type of a value, whether it takes several), in the order of the signature."""
    kinds = {}
    for option, parameter in inspect.signature(load(name).rows, eval_str=True).parameters.items():
        hint = parameter.annotation
        if isinstance(hint, types.UnionType):  # ``str | None``
            hint = typing.get_args(hint)[0]
        kind = (*typing.get_args(hint), hint)[0]
        if parameter.kind is parameter.KEYWORD_ONLY and kind in (str, int, float, Path):
            kinds[option] = kind, kind is not hint
    return kinds


def all_tables(results: Path | None = None) -> dict[str, str]:
    """Every Markdown table, by the name that marks its place in a document; the table `results` lists the files."""
    lines = [[f"`{name}`", load(name).ABOUT, f"{load(name).MINUTES} min"] for name in NAMES]
    overview = {"results": markdown(["file, `python -m studies`", "what a row is", "takes, on two idle cores"], lines)}
    made = [load(name).tables(results) for name in NAMES if hasattr(load(name), "tables")]
    return overview | {table: text for tables in made for table, text in tables.items()}


def documents() -> list[Path]:
    """The files that may contain tables."""
    docs = sorted((config.REPO / "docs").rglob("*.md"))
    return [config.REPO / "README.md", config.REPO / "data" / "README.md", *docs]


def fill(text: str, tables: Mapping[str, str], where: str) -> str:
    """``text`` with every marked table replaced from ``tables``; `HatError` for an unknown name or a missing end."""

    def put(found: re.Match) -> str:
        name, content = found.groups()
        if name not in tables:
            raise HatError(f"{where}: no table {name!r}; there are: {', '.join(tables)}")
        if content is None:
            raise HatError(f"{where}: table {name!r} has no line `<!-- end -->`")
        return f"<!-- table: {name} -->\n{tables[name]}<!-- end -->"

    return MARKED.sub(put, text)


def outdated(tables: Mapping[str, str]) -> dict[Path, str]:
    """Documents whose tables do not match the data, with the text they should have."""
    texts = {path: path.read_text(encoding="utf-8") for path in documents()}
    filled = {path: fill(text, tables, str(path.relative_to(config.REPO))) for path, text in texts.items()}
    return {path: text for path, text in filled.items() if text != texts[path]}
