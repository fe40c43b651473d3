"""Draw mutants from a cosmic-ray session, and write how they ended. See "Mutants" in CONTRIBUTING.md.

`draw` takes at most one mutant for each place in the code, and as many for each module as its share of those places.
The same number from the same code draws the same mutants; those in the file of results are not run again. `write` adds
what has ended since to that file.
"""

import argparse
import csv
import random
import subprocess
from collections import defaultdict
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkerOutcome, WorkResult

COLUMNS = ("commit", "module", "line", "column", "operator", "occurrence", "outcome", "mutant")


def drawn(items, count: int, seed: int = 0) -> set[str]:
    """Job ids of ``count`` work items, each at a place of its own."""
    places = defaultdict(list)
    for item in items:
        (mutation,) = item.mutations
        places[mutation.module_path, mutation.start_pos].append(item)
    draw = random.Random(seed)
    chosen = draw.sample(sorted(places), min(count, len(places)))
    return {draw.choice(sorted(places[place], key=key)).job_id for place in chosen}


def key(item) -> tuple[str, ...]:
    """What a mutant is, as in the file; the ids of a session are random."""
    (mutation,) = item.mutations
    at = (*mutation.start_pos, mutation.operator_name.removeprefix("core/"), mutation.occurrence)
    return (str(mutation.module_path), *map(str, at))


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def changed(diff: str) -> str:
    """The line that a mutant puts in place of another."""
    lines = [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    return " ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["draw", "write"])
    parser.add_argument("session", type=Path)
    parser.add_argument("--count", type=int, default=110)
    parser.add_argument("--results", type=Path, default=Path("data/results/mutants.csv"))
    asked = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
    commit, rows = commit.stdout.strip(), read(asked.results)
    if rows and {row["commit"] for row in rows} != {commit}:
        raise SystemExit(f"{asked.results} is about {rows[0]['commit']}: check that out, or move the file away")
    done = {tuple(row[name] for name in COLUMNS[1:6]) for row in rows}
    with use_db(asked.session, WorkDB.Mode.open) as work:
        if asked.action == "draw":
            items = list(work.pending_work_items)
            kept = drawn(items, asked.count)
            left = {item.job_id for item in items if item.job_id in kept and key(item) not in done}
            for item in items:
                if item.job_id not in left:
                    work.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))
            print(f"{len(kept)} of {len(items)} mutants drawn, {len(left)} of them to run")
            return
        items = {item.job_id: item for item in work.work_items}
        for job, result in work.results:
            if result.worker_outcome != WorkerOutcome.SKIPPED and key(items[job]) not in done:
                outcome = result.test_outcome.value if result.test_outcome else result.worker_outcome.value
                rows.append(dict(zip(COLUMNS, (commit, *key(items[job]), outcome, changed(result.diff)), strict=True)))
    with asked.results.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["module"], int(row["line"]), int(row["column"]))))
    print(f"{len(rows)} mutants in {asked.results}")


if __name__ == "__main__":
    main()
