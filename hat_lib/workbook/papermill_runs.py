"""One run of one notebook: find it, check its parameters, execute it, judge it, read what it recorded.

papermill alone is too kind for a sweep. A misspelt parameter only logs a line, and every point then runs the
defaults; a killed kernel leaves a notebook whose cells all say "completed"; an exception in a widget callback
hides in the widget's state. So names and types of parameters are checked before anything starts, and a
notebook has passed only if papermill returned, no cell shows an error and no Output widget holds one.

The notebook's process sees ``HAT_FIGURES``, the folder for its figures.
"""

from __future__ import annotations

import ast
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

from hat_lib.config import HatError
from hat_lib.workbook.notebooks import KERNEL, errors, one_line
from hat_lib.workbook.session import RESULT

START_TIMEOUT = 120  # seconds for a kernel to come up on a busy machine
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_one_at_a_time = threading.Lock()  # environment and working folder are the whole process's


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
        try:
            known = inspect_notebook(notebook)
        except ValueError as error:  # no kernel, or one without a language
            raise HatError(f"{notebook.name}: {error}") from error
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
    source: Path,
    output: Path,
    figures: Path,
    parameters: dict,
    cell_timeout: int,
    threads: int | None = None,
) -> Result:
    """Execute ``source`` in its own folder into ``output``. Never raises for what the notebook did.

    ``threads`` is what the kernel may compute with (default: as it finds it), ``cell_timeout`` in seconds.
    """
    import papermill

    figures.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    environment = {"HAT_FIGURES": str(figures.resolve())}
    # papermill would fill in a {name} in a path
    literal = [str(path).replace("{", "{{").replace("}", "}}") for path in (source, output)]
    if threads:
        environment |= dict.fromkeys(THREADS, str(threads))
    try:
        with _one_at_a_time, _environment(**environment):
            papermill.execute_notebook(
                *literal,
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
def _environment(**variables: str):
    """Environment variables that a kernel started inside inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _excerpt(source: str, lines: int = 6) -> str:
    shown = source.strip().splitlines()
    return "\n".join(f"    | {line}" for line in shown[:lines] + ["..."] * (len(shown) > lines))


def results(path: Path) -> dict:
    """All that the cells of an executed notebook handed to `hat_lib.workbook.session.record`."""
    found = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", ()):
            found |= output.get("data", {}).get(RESULT, {})
    return found
