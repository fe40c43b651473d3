"""The rows of ``data/results/reliability.csv``, and the function that measures each."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hat_lib.backbone.machine import cpu_name
from soak import Found, equalities, faults, hostile, load, peak_mib, planted, shown, versions

KEY = ("area", "what")
KILLS = {"training": 30, "saving": 20, "sweeping": 15, "batching": 15, "calibrating": 8, "drawing": 12}


@dataclass(frozen=True)
class Row:
    area: str
    what: str
    cases: int
    failures: int
    named_errors: int  # cases that ended in one HatError
    seconds: float
    worst_mib: float  # most memory beyond what the process had before the first case
    kib_per_case: float | None  # slope of the memory, after the first tenth
    slowdown: float | None  # median CPU time of the last tenth over that of the first
    threads: int
    device: str
    note: str | None  # the first failure, or what was left out


def parts() -> dict:
    """(area, what) -> number of cases, and the function that runs that many in a folder."""
    found = {("equalities", "drawn models"): (1000, lambda n, folder: equalities.run(n))}
    for kind in hostile.KINDS:
        found["hostile files", kind] = 10_000, lambda n, folder, kind=kind: hostile.fuzz(kind, n, folder)
    found["hostile files", "planted pickles and code"] = 1, lambda n, folder: planted.planted(folder)
    found["hostile files", "marks in what is shown"] = 500, lambda n, folder: shown.shown(n)
    for job, kills in KILLS.items():
        found["killed", job] = kills, lambda n, folder, job=job: faults.killed(job, n, folder)
    for name in faults.MISHAPS:
        found["mishaps", name.replace("_", " ")] = 1, lambda n, folder, name=name: faults.mishap(name, folder)
    for model, count in (("tiny", 10_000), ("bundled", 200)):
        for path in ("engine", "reference"):
            what = f"generations, {model} model, {path}"
            found["load", what] = count, lambda n, folder, at=(model, path): load.generations(n, *at)
    found["load", "context limit"] = 1, lambda n, folder: load.context_limit()
    found["load", "ragged batch"] = 64, lambda n, folder: load.ragged(n)
    found["load", "eight threads on two models"] = 100, lambda n, folder: load.threads(n)
    found["load", "notebooks at once"] = 10, lambda n, folder: load.notebooks(n, folder)
    found["determinism", "other numbers of threads"] = 1, lambda n, folder: load.determinism(folder)
    for which, python in versions.RUNS:
        run = partial(versions.versions, which, python)
        found["versions", f"{which}, Python {python}"] = 1, lambda n, folder, run=run: run(folder)
    return found


def measure(area: str, what: str, share: float) -> Row:
    cases, run = parts()[area, what]
    before, start = peak_mib(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = run(max(1, round(share * cases)), Path(folder))
        except Exception as error:
            found = Found()
            found.fail("broke off", error)
    return Row(
        area=area,
        what=what,
        cases=found.cases,
        failures=found.failures,
        named_errors=found.named_errors,
        seconds=round(time.monotonic() - start, 1),
        worst_mib=round(peak_mib() - before, 1),
        kib_per_case=found.kib_per_case,
        slowdown=found.slowdown,
        threads=torch.get_num_threads(),
        device=f"cpu, {cpu_name()}",
        note=found.note or None,
    )
