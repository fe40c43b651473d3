"""The house: no files import each other in a circle, and the method needs neither the engine nor numba."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from hat_lib.config import REPO

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
