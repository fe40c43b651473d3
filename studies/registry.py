"""The studies: one module per file of ``data/results``, with the same name and interface, and the command that runs
them. To add one, write the module and put its name into `NAMES`.

    ABOUT, MINUTES  what a row is, in one line; about how long all rows take on two idle cores
    Row, KEY        a dataclass, whose fields are the columns, and the fields that tell rows apart
    rows(done)      measures the rows whose keys are not in ``done``, one by one; its keyword arguments are the options
    figures()       the figures of the saved rows, by file name, if any
    tables()        the tables of README and docs of the saved rows, in Markdown, by name, if any

A document marks the place of a table; `fill` writes what is between the lines ``<!-- table: NAME -->`` and
``<!-- end -->``.
"""

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import typer

from hat_lib import config
from hat_lib.cli.options import option
from hat_lib.config import DATA, REPO, RUNS, HatError, check_count, check_writable
from hat_lib.plotting.style import save_figure
from hat_lib.rows import RowWriter
from hat_lib.terminal import Command, say
from studies import state
from studies.common import markdown

NAMES = ("decode", "answers", "quality", "published", "stand_ins", "tasks", "frontier",
         "speed_targets", "token_time", "self_speculative", "parting", "ablations", "reserve")  # fmt: skip
"""in the order in which they are measured"""
RESULTS = DATA / "results"
MARKED = re.compile(r"^<!-- table: (\S+) -->$((?:(?!^<!-- table).)*?^<!-- end -->$)?", re.M | re.S)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(cls=Command)
def run(
    names: list[str] | None = typer.Argument(
        None, metavar="[NAME]...", help="Studies; none lists them.", show_default=False
    ),
    everything: bool = option(False, "Every study, each after those whose files it reads.", "--all"),
    out: Path | None = option(
        None, "Folder of the CSV files; only rows that they lack are measured. [default: runs/results]"
    ),
    again: bool = option(False, "Measure every row again, and replace the old file once all are done.", "--again"),
    stale: bool = option(False, "Of these, only the studies whose code or data have changed since.", "--stale"),
    settings: list[str] | None = option(
        None, "An option of the study; may be repeated: --set channel=0.9,0.7.", "--set", metavar="NAME=VALUE"
    ),
    figures: bool = option(False, "Measure nothing: redraw figures/, or those of --out.", "--figures"),
    tables: bool = option(False, "Measure nothing: rewrite the tables of README and docs.", "--tables"),
) -> None:
    """Measure results again, row by row, and draw what uses them.

    Without a name, lists what there is, and what is stale. What was stopped resumes where it was. The committed files
    and figures change only with --out data/results, and the rows they already hold only with --again as well.
    """
    folder = out or RUNS / "results"
    check_writable(folder, "results")
    wanted = list(NAMES) if everything else names or []
    studies = {name: load(name) for name in wanted or NAMES}
    if settings and len(wanted) != 1:
        raise HatError("--set goes with the name of one study")
    if figures:
        for name in studies:
            draw(name, out or RESULTS)
    if tables:
        for path, text in outdated(all_tables()).items():
            path.write_text(text, encoding="utf-8")
            typer.echo(f"wrote {path}")
        load("quality").write_prices()
    if figures or tables:
        return
    if not wanted:
        for name, study in studies.items():
            note = "stale" if state.is_stale(name, out or RESULTS) else ""
            typer.echo(f"{name:18} {study.MINUTES:4} min  {note:5}  {study.ABOUT}")
        return
    changed = parse(wanted[0], settings) if settings else {}
    for name, study in studies.items():
        if stale and not state.is_stale(name, folder):
            typer.echo(f"{name}: nothing has changed since it was measured")
            continue
        count = 0
        for row in measure(name, folder, again=again, **changed):
            count += 1
            typer.echo(f"{name}: " + ", ".join(f"{field} {getattr(row, field)}" for field in study.KEY))
        note = "" if count else ", as it had them all (--again measures them once more)"
        typer.echo(f"{name}: {count} new rows in {folder / name}.csv{note}")
        draw(name, folder)


def draw(name: str, results: Path) -> None:
    """Redraw the figures of a study; a warning if a file they need does not exist."""
    folder = REPO / "figures" if results.resolve() == RESULTS.resolve() else results / "figures"
    study = load(name)
    try:
        for figure, drawn in getattr(study, "figures", lambda _: {})(results).items():
            typer.echo(f"wrote {save_figure(drawn, figure, folder)}")
    except HatError as error:
        say("warning", f"the figures of {name} stay as they are: {error}")


def load(name: str) -> ModuleType:
    if name not in NAMES:
        raise HatError(f"no study {name!r}; there are: {', '.join(NAMES)}")
    return import_module(f"studies.{name}")


def measure(name: str, results: Path, *, again: bool = False, **options) -> Iterator:
    """Measure what ``results/NAME.csv`` lacks, or everything ``again``, yielding each row once it is written."""
    study, path = load(name), results / f"{name}.csv"
    made_from = state.digest(name)
    own = (again or not path.is_file()) and not options  # all rows from one state, and as they are committed
    unfinished = results / f"{name}.csv.new"  # where a stopped run resumes
    if again:
        if unfinished.is_file() and state.known(results).get(unfinished.name, made_from) != made_from:
            raise HatError(f"{unfinished} was begun with other code or data: delete it to begin again")
        results.mkdir(parents=True, exist_ok=True)
        state.remember(unfinished.name, made_from, results)
    with RowWriter(unfinished if again else path, study.Row, study.KEY) as writer:
        for row in study.rows(writer.done, **options):
            writer.write(row)
            yield row
    if again:
        unfinished.replace(path)
        state.remember(unfinished.name, None, results)
    if own or again:
        state.remember(name, made_from if own else None, results)


def parse(name: str, settings: Sequence[str]) -> dict:
    """``["rounds=3", "channel=0.9,0.7"]`` as keyword arguments of the study's ``rows``, by type."""
    kinds, found = option_kinds(name), {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in kinds:
            raise HatError(f"{name} takes {', '.join(f'{k}=' for k in kinds)}, got {setting!r}")
        kind, many = kinds[key]
        try:
            found[key] = [kind(part.strip()) for part in text.split(",") if part.strip()] if many else kind(text)
        except ValueError:
            raise HatError(f"{name}: {key} takes {'numbers' if many else 'a number'}, got {text!r}") from None
        if kind is int:
            for count in found[key] if many else [found[key]]:
                check_count(key, count, 1)
    return found


def option_kinds(name: str) -> dict[str, tuple[type, bool]]:
    """Option -> (type of a value, whether it takes several), in the order of the signature."""
    kinds = {}
    for key, parameter in inspect.signature(load(name).rows, eval_str=True).parameters.items():
        hint = parameter.annotation
        if isinstance(hint, types.UnionType):  # ``str | None``
            hint = typing.get_args(hint)[0]
        kind = (*typing.get_args(hint), hint)[0]
        if parameter.kind is parameter.KEYWORD_ONLY and kind in (str, int, float, Path):
            kinds[key] = kind, kind is not hint
    return kinds


def all_tables(results: Path | None = None) -> dict[str, str]:
    """Every Markdown table, by the name that marks its place in a document; the table `results` lists the files."""
    studies = {name: load(name) for name in NAMES}
    lines = [[f"`{name}`", study.ABOUT, f"{study.MINUTES} min"] for name, study in studies.items()]
    tables = {"results": markdown(["file, `python -m studies`", "what a row is", "takes, on two idle cores"], lines)}
    for study in studies.values():
        if hasattr(study, "tables"):
            tables |= study.tables(results)
    return tables


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
    found = {}
    for path in documents():
        text = path.read_text(encoding="utf-8")
        filled = fill(text, tables, str(path.relative_to(config.REPO)))
        if filled != text:
            found[path] = filled
    return found
