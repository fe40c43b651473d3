"""Run the workbook: papermill over the notebooks, judged by what really went wrong.

    python -m hat_lib.workbook run [NN ...] [-p name=value]   into runs/<name>/, working tree untouched
    python -m hat_lib.workbook execute [NN ...]               redo the committed outputs and figures/
    python -m hat_lib.workbook clean [FILE ...]               strip traces of the machine from notebook files

For many runs of one notebook with different parameters, see ``hat batch``.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hat_lib.config import NOTEBOOKS, REPO, RUNS, HatError
from hat_lib.workbook.notebooks import Result, clean_file, parse_parameters, run_notebook, select

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Names = Annotated[list[str] | None, typer.Argument(metavar="[NN]...", help="Numbers or names; default: all.")]
Parameters = Annotated[list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="May be repeated.")]
Files = Annotated[list[Path] | None, typer.Argument(help="Default: all notebooks.")]
Folder = Annotated[str | None, typer.Option(help="Folder under runs/; default: the time.")]
CellTimeout = Annotated[int, typer.Option(help="Seconds that one cell may take.")]


@app.command()
def run(
    names: Names = None, parameters: Parameters = None, name: Folder = None, cell_timeout: CellTimeout = 600
) -> None:
    """Run notebooks headless into runs/<name>/ and report how each went; exits with 1 if any failed."""
    notebooks = select(names or [], NOTEBOOKS)
    values = parse_parameters(parameters or [], notebooks)
    folder = RUNS / (name or time.strftime("%Y%m%d-%H%M%S"))
    if folder.exists():
        raise HatError(f"{folder} exists; choose another --name, so that no run overwrites another")
    places = ((path, folder / path.name, folder / "figures" / path.stem) for path in notebooks)
    _report([_run(*place, values, cell_timeout) for place in places])


@app.command()
def execute(names: Names = None, cell_timeout: CellTimeout = 600) -> None:
    """Run notebooks with their defaults and put outputs and figures in place; a failed run changes neither."""
    results = []
    # The findings count what the other notebooks' outputs say, so they run last.
    for notebook in sorted(select(names or [], NOTEBOOKS), key=lambda path: path.stem.startswith("08")):
        with tempfile.TemporaryDirectory() as scratch:
            output, figures = Path(scratch, notebook.name), Path(scratch, "figures")
            result = _run(notebook, output, figures, {}, cell_timeout)
            if not result.error:
                clean_file(notebook, output)
                shutil.copytree(figures, REPO / "figures", dirs_exist_ok=True)
        results.append(replace(result, figures=REPO / "figures"))
    _report(results)


@app.command()
def clean(files: Files = None) -> None:
    """Clean notebook files in place before a commit."""
    for path in files or select([], NOTEBOOKS):
        if clean_file(path):
            typer.echo(f"cleaned {path}")


def _run(notebook: Path, output: Path, figures: Path, parameters: dict, cell_timeout: int) -> Result:
    typer.echo(f"{notebook.stem} ...")
    result = run_notebook(notebook, output, figures, parameters, cell_timeout)
    if result.error:
        typer.echo(f"  {result.error}")
    return result


def _report(results: list[Result]) -> None:
    width = max(len("notebook"), *(len(r.notebook) for r in results))
    typer.echo(f"\n{'notebook':{width}}  status  seconds  figures")
    for r in results:
        figures = r.figures.relative_to(REPO) if r.figures.is_relative_to(REPO) else r.figures
        typer.echo(f"{r.notebook:{width}}  {'FAILED' if r.error else 'ok':6}  {r.seconds:7.1f}  {figures}")
    if any(r.error for r in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        app()
    except HatError as e:
        raise SystemExit(f"error: {e}") from None
