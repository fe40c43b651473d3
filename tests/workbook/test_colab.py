"""On Colab the second code cell of a notebook fetches the project, once, and leaves Colab's own torch alone."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import nbformat

from hat_lib.config import NOTEBOOKS


def cells(path, kind):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_the_project_is_fetched_once_and_torch_stays(monkeypatch, tmp_path):
    ran = []

    def run(command, check):
        ran.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()

    source = cells(NOTEBOOKS / "00_setup.ipynb", "code")[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(subprocess, "run", run)
    exec(source, {})
    assert ran == []  # elsewhere nothing is fetched
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    exec(source, {})
    exec(source, {})
    clone, install = ran
    assert clone[:2] == ["git", "clone"] and clone[-1] == "hat-workbook"
    # The installed torch is requested by its exact version, so that pip cannot choose another.
    assert install[1:4] == ["-m", "pip", "install"] and install[-1] == f"torch=={version('torch')}"
    assert sys.path[0] == str(tmp_path / "hat-workbook")  # an editable install shows only in the next process


def test_every_notebook_has_that_cell_and_a_badge_that_opens_it():
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert cells(path, "code")[1] == cells(NOTEBOOKS / "00_setup.ipynb", "code")[1], path.name
        link = f"https://colab.research.google.com/github/hat-workbook/hat-workbook/blob/main/notebooks/{path.name}"
        assert f"]({link})" in cells(path, "markdown")[0]
