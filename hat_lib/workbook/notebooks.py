"""Notebook files: find one, check its parameters, execute it, judge it, and clean it for a commit.

papermill alone is too lenient for a sweep. A misspelt parameter only logs a line, and every point then runs the
defaults; a killed kernel leaves a notebook whose cells all say "completed"; an exception in a widget callback
hides in the widget's state. So parameter names and types are checked before anything starts, and a notebook has
passed only if papermill returned, no cell shows an error and no Output widget holds one.
"""

from __future__ import annotations

import ast
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import nbformat
import yaml
from nbformat import NotebookNode

from hat_lib.config import HatError
from hat_lib.workbook.session import RESULT

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET_STATE, WIDGET_VIEW = (f"application/vnd.jupyter.widget-{part}+json" for part in ("state", "view"))
FOLDED = "hide-input"
"""tag of a cell whose source is folded; from it, `clean` sets the key that JupyterLab uses"""
PAPERMILL_TAGS = {"injected-parameters", "papermill-error-cell-tag"}
PROGRESS = re.compile(r".*\d+%\||.*\d+ ?\w* \[\d+:\d+")  # a tqdm bar, with or without a total
START_TIMEOUT = 120  # seconds for a kernel to come up on a busy machine
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_one_at_a_time = threading.Lock()  # environment and working folder belong to the whole process


@dataclass(frozen=True)
class Result:
    """How one notebook went."""

    notebook: str
    seconds: float
    figures: Path
    error: str
    """empty if it passed, else what failed and where, in a few lines"""


def select(names: list[str], folder: Path) -> list[Path]:
    """The notebooks ``NN_*.ipynb`` of a folder that match ``names`` (numbers or names); all of them without names."""
    every = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise HatError(f"no notebook in {folder}: they come with a clone of the repository")
    chosen = set()
    for name in names:
        matches = {path for path in every if Path(name).name in (path.stem[:2], path.stem, path.name)}
        if not matches:
            raise HatError(f"no notebook {name!r}; there are: {', '.join(path.stem for path in every)}")
        chosen |= matches
    return sorted(chosen) or every


def parse_parameters(assignments: list[str], notebooks: list[Path]) -> dict:
    """``["capacity=0.7"]`` -> ``{"capacity": 0.7}``; `HatError` unless every notebook takes the name and type.

    Values are YAML, converted to the type of the default in the notebook's ``parameters`` cell.
    """
    from papermill import inspect_notebook

    parameters = {}
    for notebook in notebooks if assignments else ():
        try:
            known = inspect_notebook(notebook)
        except Exception as error:  # no kernel, a kernel without a language, or whatever papermill raises
            raise HatError(f"{notebook.name}: {one_line(error)}") from error
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
    except (ValueError, SyntaxError):  # the default is an expression, so there is nothing to compare with
        return value
    if isinstance(default, str) and not isinstance(value, str):
        return text
    if isinstance(default, float) and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1 as an integer and 1e-3 as text
        except ValueError:
            pass  # the type check below has a better message
    if default is not None and type(value) is not type(default):
        kind = type(default).__name__
        raise HatError(f"parameter {name!r} must be of type {kind}, like {default!r}; got {text!r}")
    return value


def run_notebook(
    source: Path, output: Path, figures: Path, parameters: dict, cell_timeout: int, threads: int | None = None
) -> Result:
    """Execute ``source`` in its own folder into ``output``. Never raises because of what the notebook did.

    What an Output widget catches is in the output file; inside the notebook its ``outputs`` stay empty.

    Args:
        figures: folder for its figures, which its process sees as ``HAT_FIGURES``.
        cell_timeout: seconds.
        threads: for the kernel to compute with; None leaves the environment as it is.
    """
    import papermill
    from nbclient.output_widget import OutputWidget

    figures.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # papermill would fill in a {name} in a path
    literal = [str(path).replace("{", "{{").replace("}", "}}") for path in (source, output)]
    environment = {"HAT_FIGURES": str(figures.resolve())} | (dict.fromkeys(THREADS, str(threads)) if threads else {})
    try:
        # nbclient also reports what an Output widget caught to the kernel, while the loop that waits for the cell's
        # reply uses the same socket: about once in a hundred times the reply was lost, and the run hung.
        untold = patch.object(OutputWidget, "sync_state", lambda widget: None)
        with _one_at_a_time, untold, patch.dict(os.environ, environment):  # the kernel inherits the environment
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
        shown = e.source.strip().splitlines()
        excerpt = "".join(f"\n    | {line}" for line in shown[:6] + ["..."] * (len(shown) > 6))
        error = f"cell [{e.exec_count}] {_one_line(e.ename, e.evalue)}{excerpt}"
    except Exception as e:  # a dead kernel, a timeout, an unreadable file: the other notebooks still run
        error = _one_line(type(e).__name__, str(e))
    return Result(source.stem, time.monotonic() - start, figures, error)


def errors(nb: NotebookNode) -> Iterator[str]:
    """One line for every error in a notebook, including those hidden in the state of its Output widgets."""
    for cell in nb.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                yield f"cell [{cell.execution_count}] {_one_line(output.ename, output.evalue)}"
    widgets = nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for widget in widgets.values():
        for output in widget.get("state", {}).get("outputs", ()):
            if output.get("output_type") == "error":
                yield f"in a widget's callback: {_one_line(output['ename'], output['evalue'])}"


def _one_line(kind: str, message: str) -> str:
    return f"{kind}: {' '.join(message.split())[:200]}"


def one_line(error: Exception) -> str:
    """A library's error message, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def results(path: Path) -> dict:
    """Everything the cells of an executed notebook passed to `hat_lib.workbook.session.record`."""
    found = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", ()):
            found |= output.get("data", {}).get(RESULT, {})
    return found


def predictions(path: Path) -> dict[str, list[str]]:
    """The predictions `hat_lib.workbook.session.judge` printed in an executed notebook, by "held" and "FAILED"."""
    found: dict[str, list[str]] = {"held": [], "FAILED": []}
    for cell in nbformat.read(path, as_version=4).cells:
        for line in "".join(output.get("text", "") for output in cell.get("outputs", ())).splitlines():
            verdict, _, prediction = line.partition(": ")
            if verdict in found:
                found[verdict].append(prediction)
    return found


def clean(nb: NotebookNode) -> NotebookNode:
    """In place: keep source, outputs, execution counts, cell ids, tags and the kernel's name, for nbval, papermill and
    readers; whatever else a machine, a run or an editor leaves in a file causes diffs without giving information.

    A cell with the tag `FOLDED` is folded. Widget views are removed, along with the state they need; their text stays.
    Outputs on stderr that only hold progress bars are removed too. Raises `HatError` on a cell added by papermill: such
    a file is the record of a run, not the workbook.
    """
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        if PAPERMILL_TAGS & set(tags):
            raise HatError(f"a cell that papermill added ({', '.join(tags)}) cannot be committed")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if FOLDED in tags:
            cell.metadata["jupyter"] = {"source_hidden": True}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for data in (output.data for output in cell.outputs if len(output.get("data", ())) > 1):
                data.pop(WIDGET_VIEW, None)
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    return nb


def _is_progress(output: NotebookNode) -> bool:
    if output.get("name") != "stderr":
        return False
    return all(PROGRESS.match(line) for line in re.split(r"[\r\n]+", output.text) if line.strip())


def clean_file(path: Path, source: Path | None = None) -> bool:
    """Write the cleaned ``source`` (default: the file itself) to ``path`` in one step; True if it changed."""
    try:
        text = nbformat.writes(clean(nbformat.read(source or path, as_version=4))) + "\n"
    except HatError as e:
        raise HatError(f"{source or path}: {e}") from None
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
    return True
