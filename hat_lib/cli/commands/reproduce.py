"""``hat reproduce``: the files of ``data/results`` made again, and the figures and tables that rest on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hat_lib.cli import validation as given
from hat_lib.cli.console import say
from hat_lib.cli.options import option
from hat_lib.config import DATA, REPO, RUNS, HatError

RESULTS = DATA / "results"


def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Experiments; none lists them.", show_default=False)
    ] = None,
    everything: Annotated[bool, option("Every experiment, each after those whose files it reads.", "--all")] = False,
    out: Annotated[
        Path | None,
        option("Folder of the CSV files. Rows that they hold are kept; only missing ones are measured. "
               "[default: runs/results]", metavar="DIR", show_default=False),
    ] = None,
    again: Annotated[
        bool, option("Measure every row, and replace the old file once all are there.", "--again")
    ] = False,
    settings: Annotated[
        list[str] | None,
        option("An option of the experiment; may be repeated: --set rounds=3 --set capacities=0.9,0.7.", "--set",
               metavar="NAME=VALUE"),
    ] = None,
    figures: Annotated[
        bool, option("Measure nothing: redraw figures/ from data/results, or those of --out.", "--figures")
    ] = False,
    tables: Annotated[
        bool, option("Measure nothing: rewrite the tables of README and docs from data/results.", "--tables")
    ] = False,
) -> None:  # fmt: skip
    """Measure results again, row by row, and draw what rests on them.

    Without a name: what there is, and how long each takes. What was stopped goes on where it was. The committed files
    and figures change with --out data/results alone, and rows that they hold only with --again.
    """
    folder = out or RUNS / "results"
    given.check_writable(folder, "results")

    from hat_lib.experiments import registry

    wanted = list(registry.NAMES) if everything else names or []
    experiments = {name: registry.load(name) for name in wanted}
    if settings and len(wanted) != 1:
        raise HatError("--set goes with the name of one experiment")
    options = registry.parse(wanted[0], settings) if settings else {}
    if figures:
        for name, experiment in (experiments or {name: registry.load(name) for name in registry.NAMES}).items():
            _figures(name, experiment, out or RESULTS)
    if tables:
        _tables(registry.all_tables())
    if figures or tables:
        return
    if not wanted:
        _list(registry)
    for name, experiment in experiments.items():
        count = 0
        for row in registry.measure(name, folder, again=again, **options):
            count += 1
            typer.echo(f"{name}: " + ", ".join(f"{key} {getattr(row, key)}" for key in experiment.KEY))
        known = "" if count else ", as it had them all (--again measures them once more)"
        typer.echo(f"{name}: {count} new rows in {folder / name}.csv{known}")
        _figures(name, experiment, folder)


def _list(registry) -> None:
    for name in registry.NAMES:
        experiment = registry.load(name)
        typer.echo(f"{name:18} {experiment.MINUTES:4} min  {experiment.ABOUT}")
        typer.echo(f"{'':28}--set {', '.join(registry.option_kinds(name))}")


def _figures(name: str, experiment, results: Path) -> None:
    from hat_lib.plotting.style import save_figure

    folder = REPO / "figures" if results.resolve() == RESULTS.resolve() else results / "figures"
    try:
        for figure, drawn in experiment.figures(results).items():
            typer.echo(f"wrote {save_figure(drawn, figure, folder)}")
    except HatError as error:  # it also rests on a file that is not there
        say("warning", f"the figures of {name} stay as they are: {error}")


def _tables(tables: dict[str, str]) -> None:
    from hat_lib.experiments.tables import outdated

    for path, text in outdated(tables).items():
        path.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {path}")
