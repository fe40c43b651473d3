"""What the repository promises as a whole: one list of packages, nothing machine-specific, honest notebooks."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import hat_lib
from hat_lib.workbook.notebooks import clean, errors

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "hat_lib"
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


# --- packages ---


def ranges(requirements):
    """Package -> version range, under pip's names."""
    parsed = [Requirement(r) for r in requirements]
    return {canonicalize_name(r.name): r.specifier for r in parsed}


def test_conda_pip_and_make_ask_for_the_same_packages():
    environment = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    listed = ranges(d for d in environment if isinstance(d, str))
    assert listed.pop("python") == SpecifierSet(PROJECT["requires-python"])
    listed.pop("pip")
    listed["torch"], listed["playwright"] = listed.pop("pytorch"), listed.pop("playwright-python")
    assert listed == ranges(PROJECT["dependencies"] + EXTRAS["dev"])
    assert [d["pip"] for d in environment if isinstance(d, dict)] == [["-e ."]]
    torch = next(r for r in PROJECT["dependencies"] if Requirement(r).name == "torch")
    assert f"\nTORCH := {torch}\n" in (REPO / "Makefile").read_text()


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def test_every_import_of_the_library_is_declared():
    declared = ranges(PROJECT["dependencies"] + sum((EXTRAS[e] for e in ("eval", "cluster", "gpu", "peers")), []))
    # What these packages depend on stays in the range they require.
    distribution = {"yaml": "pyyaml", "IPython": "ipykernel", "pyarrow": "datasets", "PIL": "matplotlib"}
    distribution |= dict.fromkeys(("tokenizers", "huggingface_hub"), "transformers")
    distribution |= {"llvmlite": "numba", "llama_cpp": "llama-cpp-python"}
    unknown = {
        f"{path.name}: {name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imported(node)
        if name not in sys.stdlib_module_names | {"hat_lib"}
        and canonicalize_name(distribution.get(name, name)) not in declared
    }
    assert unknown == set()


def test_what_lies_beside_the_modules_is_packaged():
    data = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    data.pop("hat_lib.data")
    packaged = {path for name, globs in data.items() for g in globs for path in REPO.joinpath(*name.split(".")).glob(g)}
    beside = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert beside and beside == packaged


def test_versions_agree():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(\d[^\]]*)\]", (REPO / "CHANGELOG.md").read_text(), re.M)
    assert {PROJECT["version"], citation["version"], newest[1]} == {hat_lib.__version__}


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_setup_refuses_an_old_python_and_names_the_way_out(tmp_path):
    shutil.copy(REPO / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    command = ["make", "test", "PYTHON=false"]  # `false` fails the version check, as an old Python does
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "Python 3.11 or newer" in done.stderr
    assert "make test PYTHON=" in done.stderr and not (tmp_path / ".venv").exists()


# --- files ---


def text_files():
    """Every file that is tracked, or would be after the next `git add`, and can be read as text."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for path in sorted(REPO / name for name in set(names.split("\0")) - {""}):
        try:
            yield path.relative_to(REPO), path.read_text(encoding="utf-8")
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
            continue


def found(pattern, among=lambda path: True):
    return [f"{path}: {m[0]}" for path, text in text_files() if among(path) for m in re.finditer(pattern, text)]


def test_no_path_of_one_machine_and_no_host_of_a_package_registry():
    folders = "|".join(("home", "root", "work", "Users", "tmp", "opt", "mnt"))
    assert found(rf"(?<![\w.~}}/:*-])/(?:{folders})/[^\s\"'`]*") == []
    hosts = r"pypi\.org|pythonhosted\.|pytorch\.org/whl|anaconda\.(?:org|com)|npmjs\.|crates\.io|deb\.debian\."
    assert found(hosts) == []


def test_hub_and_code_links_only_where_readers_look_for_them():
    def elsewhere(path):
        return path.suffix != ".ipynb" and path.name not in ("README.md", "CITATION.cff")

    assert found(r"https?://(?:www\.)?(?:github|huggingface)\.com?\b\S*", elsewhere) == []


# --- notebooks ---

UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}


def has_tag(cell, *tags):
    return bool(set(cell.metadata.get("tags", ())) & set(tags))


def is_compared(cell):
    """Whether nbval compares this cell, and there is text to compare: a figure's repr says nothing."""
    texts = [o.get("text", "") or "".join(o.get("data", {}).get("text/plain", "")) for o in cell.outputs]
    said = any(text.strip() and not text.startswith("<Figure size") for text in texts)
    return said and not has_tag(cell, *UNCOMPARED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean_executed_once_in_order_and_most_of_it_is_compared(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name)
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    cleaned = nbformat.writes(clean(nbformat.reads(text, as_version=4))) + "\n"
    assert text == cleaned, f"run: python -m hat_lib.workbook clean notebooks/{path.name}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(counts) + 1)), "run: python -m hat_lib.workbook execute"
    assert list(errors(notebook)) == []
    compared = [cell.execution_count for cell in code if is_compared(cell)]
    assert len(compared) > len(code) / 2, f"only cells {compared} are compared"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_typed_explained_and_have_a_profile_a_seed_and_the_models_dtype(path):
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if has_tag(cell, "parameters"))
    lines = [re.fullmatch(r"(\w+): (?:str|int|float) = .*\S  # \S.*", line) for line in cell.source.splitlines()]
    names = {line[1] for line in lines if line}
    loads_a_model = any("load_base(" in cell.source for cell in notebook.cells)
    assert all(lines) and names >= {"profile", "seed"} | ({"dtype"} if loads_a_model else set())
