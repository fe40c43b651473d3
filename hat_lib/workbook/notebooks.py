"""Notebook files: find one, check its parameters, execute it, read what it found, and clean it for a commit.

Importing this without the packages for notebooks is a `HatError`.
"""

import os
import re
import threading
from pathlib import Path
from unittest.mock import patch

from hat_lib.config import HatError, literal, replaced
from hat_lib.workbook.session import RESULT

try:
    import nbformat
    import papermill
    from nbformat import NotebookNode
except ImportError as error:
    raise HatError(f"no package {error.name}: pip install 'hat-workbook[workbook]'") from error

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET_VIEW, WIDGET_STATE = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("view", "state"))
PROGRESS = re.compile(r".*\d+%\||.*\d+ ?\w* \[\d+:\d+")  # a tqdm bar, with or without a total
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_one_at_a_time = threading.Lock()  # environment and working folder belong to the whole process


def select(names: list[str], folder: Path) -> list[Path]:
    """Notebooks by path, or by number or name among the ``NN_*.ipynb`` of a folder; all of these without names."""
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    chosen = []
    for name in names:
        path = Path(name).expanduser()
        matches = [path] if path.is_file() else [p for p in notebooks if name in (p.stem[:2], p.stem, p.name)]
        if not matches:
            there = ", ".join(p.stem for p in notebooks) or "none: they come with a clone of the repository"
            raise HatError(f"no notebook {name!r}; there are: {there}")
        chosen += matches
    return chosen or notebooks


def parse_parameters(assignments: list[str], notebooks: list[Path]) -> dict:
    """``["capacity=0.7"]`` -> ``{"capacity": 0.7}``; `HatError` unless every notebook takes the name and type.

    Values are Python's; the default in the notebook's ``parameters`` cell decides about the type. papermill would only
    log a misspelt name, and run with the defaults.
    """
    parameters = {}
    for notebook in notebooks if assignments else []:
        try:
            known = papermill.inspect_notebook(notebook)
        except Exception as error:  # not a notebook, no kernel, whatever papermill raises
            raise HatError(f"{notebook.name} cannot be read as a notebook: {error}") from error
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if not equals or name not in known:
                names = ", ".join(known) or "none"
                raise HatError(f"{notebook.name} takes NAME=VALUE of its parameters ({names}), got {assignment!r}")
            default = literal(known[name]["default"])
            kind = type(default)
            value = text if kind is str else literal(text)
            if kind is float and type(value) is int:
                value = float(value)
            if default is not None and type(value) is not kind:
                raise HatError(f"parameter {name!r} must be of type {kind.__name__}, like {default!r}; got {text!r}")
            parameters[name] = value
    return parameters


def run_notebook(
    source: Path, output: Path, figures: Path, parameters: dict, cell_timeout: int, threads: int | None = None
) -> str:
    """Execute ``source`` in its own folder into ``output``; returns what failed and where, empty if it passed.

    The notebook finds the folder ``figures`` as ``HAT_FIGURES``, and computes with ``threads`` threads unless None. A
    cell may take ``cell_timeout`` seconds.
    """
    figures.mkdir(parents=True, exist_ok=True)
    environment = {"HAT_FIGURES": str(figures.resolve())} | (dict.fromkeys(THREADS, str(threads)) if threads else {})
    how = {"kernel_name": KERNEL["name"], "cwd": source.parent, "progress_bar": False}
    how |= {"start_timeout": 120, "execution_timeout": cell_timeout}  # seconds; a busy machine starts kernels slowly
    how |= {"extra_arguments": ["--IPKernelApp.log_level=ERROR"]}  # else each kernel warns of loopback TCP
    try:
        with _one_at_a_time, patch.dict(os.environ, environment):  # the kernel inherits the environment
            papermill.execute_notebook(source, output, parameters, **how)
    except papermill.PapermillExecutionError as e:
        return f"cell [{e.exec_count}] {e.ename}: {' '.join(e.evalue.split())[:200]}"
    except Exception as e:  # a dead kernel, a timeout, an unreadable file: the other notebooks still run
        return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    return ""


def code(path: Path) -> str:
    """The source of a notebook's code cells."""
    return "\0".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


def results(path: Path) -> dict:
    """Everything the cells of an executed notebook passed to `hat_lib.workbook.session.record`."""
    found = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            found |= output.get("data", {}).get(RESULT, {})
    return found


def verdicts(path: Path) -> list[tuple[str, str]] | None:
    """What `hat_lib.workbook.session.verdict` printed in an executed notebook: kept, missed or open, and the claim;
    None if its cells did not all run, one after another."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and c.source.strip()]
    counts = [cell.execution_count for cell in cells]
    if None in counts or counts != [*range(counts[0], counts[0] + len(counts))]:
        return None
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    return re.findall(r"^(kept|missed|open): (.*)$", printed, re.MULTILINE)


def clean(nb: NotebookNode) -> NotebookNode:
    """In place: keep source, outputs, execution counts, cell ids, tags, the kernel's name, and of widgets the state of
    a `PlayView`, which works without a kernel; drop what else a machine, a run or an editor leaves in a file. A cell
    tagged ``hide-input`` is folded.
    """
    widgets = nb.metadata.get("widgets", {}).get(WIDGET_STATE, {"state": {}})
    kept = {model: found for model, found in widgets["state"].items() if found["model_module"] == "anywidget"}
    layouts = [found["state"]["layout"].removeprefix("IPY_MODEL_") for found in kept.values()]
    widgets["state"] = kept | {model: widgets["state"][model] for model in layouts}
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if "hide-input" in tags:
            cell.metadata["jupyter"] = {"source_hidden": True}  # JupyterLab's key
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                if output.get("data", {}).get(WIDGET_VIEW, {}).get("model_id") not in kept:
                    output.get("data", {}).pop(WIDGET_VIEW, None)
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    if kept:
        nb.metadata["widgets"] = {WIDGET_STATE: widgets}
    return nb


def _is_progress(output: NotebookNode) -> bool:
    lines = re.split(r"[\r\n]+", output.get("text", "").strip())
    return output.get("name") == "stderr" and all(PROGRESS.match(line) for line in lines)


def clean_file(path: Path, source: Path | None = None) -> bool:
    """Write the cleaned ``source`` (default: the file itself) to ``path``; True if it changed.

    Raises `HatError` for the record of a run: a file with a cell that papermill added.
    """
    nb = nbformat.read(source or path, as_version=4)
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in nb.cells):
        raise HatError(f"{source or path} has a cell that papermill added, which cannot be committed")
    text = nbformat.writes(clean(nb)) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    with replaced(path) as new:
        new.write_text(text, encoding="utf-8")
    return True
