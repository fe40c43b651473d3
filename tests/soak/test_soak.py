"""A small part of `make soak`, the same cases on every run."""

import signal
import time

import pytest
from tiny_runs import greedy, skipping

from hat_lib.config import DATA
from hat_lib.rows import read_rows
from soak import equalities, kills, leaks
from soak.__main__ import Row, cases
from soak.paths import CLASSES
from soak.processors import processors


def test_the_committed_rows_are_of_these_cases(tmp_path):
    rows = read_rows(DATA / "results" / "reliability.csv", Row)
    assert [(row.part, row.what, row.cases) for row in rows] == [case[:3] for case in cases(tmp_path)]


@pytest.mark.slow
def test_equalities():
    equalities.run(12)


@pytest.mark.slow
@pytest.mark.parametrize("check", [*CLASSES.values(), processors])
def test_paths(check):
    equalities.run(6, check)


@pytest.mark.slow
@pytest.mark.parametrize("job", kills.JOBS)
def test_kills(job, tmp_path):
    kills.run(job, 2, tmp_path)


@pytest.mark.slow
def test_leaks():
    leaks.run(4, "engine")
    leaks.run(4, "reference")


@pytest.mark.timeout(method="thread")  # it uses the alarm itself
def test_ctrl_c_inside_a_compiled_step_leaves_the_next_text_alone():
    hat = skipping("channel")
    expected, begun = greedy(hat, 24), time.monotonic()
    greedy(hat, 24)
    seconds = time.monotonic() - begun
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # like SIGINT
    try:
        for part in (0.1, 0.3, 0.5, 0.7, 0.9):
            signal.setitimer(signal.ITIMER_REAL, part * seconds)
            with pytest.raises(KeyboardInterrupt):
                while True:
                    greedy(hat, 24)
            assert greedy(hat, 24) == expected
    finally:
        signal.signal(signal.SIGALRM, before)
