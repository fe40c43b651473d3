"""A team of threads: together inside a step, asleep between steps, and usable whatever happened during one."""

import multiprocessing
import signal
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from hat_lib.engine import team
from hat_lib.engine.compiling import compiled
from hat_lib.engine.team import LONGEST, SHORTEST, TIMED, Pace, Team, fetch_add, meet


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
    assert ended == [1]  # and the caller waited for it
    crew.run(slow, ())
    assert sorted(ended) == [0, 1, 1]


def test_an_interrupt_at_any_line_leaves_a_team_that_goes_on():
    """An interrupt between recording a step and calling the others once left every later step waiting forever."""
    crew = Team(2)
    crew.pace.after = lambda lost: None  # always both threads, however busy the machine is

    def step(t, size, barrier):
        pass

    def interrupted_at(number: int) -> bool:
        left = number

        def trace(frame, event, arg):
            nonlocal left
            if frame.f_code is not Team.run.__code__:
                return None
            left -= event == "line"
            if left == 0 and event == "line":
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            crew.run(step, ())
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    number = 1
    while interrupted_at(number):
        later = threading.Thread(target=crew.run, args=(step, ()), daemon=True)
        later.start()
        later.join(20)
        assert not later.is_alive(), f"hangs after an interrupt at line {number} of Team.run"
        number += 1
    assert number > 8


def test_an_error_is_the_asker_s():
    crew = Team(2)

    def fails(t, size, barrier):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        crew.run(fails, ())
    crew.run(lambda t, size, barrier: None, ())


@pytest.mark.parametrize("who", [0, 1])
def test_nobody_waits_for_one_who_never_comes(who):
    """As after an interrupt or an error while the step is being compiled."""
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
    """Whether the whole team, of whatever size, counted together."""
    seen, total = np.zeros((2, 200), np.int64), np.zeros(1, np.int64)
    team.run(count, (seen, total), 2)
    together = bool((seen[0] == np.arange(1, 201) * (total[0] // 200)).all())
    if queue:
        queue.put(together)
    return together


@pytest.mark.skipif(not hasattr(team.os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_team_of_its_own():
    assert counted()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=counted, args=(queue,))
    child.start()
    assert queue.get(timeout=60)
    child.join()
    assert counted()


def test_two_python_threads_take_turns():
    found = []
    askers = [threading.Thread(target=lambda: found.append(counted())) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert found == [True] * 4


@pytest.mark.parametrize(("threads", "cores"), [(64, 1), (1, 64), (0, 64)])
def test_no_more_threads_than_asked_for_or_cores_and_no_team_for_one(monkeypatch, threads, cores):
    asked = []
    monkeypatch.setattr(team, "cores", lambda: cores)
    monkeypatch.setattr(team, "_teams", {})
    team.run(lambda t, size, barrier: asked.append((t, size)), (), threads)
    assert asked == [(0, 1)] and not team._teams


def sizes(most, lost, steps):
    """Team size of each step, where each step loses what ``lost(threads, step)`` says."""
    pace, found = Pace(most), []
    for step in range(steps):
        found.append(pace.threads)
        pace.after(lost(pace.threads, step))
    return found


class TestPace:
    def test_nothing_lost_nothing_changes(self):
        assert sizes(8, lambda threads, step: 0.05, 500) == [8] * 500

    @pytest.mark.parametrize("most", [2, 16])
    def test_a_single_hiccup_changes_nothing(self, most):
        assert sizes(most, lambda threads, step: 0.99 * (step % 8 == 0), 500) == [most] * 500

    def test_a_core_taken_away_costs_little_and_comes_back(self):
        found = sizes(2, lambda threads, step: 0.55 * (threads > 1 and step < 1000), 1200)
        assert found[:12] == [2, 2, 2, *[1] * 8, 2] and found[12:29] == [*[1] * 16, 2]
        assert found[200:1000].count(2) <= 800 / LONGEST + 1
        assert 2 in found[1000 : 1000 + LONGEST + 1] and set(found[1000 + LONGEST :]) == {2}

    def test_one_more_or_fewer_at_a_time_as_far_as_needed(self):
        found = sizes(16, lambda threads, step: 0.5 * (threads > 12 and step < 400), 800)
        assert max(abs(np.diff(found))) == 1
        assert set(found[50:400]) == {12, 13} and found[200:400].count(13) < 10
        assert found[400 + LONGEST + 4 * (SHORTEST + 1) :] == [16] * (400 - LONGEST - 4 * (SHORTEST + 1))

    def test_after_a_time_that_went_well_it_is_tried_again_soon(self):
        found = sizes(2, lambda threads, step: 0.9 * (threads > 1 and not 300 < step < 600), 620)
        assert found[590:600] == [2] * 10 and 2 in found[606:612]


@pytest.mark.skipif(not TIMED, reason="this system does not tell how long a thread has run")
@pytest.mark.parametrize("who", [0, 1])
def test_a_team_notices_who_does_not_run(who):
    crew, found = Team(2), []

    def hindered(t, size, barrier):
        if t == 0:
            found.append(size)
        if t == who and size == 2:
            time.sleep(0.02)

    for _ in range(20):
        crew.run(hindered, ())
    assert found == [2, 2, *[1] * 8, 2, *[1] * 9]
