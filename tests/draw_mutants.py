"""Draw mutants: keep some of a cosmic-ray session, skip the others. See "Mutants" in CONTRIBUTING.md.

At most one mutant for each place in the code, and as many for each module as its share of those places. The same
number from the same session draws the same mutants.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkerOutcome, WorkResult


def drawn(items, count: int, seed: int = 0) -> set[str]:
    """Job ids of ``count`` work items, each at a place of its own."""
    places = defaultdict(list)
    for item in items:
        (mutation,) = item.mutations
        places[mutation.module_path, mutation.start_pos].append(item.job_id)
    draw = random.Random(seed)
    return {draw.choice(sorted(places[place])) for place in draw.sample(sorted(places), min(count, len(places)))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("session", type=Path)
    parser.add_argument("count", type=int)
    asked = parser.parse_args()
    with use_db(asked.session, WorkDB.Mode.open) as work:
        items = list(work.pending_work_items)
        kept = drawn(items, asked.count)
        for item in items:
            if item.job_id not in kept:
                work.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))
    print(f"{len(kept)} of {len(items)} mutants drawn")
