"""Notebook files: what may be committed of one, and what went wrong in one.

A committed notebook keeps source, outputs, execution counts, cell ids and tags: nbval compares only cells
that have a count, papermill finds its parameters by a tag, and readers see the outputs without running
anything. All else that a machine, a run or an editor leaves in the file makes diffs and gives no information.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from hat_lib.config import HatError

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET_STATE, WIDGET_VIEW = (f"application/vnd.jupyter.widget-{part}+json" for part in ("state", "view"))
PAPERMILL_TAGS = {"injected-parameters", "papermill-error-cell-tag"}
PROGRESS = re.compile(r".*\d+%\||.*\d+ ?\w* \[\d+:\d+")  # a bar of tqdm, with or without a total


def clean(nb: NotebookNode) -> NotebookNode:
    """In place: keep source, outputs, counts, ids and tags, and the kernel's name.

    Views of widgets go with the state that they need; their text stays. So do outputs on stderr that are
    progress bars and nothing else. Raises `HatError` on a cell that papermill added: such a file is the
    record of a run, not the workbook.
    """
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        if PAPERMILL_TAGS & set(tags):
            raise HatError(f"a cell that papermill added ({', '.join(tags)}) cannot be committed")
        cell.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
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


def errors(nb: NotebookNode) -> Iterator[str]:
    """One line for every error in a notebook, also for those hidden in the state of its Output widgets."""
    for cell in nb.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                yield f"cell [{cell.execution_count}] {one_line(output.ename, output.evalue)}"
    widgets = nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for widget in widgets.values():
        for output in widget.get("state", {}).get("outputs", ()):
            if output.get("output_type") == "error":
                yield f"in a widget's callback: {one_line(output['ename'], output['evalue'])}"


def one_line(kind: str, message: str) -> str:
    return f"{kind}: {' '.join(message.split())[:200]}"
