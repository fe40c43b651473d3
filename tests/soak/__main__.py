"""`make soak`: measure what ``data/results/reliability.csv`` lacks, one row at a time, each in its own process.

A failed row is recorded as well; to measure one again, delete it.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tiny_runs import _context

from hat_lib.config import DATA
from hat_lib.rows import RowWriter
from soak.parts import KEY, Row, measure, parts

RESULTS = DATA / "results" / "reliability.csv"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each row")
    parser.add_argument("--only", default="", help="rows whose area or name has this in it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked, failures = parser.parse_args(), 0
    wanted = [(area, what) for area, what in parts() if asked.only in f"{area}: {what}"]
    if not wanted:
        parser.error(f"no row has {asked.only!r} in it; there are: {', '.join(map(': '.join, parts()))}")
    if not 0 < asked.share <= 1:
        parser.error(f"--share must be above 0, at most 1, got {asked.share}")
    if asked.share < 1 and asked.out.resolve() == RESULTS.resolve():
        parser.error("a share of the cases is no result to keep: pass --out FILE")
    with RowWriter(asked.out, Row, KEY) as rows:
        for area, what in wanted:
            if (area, what) in rows.done:
                continue
            with ProcessPoolExecutor(1, mp_context=_context) as alone:
                try:
                    row = alone.submit(measure, area, what, asked.share).result()
                except BrokenProcessPool:
                    print(f"{area}: {what}: its process died", flush=True)
                    failures += 1
                    continue
            rows.write(row)
            failures += row.failures
            print(
                f"{area}: {what}: {row.cases} cases, {row.failures} failures, {row.seconds:.0f} s",
                row.note or "",
                flush=True,
            )
    return min(failures, 1)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    raise SystemExit(main())
