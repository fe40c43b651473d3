"""A team of threads: together inside a step, asleep between steps, and usable whatever happened during one."""

import multiprocessing
import time
from functools import partial

import numpy as np
import pytest

from hat_lib.engine import team
from hat_lib.engine.compiling import compiled
from hat_lib.engine.team import BARRIER, LATE, LONGEST, Pace, Team, fetch_add, meet


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """No call is called off, however busy the machine is."""
    monkeypatch.setattr(team, "LATE", 1 << 62)


@compiled()
def count(t, size, barrier, seen, total):
    """Each thread adds one and, once all have, records what it sees; two hundred times."""
    for turn in range(200):
        fetch_add(total, 0, 1)
        if meet(barrier, size):
            return
        seen[t, turn] = total[0]
        if meet(barrier, size):
            return


def counted(size=2, run=None):
    """Whether a team counted together, of whatever size it was."""
    seen, total = np.zeros((size, 200), np.int64), np.zeros(1, np.int64)
    (run or partial(team.run, size=size))(count, (seen, total))
    return bool((seen[0] == np.arange(1, 201) * (total[0] // 200)).all())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_threads_meet(size):
    assert counted(size, Team(size).run)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_or_interrupt_in_one_thread_reaches_the_caller_and_ends_the_step(who, error):
    crew = Team(2)
    crew.pace.after = lambda took, lost: None  # always both threads

    def missing(t, *args):
        if t == who:
            raise error
        count(t, *args)

    for _ in range(3):
        with pytest.raises(error):
            crew.run(missing, (np.zeros((2, 200), np.int64), np.zeros(1, np.int64)))
        assert counted(run=crew.run)


@pytest.mark.skipif(not hasattr(team.os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_has_a_team_of_its_own():
    assert counted()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(counted()))
    child.start()
    assert queue.get(timeout=60)
    child.join()
    assert counted()


@pytest.mark.parametrize(("threads", "cores", "size"), [(64, 1, 1), (1, 64, 1), (0, 64, 1), (3, 64, 2), (64, 12, 8)])
def test_size(monkeypatch, threads, cores, size):
    monkeypatch.setattr(team, "cores", lambda: cores)
    assert team.size(threads) == size


def test_pace_leaves_a_thread_out_and_tries_it_again():
    for took in (10_000_000, 300_000_000):  # calls of one token, and of many
        pace, found, pause = Pace(2), [], -(-LONGEST // took)
        for call in range(1200):
            found.append(pace.threads)
            pace.after(took, 0.55 * (pace.threads > 1 and call < 1000))
        assert found[200:1000].count(2) <= 800 / pause + 1 and set(found[1000 + pause :]) == {2}


@pytest.mark.skipif(team.CLOCK is None, reason="nothing is late on Windows")
def test_call_is_called_off_when_a_thread_is_late_and_the_next_leaves_it_out(monkeypatch):
    monkeypatch.setattr(team, "LATE", LATE)
    crew, found = Team(2), []
    meet(np.zeros(BARRIER, np.int64), 1)  # compiles it

    def hindered(t, size, barrier):
        time.sleep(0.01 + 0.05 * t)
        meet(barrier, size)

    for _ in range(20):
        found.append(crew.pace.threads)
        assert crew.run(hindered, ()) is (found[-1] == 1)
    assert found[:5] == [2, 2, 1, 1, 1] and found.count(2) == 3
