"""Run the workbook: papermill over the notebooks, judged by what really went wrong.

    python -m hat_lib.workbook run [NN ...] [-p name=value]   into runs/<name>/, working tree untouched
    python -m hat_lib.workbook execute [NN ...]               redo the committed outputs and figures/
    python -m hat_lib.workbook clean [FILE ...]               take machine traces out of notebook files

papermill alone is too kind for a sweep. A misspelt parameter only logs a line, and every point then runs the
defaults; a killed kernel leaves a notebook whose cells all say "completed"; an exception in a widget callback
hides in the widget's state. So names and types of parameters are checked before anything starts, and a
notebook has passed only if papermill returned, no cell shows an error and no Output widget holds one.

The notebook's process sees ``HAT_FIGURES``, the folder for its figures. A ``run`` also sets ``HAT_RUN=1``:
figures/ and data/ are to stay as they are.
"""

from __future__ import annotations

import ast
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import nbformat
import typer
import yaml

from .config import NOTEBOOKS, REPO, RUNS, HatError
from .notebook_files import KERNEL, clean_file, errors, one_line

START_TIMEOUT = 120  # seconds for a kernel to come up on a busy machine

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Result:
    """How one notebook went."""

    notebook: str
    seconds: float
    figures: Path
    error: str
    """empty if it passed, else what failed and where, in a few lines"""


def select(names: list[str], folder: Path) -> list[Path]:
    """The notebooks ``NN_*.ipynb`` of a folder that ``names`` mean (a number or a name); all for no names."""
    every = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise HatError(f"no notebook in {folder}")
    chosen = set()
    for name in names:
        matches = {path for path in every if Path(name).name in (path.stem[:2], path.stem, path.name)}
        if not matches:
            raise HatError(f"no notebook {name!r}; there are: {', '.join(path.stem for path in every)}")
        chosen |= matches
    return sorted(chosen) or every


def parse_parameters(assignments: list[str], notebooks: list[Path]) -> dict:
    """``["capacity=0.7"]`` -> ``{"capacity": 0.7}``; `HatError` unless every notebook takes name and type.

    Values are YAML, fitted to the type of the default in the notebook's ``parameters`` cell.
    """
    from papermill import inspect_notebook

    parameters = {}
    for notebook in notebooks if assignments else ():
        known = inspect_notebook(notebook)
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if not equals:
                raise HatError(f"a parameter is written name=value, got {assignment!r}")
            if name not in known:
                options = ", ".join(known) or "none"
                raise HatError(f"{notebook.name} has no parameter {name!r}; it has: {options}")
            parameters[name] = _typed(name, text, known[name]["default"])
    return parameters


def _typed(name: str, text: str, default_source: str):
    try:
        value = yaml.safe_load(text)
        default = ast.literal_eval(default_source)
    except yaml.YAMLError:
        raise HatError(f"the value of parameter {name!r} is not valid YAML: {text!r}") from None
    except (ValueError, SyntaxError):  # the default is an expression: nothing to compare with
        return value
    if isinstance(default, str) and not isinstance(value, str):
        return text
    if isinstance(default, float) and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1 as a whole number and 1e-3 as text
        except ValueError:
            pass  # the type check below says it better
    if default is not None and type(value) is not type(default):
        kind = type(default).__name__
        raise HatError(f"parameter {name!r} must be of type {kind}, like {default!r}; got {text!r}")
    return value


def run_notebook(
    source: Path, output: Path, figures: Path, parameters: dict, cell_timeout: int, keep_tree: bool
) -> Result:
    """Execute ``source`` in its own folder into ``output``. Never raises for what the notebook did."""
    import papermill

    figures.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        with _environment(HAT_FIGURES=str(figures.resolve()), HAT_RUN="1" if keep_tree else None):
            papermill.execute_notebook(
                source,
                output,
                parameters,
                kernel_name=KERNEL["name"],
                cwd=source.parent,
                progress_bar=False,
                start_timeout=START_TIMEOUT,
                execution_timeout=cell_timeout,
                extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else each kernel warns of loopback TCP
            )
        error = next(errors(nbformat.read(output, as_version=4)), "")
    except papermill.PapermillExecutionError as e:
        error = f"cell [{e.exec_count}] {one_line(e.ename, e.evalue)}\n{_excerpt(e.source)}"
    except Exception as e:  # a dead kernel, a time-out, an unreadable file: the other notebooks still run
        error = one_line(type(e).__name__, str(e))
    return Result(source.stem, time.monotonic() - start, figures, error)


@contextmanager
def _environment(**variables: str | None):
    """Environment variables that a kernel started inside inherits; None unsets one."""
    before = {name: os.environ.get(name) for name in variables}

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(variables)
    try:
        yield
    finally:
        put(before)


def _excerpt(source: str, lines: int = 6) -> str:
    shown = source.strip().splitlines()
    return "\n".join(f"    | {line}" for line in shown[:lines] + ["..."] * (len(shown) > lines))


Names = Annotated[list[str] | None, typer.Argument(metavar="[NN]...", help="Numbers or names; default: all.")]
Parameters = Annotated[list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="May be repeated.")]
Files = Annotated[list[Path] | None, typer.Argument(help="Default: all notebooks.")]
CellTimeout = Annotated[int, typer.Option(help="Seconds that one cell may take.")]


@app.command()
def run(
    names: Names = None,
    parameters: Parameters = None,
    name: Annotated[str | None, typer.Option(help="Folder under runs/; default: the time.")] = None,
    cell_timeout: CellTimeout = 600,
) -> None:
    """Run notebooks headless into runs/<name>/ and say how each went; exits with 1 if any failed."""
    notebooks = select(names or [], NOTEBOOKS)
    values = parse_parameters(parameters or [], notebooks)
    folder = RUNS / (name or time.strftime("%Y%m%d-%H%M%S"))
    if folder.exists():
        raise HatError(f"{folder} exists; choose another --name, so that no run overwrites another")
    results = []
    for notebook in notebooks:
        typer.echo(f"{notebook.stem} ...")
        output, figures = folder / notebook.name, folder / "figures" / notebook.stem
        results.append(run_notebook(notebook, output, figures, values, cell_timeout, keep_tree=True))
        _say_error(results[-1])
    _report(results)


@app.command()
def execute(names: Names = None, cell_timeout: CellTimeout = 600) -> None:
    """Run notebooks with their defaults and put outputs and figures in place; a failure changes neither."""
    results = []
    for notebook in select(names or [], NOTEBOOKS):
        typer.echo(f"{notebook.stem} ...")
        with tempfile.TemporaryDirectory() as scratch:
            output, figures = Path(scratch, notebook.name), Path(scratch, "figures")
            result = run_notebook(notebook, output, figures, {}, cell_timeout, keep_tree=False)
            if not result.error:
                clean_file(notebook, output)
                shutil.copytree(figures, REPO / "figures", dirs_exist_ok=True)
        results.append(replace(result, figures=REPO / "figures"))
        _say_error(result)
    _report(results)


@app.command()
def clean(files: Files = None) -> None:
    """Clean notebook files in place, before a commit."""
    for path in files or select([], NOTEBOOKS):
        if clean_file(path):
            typer.echo(f"cleaned {path}")


def _say_error(result: Result) -> None:
    if result.error:
        typer.echo(f"  {result.error}")


def _report(results: list[Result]) -> None:
    width = max(len("notebook"), *(len(r.notebook) for r in results))
    typer.echo(f"\n{'notebook':{width}}  status  seconds  figures")
    for r in results:
        figures = r.figures.relative_to(REPO) if r.figures.is_relative_to(REPO) else r.figures
        typer.echo(f"{r.notebook:{width}}  {'FAILED' if r.error else 'ok':6}  {r.seconds:7.1f}  {figures}")
    if any(r.error for r in results):
        raise typer.Exit(1)


def main() -> None:
    """`app`, with bad input told in one line."""
    try:
        app()
    except HatError as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
