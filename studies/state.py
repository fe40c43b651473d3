"""Which results are stale: a digest of the code and the data that a file of results was made from, beside the file.

Only what can change a row counts: the modules that a study imports, but for what draws; checkpoints and texts.
Comments, docstrings and blank lines do not.
"""

import ast
import hashlib
import io
import json
import tokenize
from functools import cache
from pathlib import Path

from hat_lib.checkpoint import read_checkpoint
from hat_lib.config import DATA, REPO
from hat_lib.evaluation.equal_work import CHECKPOINTS, adapter_digest

FILE = "made_from.json"


def is_stale(name: str, results: Path) -> bool:
    """Whether ``results/NAME.csv`` was made from other code or data than these, or nobody knows from which."""
    return known(results).get(name) != digest(name)


def remember(file: str, found: str | None, results: Path) -> None:
    """Note the digest of a file's rows; None to forget it."""
    entries = known(results) | {file: found}
    text = json.dumps({key: value for key, value in entries.items() if value}, indent=1, sort_keys=True)
    (results / FILE).write_text(text + "\n", encoding="utf-8")


def digest(name: str) -> str:
    """SHA-256 (hex, its beginning) of what a file of results is made from."""
    found = hashlib.sha256(_shared())
    for path in sorted(_with_imports(name)):
        found.update(_code(path))
    return found.hexdigest()[:16]


@cache
def _shared() -> bytes:
    """What all studies are made from: checkpoints, texts and tasks."""
    found = hashlib.sha256()
    for folder in sorted(path.parent for path in CHECKPOINTS.glob("*/hat_config.json")):
        found.update(adapter_digest(read_checkpoint(folder), exits=True).encode())
    for path in sorted(path for folder in ("text", "tasks") for path in (DATA / folder).rglob("*") if path.is_file()):
        found.update(path.read_bytes())
    return found.digest()


def known(results: Path) -> dict[str, str]:
    """The digests by file."""
    path = results / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _code(path: Path) -> bytes:
    """The lines of a file without comments, docstrings and blank lines: the same in every version of Python, in which
    syntax trees differ."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip()).encode()


def _with_imports(name: str) -> set[Path]:
    """The modules that a study needs, itself included, but for those that draw."""
    found, wanted = set(), [f"studies.{name}"]
    while wanted:
        path = REPO / f"{wanted.pop().replace('.', '/')}.py"
        if path.is_file() and path not in found and path.parent.name != "plotting":
            found.add(path)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    wanted += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found
