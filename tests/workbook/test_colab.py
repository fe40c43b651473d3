"""On Colab the second code cell of a notebook fetches the project, once, and leaves Colab's own torch alone."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import nbformat
import pytest

from hat_lib.config import NOTEBOOKS

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
OWNER_AND_NAME = "hat-workbook/hat-workbook"


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def cells(request):
    """Path of a notebook and its cells, as source by kind."""
    nb = nbformat.read(request.param, as_version=4)
    return request.param, {kind: [c.source for c in nb.cells if c.cell_type == kind] for kind in ("markdown", "code")}


@pytest.fixture
def fetch(cells, monkeypatch, tmp_path):
    """Run the fetching cell in an empty folder, with pip and git stubbed; returns the commands it ran."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def fetch(offline=()):
        commands = []

        def run(command, check=False):
            assert check, "what fails must stop the notebook"
            commands.append(command)
            if command[0] in offline:
                raise subprocess.CalledProcessError(1, command)
            if command[0] == "git":
                Path(command[-1]).mkdir()

        with monkeypatch.context() as stubs:
            stubs.setattr(subprocess, "run", run)
            exec(cells[1]["code"][1], {})
        return commands

    return fetch


def test_elsewhere_nothing_is_fetched(fetch, tmp_path):
    path = sys.path.copy()
    assert fetch() == [] and sys.path == path and list(tmp_path.iterdir()) == []


def test_on_colab_the_project_is_fetched_once_and_torch_stays(fetch, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    path = sys.path.copy()
    clone, install = fetch()
    *git, address, folder = clone
    assert git == ["git", "clone", "-q", "--depth", "1"] and folder == "hat-workbook"
    assert urlsplit(address)[:3] == ("https", "github.com", f"/{OWNER_AND_NAME}")
    # The installed torch is requested by its exact version, so that pip cannot choose another.
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    assert install == [*pip, "-e", "hat-workbook", f"torch=={version('torch')}"]
    assert sys.path == [str(tmp_path / "hat-workbook"), *path]  # an editable install shows only in the next process
    assert fetch() == []


def test_after_a_failed_install_the_cell_can_be_run_again(fetch, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    with pytest.raises(subprocess.CalledProcessError):
        fetch(offline=[sys.executable])
    (again,) = fetch()
    assert again[:4] == [sys.executable, "-m", "pip", "install"]


def test_nothing_outside_the_standard_library_is_needed_before(cells):
    _, source = cells
    parameters, fetching = map(ast.parse, source["code"][:2])
    assert all(isinstance(node, ast.AnnAssign) for node in parameters.body)
    imports = [node for node in ast.walk(fetching) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names and {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_the_badge_opens_this_notebook(cells):
    path, source = cells
    link = f"https://colab.research.google.com/github/{OWNER_AND_NAME}/blob/main/notebooks/{path.name}"
    assert f"]({link})" in source["markdown"][0]
