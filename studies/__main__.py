"""``python -m studies``: measure results again, row by row, and draw and tabulate what uses them."""

from __future__ import annotations

from pathlib import Path

import typer

from hat_lib.cli import options
from hat_lib.cli.app import Command
from hat_lib.cli.options import option, say
from hat_lib.config import DATA, REPO, RUNS, HatError

RESULTS = DATA / "results"
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
    settings: list[str] | None = option(
        None, "An option of the study; may be repeated: --set channel=0.9,0.7.", "--set", metavar="NAME=VALUE"
    ),
    figures: bool = option(False, "Measure nothing: redraw figures/, or those of --out.", "--figures"),
    tables: bool = option(False, "Measure nothing: rewrite the tables of README and docs.", "--tables"),
) -> None:
    """Measure results again, row by row, and draw what uses them.

    Without a name, lists what there is. What was stopped resumes where it was. The committed files and figures change
    only with --out data/results, and the rows they already hold only with --again as well.
    """
    folder = out or RUNS / "results"
    options.check_writable(folder, "results")

    from studies import registry

    wanted = list(registry.NAMES) if everything else names or []
    studies = {name: registry.load(name) for name in wanted or registry.NAMES}
    if settings and len(wanted) != 1:
        raise HatError("--set goes with the name of one study")
    if figures:
        for name, study in studies.items():
            _figures(name, study, out or RESULTS)
    if tables:
        for path, text in registry.outdated(registry.all_tables()).items():
            path.write_text(text, encoding="utf-8")
            typer.echo(f"wrote {path}")
        registry.load("quality").write_prices()
    if figures or tables:
        return
    if not wanted:
        for name, study in studies.items():
            typer.echo(f"{name:18} {study.MINUTES:4} min  {study.ABOUT}")
        return
    changed = registry.parse(wanted[0], settings) if settings else {}
    for name, study in studies.items():
        count = 0
        for row in registry.measure(name, folder, again=again, **changed):
            count += 1
            typer.echo(f"{name}: " + ", ".join(f"{field} {getattr(row, field)}" for field in study.KEY))
        note = "" if count else ", as it had them all (--again measures them once more)"
        typer.echo(f"{name}: {count} new rows in {folder / name}.csv{note}")
        _figures(name, study, folder)


def _figures(name: str, study, results: Path) -> None:
    from hat_lib.plotting.style import save_figure

    folder = REPO / "figures" if results.resolve() == RESULTS.resolve() else results / "figures"
    try:
        for figure, drawn in getattr(study, "figures", lambda results: {})(results).items():
            typer.echo(f"wrote {save_figure(drawn, figure, folder)}")
    except HatError as error:  # they also need a file that does not exist
        say("warning", f"the figures of {name} stay as they are: {error}")


if __name__ == "__main__":
    app(prog_name="python -m studies")
