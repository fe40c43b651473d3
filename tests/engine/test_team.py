"""A team of threads: together inside a step, asleep between steps, and there after whatever happened to one."""

import multiprocessing
import signal
import threading
import time
import weakref

import numpy as np
import pytest

from hat_lib.engine import team
from hat_lib.engine.compiling import compiled
from hat_lib.engine.team import Team, fetch_add, meet


@compiled()
def count(t, size, barrier, seen, total):
    """Each thread adds one and, once all have, notes what it sees; two hundred times."""
    for turn in range(200):
        fetch_add(total, 0, 1)
        if meet(barrier, size):
            return
        seen[t, turn] = total[0]
        if meet(barrier, size):
            return


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_nobody_goes_on_alone(size):
    crew, seen, total = Team(size), np.zeros((size, 200), np.int64), np.zeros(1, np.int64)
    crew.run(count, (seen, total))
    assert np.array_equal(seen, np.broadcast_to(size * np.arange(1, 201), seen.shape))


def test_an_interrupt_ends_nobody_else_s_part():
    crew, ended = Team(2), []

    def slow(t, size, barrier):
        time.sleep(0.3)
        ended.append(t)

    signal.setitimer(signal.ITIMER_REAL, 0.1)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            crew.run(slow, ())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert ended == [1]  # and the asker waited for it
    crew.run(slow, ())
    assert sorted(ended) == [0, 1, 1]


def test_an_error_is_the_asker_s():
    crew = Team(2)

    def fails(t, size, barrier):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        crew.run(fails, ())
    crew.run(lambda t, size, barrier: None, ())


@pytest.mark.parametrize("who", [0, 1])
def test_nobody_waits_for_one_who_never_comes(who):
    """As after an interrupt, or an error, while the step is compiled."""
    crew, seen, total = Team(2), np.zeros((2, 200), np.int64), np.zeros(1, np.int64)

    def missing(t, *args):
        if t == who:
            raise KeyboardInterrupt
        count(t, *args)

    with pytest.raises(KeyboardInterrupt):
        crew.run(missing, (seen, total))
    crew.run(count, (seen, total * 0))
    assert seen[0, -1] == 400


def test_nothing_of_a_step_is_kept():
    crew, seen = Team(2), np.zeros((2, 200), np.int64)
    kept = weakref.ref(seen)
    crew.run(count, (seen, np.zeros(1, np.int64)))
    del seen
    assert kept() is None


def counted(queue=None):
    seen, total = np.zeros((2, 200), np.int64), np.zeros(1, np.int64)
    team.run(count, (seen, total), 2)
    if queue:
        queue.put(int(total[0]))
    return int(total[0])


@pytest.mark.skipif(not hasattr(team.os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_team_of_its_own():
    expected = counted()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=counted, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()
    assert counted() == expected


def test_two_python_threads_take_turns():
    found = []
    askers = [threading.Thread(target=lambda: found.append(counted())) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(set(found)) == 1


def test_never_more_threads_than_cores(monkeypatch):
    asked = []
    monkeypatch.setattr(team, "cores", lambda: 1)
    team.run(lambda t, size, barrier: asked.append((t, size)), (), 64)
    assert asked == [(0, 1)]
