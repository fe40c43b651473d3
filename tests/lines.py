"""Count the lines that tests reach, from what coverage recorded. See "Coverage" in CONTRIBUTING.md.

A row for each package of the library. Code that is compiled is counted apart, as coverage sees only what Python itself
runs, and so is what needs a CUDA device. `messages` are the statements that raise a HatError.
"""

import ast
import csv
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from coverage import Coverage

COLUMNS = ("commit", "package", "lines", "reached", "compiled", "cuda", "messages", "messages_reached", "not_reached")
COMPILED = ("compiled", "jit", "intrinsic", "overload")


def apart(tree: ast.AST) -> Iterator[tuple[str, set[int]]]:
    """Lines that no test can reach here, with the reason."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() if any(word in ast.unparse(node.decorator_list) for word in COMPILED):
                reason = "compiled"
            case ast.FunctionDef() if "device='cuda'" in ast.unparse(node):
                reason = "cuda"
            case ast.If() if "cuda" in ast.unparse(node.test):
                reason = "cuda"
            case _:
                continue
        yield reason, {line for part in node.body for line in range(part.lineno, part.end_lineno + 1)}


def module(cov: Coverage, path: Path) -> dict:
    """Counts for a file, and the lines that are not reached."""
    lines, missed = map(set, cov.analysis2(str(path))[1:4:2])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {"compiled": set(), "cuda": set()}
    for reason, of_it in apart(tree):
        found[reason] |= of_it
    compiled, cuda = lines & found["compiled"], missed & found["cuda"]
    lines -= compiled | cuda
    missed &= lines
    raised = [n for n in ast.walk(tree) if isinstance(n, ast.Raise) and "HatError" in ast.unparse(n)]
    messages, rest = {node.lineno for node in raised} & lines, sorted(missed)
    return {
        "lines": len(lines),
        "reached": len(lines - missed),
        "compiled": len(compiled),
        "cuda": len(cuda),
        "messages": len(messages),
        "messages_reached": len(messages - missed),
        "not_reached": f"{path.stem}: {' '.join(map(str, rest))}" if rest else "",
    }


def main() -> None:
    cov = Coverage()
    cov.load()
    if not cov.get_data().measured_files():
        raise SystemExit("coverage has recorded nothing here: run the tests under it first, and `coverage combine`")
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
    library, rows = Path("hat_lib"), []
    for package, paths in groupby(sorted(library.rglob("*.py")), lambda path: path.relative_to(library).parts[0]):
        found = [module(cov, path) for path in paths]
        counts = {name: sum(m[name] for m in found) for name in COLUMNS[2:-1]}
        left = "; ".join(m["not_reached"] for m in found if m["not_reached"])
        where = {"commit": commit.stdout.strip(), "package": package.removesuffix(".py")}
        rows.append(where | counts | {"not_reached": left})
    with Path("data/results/coverage.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines, reached, messages, told = (
        sum(row[name] for row in rows) for name in ("lines", "reached", "messages", "messages_reached")
    )
    print(f"{reached:,} of {lines:,} lines ({reached / lines:.1%}), {told} of {messages} messages")


if __name__ == "__main__":
    main()
