"""`make soak`, or one part of it: make soak PART=kills. Its rows replace those in data/results/reliability.csv.

A failure stops it and leaves the file as it was, so a row says that all of its cases went well.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from hat_lib.base.machine import cpu_name
from hat_lib.config import DATA
from hat_lib.rows import read_rows, rounded
from soak import bases, busy, equalities, kills, leaks
from soak.paths import CLASSES
from soak.processors import processors


@dataclass(frozen=True, kw_only=True)
class Row:
    part: str
    what: str
    cases: int
    seconds: float
    kib_a_text: float | None = None  # by which memory grows
    slowdown: float | None = None  # CPU time of a text, of the last tenth over the first
    two_threads: float | None = None  # time of two threads over one's, at capacity 1.0 or 0.5, where it is more
    cpu_at_half: float | None = None  # CPU time of two threads at capacity 0.5 over that at 1.0
    threads: int
    cpu: str


def cases(folder: Path):
    """Part, name, number of cases and what runs them."""
    yield "equalities", "drawn models", 1000, lambda: equalities.run(1000)
    for name, check in {**CLASSES, "processors": processors}.items():
        yield "paths", name, 200, lambda check=check: equalities.run(200, check)
    yield "bases", "damaged or hostile folders", 500, lambda: bases.run(500, folder)
    for job in kills.JOBS:
        yield "kills", job, 20, lambda job=job: kills.run(job, 20, folder)
    for path in ("engine", "reference"):
        yield "leaks", path, 10_000, lambda path=path: leaks.run(10_000, path)
    for others in (0, 1, 2, 4):
        yield "busy", f"beside {others}", 5, lambda others=others: busy.run(5, others)


def main(chosen: list[str], file: Path = DATA / "results" / "reliability.csv") -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        todo = list(cases(Path(folder)))
        if unknown := set(chosen) - {case[0] for case in todo}:
            sys.exit(f"no part {', '.join(unknown)}: PART is equalities, paths, bases, kills, leaks or busy")
        for part, what, count, run in todo:
            if chosen and part not in chosen:
                rows += [row for row in read_rows(file, Row) if (row.part, row.what) == (part, what)]
                continue
            print(f"{part}, {what} ...", flush=True)
            begun = time.monotonic()
            found = {"threads": torch.get_num_threads(), "cpu": cpu_name()} | (run() or {})
            rows.append(rounded(Row, part=part, what=what, cases=count, seconds=time.monotonic() - begun, **found))
    pd.DataFrame(rows).to_csv(file, index=False)
    print("no failure")


if __name__ == "__main__":
    main(sys.argv[1:])
