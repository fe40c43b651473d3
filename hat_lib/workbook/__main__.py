"""Run the workbook: papermill over the notebooks, judged by what really went wrong::

    python -m hat_lib.workbook run [NN ...] [-p name=value]   into runs/<name>/, working tree untouched
    python -m hat_lib.workbook execute [NN ...]               redo the committed outputs and figures/
    python -m hat_lib.workbook clean [FILE ...]               strip traces of the machine from notebook files

For many runs of one notebook with different parameters, see ``hat batch``.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from hat_lib.config import NOTEBOOKS, REPO, RUNS, HatError
from hat_lib.terminal import Commands

try:
    from hat_lib.workbook.notebooks import clean_file, parse_parameters, run_notebook, select
except HatError as error:
    raise SystemExit(f"error: {error}") from None

app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Names = Annotated[list[str] | None, typer.Argument(metavar="[NN]...", help="Numbers, names or files; default: all.")]
Parameters = Annotated[list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="May be repeated.")]
Files = Annotated[list[Path] | None, typer.Argument(help="Default: all notebooks.")]
Folder = Annotated[str | None, typer.Option(help="Folder under runs/; default: the time.")]
Timeout = Annotated[int, typer.Option(min=1, help="Seconds that one cell may take.")]


@app.command()
def run(names: Names = None, parameters: Parameters = None, name: Folder = None, cell_timeout: Timeout = 600) -> None:
    """Run notebooks headless into runs/<name>/ and report how each went; exits with 1 if any failed."""
    notebooks = select(names or [], NOTEBOOKS)
    values = parse_parameters(parameters or [], notebooks)
    folder = RUNS / (name or time.strftime("%Y%m%d-%H%M%S"))
    if folder.exists():
        raise HatError(f"{folder} exists; choose another --name, so that no run overwrites another")
    list(_passed(notebooks, folder, values, cell_timeout))


@app.command()
def execute(names: Names = None, cell_timeout: Timeout = 600) -> None:
    """Run notebooks with their defaults and put outputs and figures in place; a failed run changes neither."""
    # The findings count what the other notebooks' outputs say, so they run last.
    notebooks = sorted(select(names or [], NOTEBOOKS), key=lambda path: path.stem.startswith("08"))
    with tempfile.TemporaryDirectory() as scratch:
        for notebook, output, figures in _passed(notebooks, Path(scratch), {}, cell_timeout):
            clean_file(notebook, output)
            shutil.copytree(figures, REPO / "figures", dirs_exist_ok=True)


@app.command()
def clean(files: Files = None) -> None:
    """Clean notebook files in place before a commit."""
    for path in files or select([], NOTEBOOKS):
        if clean_file(path):
            typer.echo(f"cleaned {path}")


def _passed(notebooks: list[Path], folder: Path, parameters: dict, cell_timeout: int) -> Iterator[tuple]:
    """Runs the notebooks, with a line about each; yields each that passed, its output and the folder of its figures."""
    failed = []
    for notebook in notebooks:
        typer.echo(f"{notebook.stem:30}  ", nl=False)
        start, output, figures = time.monotonic(), folder / notebook.name, folder / "figures" / notebook.stem
        error = run_notebook(notebook, output, figures, parameters, cell_timeout)
        typer.echo(f"{'FAILED' if error else 'ok':6}  {time.monotonic() - start:6.1f} s  {error}".rstrip())
        if error:
            failed.append(notebook.stem)
        else:
            yield notebook, output, figures
    typer.echo(f"{len(notebooks) - len(failed)} of {len(notebooks)} passed")
    if failed:
        typer.echo(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
