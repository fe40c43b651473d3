"""On Colab the second code cell of a notebook fetches the project, once, and leaves Colab's own torch alone."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from hat_lib.config import NOTEBOOKS

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


def cells(path, kind):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What the fetching cell runs, in an empty folder, with pip and git stubbed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    ran = []

    def run(command, check):
        ran.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def test_the_project_is_fetched_once_and_torch_stays(commands, monkeypatch, tmp_path):
    source = cells(PATHS[0], "code")[1]
    exec(source, {})
    assert commands == [] and list(tmp_path.iterdir()) == []  # elsewhere nothing is fetched
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    exec(source, {})
    clone, install = commands
    assert clone[:2] == ["git", "clone"] and clone[-1] == "hat-workbook"
    # The installed torch is requested by its exact version, so that pip cannot choose another.
    assert install[1:4] == ["-m", "pip", "install"] and install[-1] == f"torch=={version('torch')}"
    assert sys.path[0] == str(tmp_path / "hat-workbook")  # an editable install shows only in the next process
    exec(source, {})
    assert len(commands) == 2


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_notebook_has_that_cell_and_a_badge_that_opens_it(path):
    assert cells(path, "code")[1] == cells(PATHS[0], "code")[1]
    link = f"https://colab.research.google.com/github/hat-workbook/hat-workbook/blob/main/notebooks/{path.name}"
    assert f"]({link})" in cells(path, "markdown")[0]
