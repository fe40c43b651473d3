"""What the repository promises as a whole: one list of packages, notebooks as they were executed, and documents that
say what the data says and name commands that exist."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from typer.main import get_command

import hat_lib
from hat_lib.cli.app import app
from hat_lib.config import HatError
from hat_lib.workbook.notebooks import clean
from studies.registry import all_tables, documents, fill, outdated

REPO = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
COMMANDS = get_command(app).commands


def ranges(requirements):
    """Package -> version range, under pip's names."""
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, requirements)}


def test_conda_pip_and_make_ask_for_the_same_packages():
    environment = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    listed = ranges(d for d in environment if isinstance(d, str))
    assert listed.pop("python") == SpecifierSet(PROJECT["requires-python"])
    listed.pop("pip")
    listed["torch"], listed["playwright"] = listed.pop("pytorch"), listed.pop("playwright-python")
    assert listed == ranges(PROJECT["dependencies"] + EXTRAS["workbook"] + EXTRAS["dev"])
    torch = next(r for r in PROJECT["dependencies"] if Requirement(r).name == "torch")
    assert f"\nTORCH := {torch}\n" in (REPO / "Makefile").read_text()


def test_what_is_imported_is_declared():
    """Only modules of the workbook import what its extra brings."""
    library, optional = ranges(PROJECT["dependencies"]), ranges(EXTRAS["eval"] + EXTRAS["cluster"])
    known, found = packages_distributions(), set()
    for path in (REPO / "hat_lib").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        names = {module.partition(".")[0] for module in modules} - {*sys.stdlib_module_names, "hat_lib"}
        packages = {canonicalize_name(known.get(name, [name])[0]) for name in names}
        extra = ranges(EXTRAS["workbook"]) if path.parent.name == "workbook" else {}
        assert packages <= {*library, *optional, *extra}, path
        found |= packages
    assert library.keys() - found == {"gguf"}  # transformers reads .gguf files by it


@pytest.mark.slow
def test_only_what_runs_notebooks_needs_their_packages():
    names = {name.replace("-", "_") for name in ranges(EXTRAS["workbook"])} - {"traitlets"}  # which IPython needs
    code = f"import runpy, sys; sys.modules |= dict.fromkeys({names}); "
    code += "runpy.run_module(sys.argv.pop(1), None, '__main__')"
    commands = {"hat_lib generate x --base random:tiny --capacity 1": 0, "hat_lib setup --no-fetch": 0}
    commands |= {"hat_lib batch 05 --grid seed=0 --out new": 2, "hat_lib.workbook run": 1}
    for command, expected in commands.items():
        args = [sys.executable, "-c", code, *command.split()]
        done = subprocess.run(args, cwd=REPO, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        assert ("pip install 'hat-workbook[workbook]'" in done.stderr) == (expected > 0)


def test_what_lies_beside_the_modules_is_packaged():
    packaged = set()
    for name, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            packaged |= set(REPO.joinpath(*name.split(".")).glob(pattern))
    files = {path for path in (REPO / "hat_lib").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packaged and {path for path in files if path.suffix != ".py"} == packaged


def test_every_module_is_in_the_api_reference():
    pages = "".join(page.read_text() for page in (REPO / "docs/api").glob("*.md"))
    listed = re.findall(r"^- `(hat_lib\S+)`$", pages, re.M)
    parts = [path.relative_to(REPO).with_suffix("").parts for path in (REPO / "hat_lib").rglob("*.py")]
    assert sorted(listed) == sorted(".".join(p) for p in parts if "cli" not in p and not p[-1].startswith("__"))


def test_versions_agree():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    newest = re.search(r"^#+ \[?(\d[\d.]+)", (REPO / "CHANGELOG.md").read_text(), re.M)
    assert {PROJECT["version"], citation["version"], newest[1]} == {hat_lib.__version__}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean_and_was_executed_once_in_order(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    cleaned = nbformat.writes(clean(nbformat.reads(text, as_version=4))) + "\n"
    assert text == cleaned, f"run: python -m hat_lib.workbook clean notebooks/{path.name}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "hat_lib.workbook execute"
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    compared = [cell for cell in code if cell.outputs and "nbval-ignore-output" not in cell.metadata.get("tags", [])]
    assert len(compared) > len(code) / 2


def test_every_table_is_that_of_the_data():
    assert not outdated(all_tables()), "run `python -m studies --tables`"


def test_every_command_exists():
    used = set()
    for path in [*documents(), *NOTEBOOKS]:
        text = path.read_text(encoding="utf-8").replace("\\n", "\n")
        for command, rest in re.findall(r"(?:^|`|-m )hat(?:_lib)? ([a-z]+)((?: [^`\n#]*)?)", text, re.M):
            assert command in COMMANDS, f"{path.name}: hat {command}"
            known = {name for option in COMMANDS[command].params for name in (*option.opts, *option.secondary_opts)}
            unknown = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", rest)) - known - {"--help"}
            assert not unknown, f"{path.name}: hat {command} {unknown}"
            used.add(command)
    assert len(used) > 5


def test_a_table_without_a_place_or_an_end_is_refused():
    text = "before\n<!-- table: one -->\n| old |\n<!-- end -->\nafter\n"
    with pytest.raises(HatError, match="x.md"):
        fill(text, {"two": ""}, "x.md")
    with pytest.raises(HatError, match="x.md"):
        fill(text.replace("<!-- end -->", ""), {"one": ""}, "x.md")


# The house: imports run in no circle, and the method needs neither the engine nor numba

FILES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("hat_lib", "studies")
    for path in (REPO / package).rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """The files that a file imports, in type hints and inside functions, too; a package's own ``__init__`` aside."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts & FILES.keys() or {node.module}
    return {name for name in found & FILES.keys() if FILES[name] != path}


def test_no_circle():
    graph = {name: imported(path) for name, path in FILES.items() if path.name != "__init__.py"}
    assert len(graph) > 50
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_method_alone_loads_no_engine():
    modules = [name for name in FILES if name.startswith("hat_lib.method.")]
    probe = f"import sys, {', '.join(modules)}; print(*(m for m in sys.modules if m.startswith(('hat_lib', 'numba'))))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=REPO, capture_output=True, text=True, check=True)
    packages = {".".join(name.split(".")[:2]) for name in done.stdout.split()}
    assert packages == {"hat_lib", "hat_lib.base", "hat_lib.config", "hat_lib.method"}
