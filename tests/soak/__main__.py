"""`make soak`, or one part of it: make soak PART=kills."""

import sys
import tempfile
from pathlib import Path

from soak import equalities, kills, leaks

PARTS = {
    "equalities": lambda folder: equalities.run(1000),
    "kills": lambda folder: [kills.run(job, 20, folder) for job in kills.JOBS],
    "leaks": lambda folder: print([leaks.run(10_000, path) for path in ("engine", "reference")]),
}

for part in sys.argv[1:] or PARTS:
    print(f"{part} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        PARTS[part](Path(folder))
print("no failure")
