"""A team of threads that meets at barriers inside a step, and sleeps between steps.

numba's own threads (OpenMP) go on spinning after the work is done, which makes torch in the same process four times
slower. These are Python threads that run compiled code without the GIL: one queue each wakes them for a step, a spin
barrier on atomics keeps them together inside it, and between steps nothing spins.

All wait for the slowest. While another process occupies one of the cores, a step of two threads takes longer than a
step of one, at times ten times as long. So a call of several steps in which meetings are late again and again is called
off, and the rest of it runs with fewer threads; so do the next ones, and torch at their prompts. After a pause, a call
of fewer threads ends, and its rest runs with more.
"""

import os
import platform
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hat_lib.engine.arrays import PARTIALS
from hat_lib.engine.compiling import compiled

# Indices into a barrier, each on its own cache line: how many have arrived, which meeting it is, whether it is off;
# when the call began, what waits have lost since, what they may lose, and when it is over, in nanoseconds.
ARRIVED, MEETING, OFF, BEGUN, LOST, ALLOWED, END, BARRIER = 0, 8, 16, 24, 32, 40, 48, 56
CALLED_OFF, OVER = 1, 2
"""why a barrier is off: a thread was late or failed; or it is time to try more threads"""
NEVER = 1 << 62
"""nanoseconds, in 146 years"""
SPIN = 2_000
"""turns of the spin loop, some tens of microseconds, before a thread starts to give way at each turn"""
LATE = 8_000_000
"""nanoseconds that a call may lose before it is called off, two turns of another process on the core; or a third of its
time, if that is more"""
SHORTEST, LONGEST = 40_000_000, 1_280_000_000
"""fewest and most nanoseconds of calls before a number of threads that was too many is tried again"""
CLOCK = getattr(time, "CLOCK_MONOTONIC", None)
"""the system's clock for late meetings; None on Windows, where nothing is late"""


def _element(context, builder, array, args):
    data = cgutils.create_struct_proxy(array)(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def fetch_add(context, array, place, value):
    """Atomically add to an int64 in an array; returns what was there before."""

    def build(inner, builder, signature, args):
        return builder.atomic_rmw("add", _element(inner, builder, array, args), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), build


@intrinsic
def atomic_load(context, array, place):
    def build(inner, builder, signature, args):
        return builder.load_atomic(_element(inner, builder, array, args), "seq_cst", 8)

    return types.int64(array, types.intp), build


def _call(name: str, result: ir.Type, available: bool):
    """A function that calls an external one without arguments, or does nothing."""

    @intrinsic
    def call(context):
        def build(inner, builder, signature, args):
            if available:
                kind = ir.FunctionType(result, [])
                builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
            return inner.get_dummy_value()

        return types.void(), build

    return call


pause = _call("llvm.x86.sse2.pause", ir.VoidType(), platform.machine().lower() in ("x86_64", "amd64"))
"""tells the processor that this is a spin-wait loop"""
give_way = _call("sched_yield", ir.IntType(32), platform.system() != "Windows")
"""lets another thread have this core"""


def nanoseconds() -> int:
    """Nanoseconds on `CLOCK`, or 0."""
    return 0 if CLOCK is None else time.clock_gettime_ns(CLOCK)


@intrinsic
def clock(context):
    """The same in compiled code."""

    def build(inner, builder, signature, args):
        i32, i64 = ir.IntType(32), ir.IntType(64)
        if CLOCK is None:
            return i64(0)
        at = cgutils.alloca_once(builder, ir.ArrayType(i64, 2))
        kind = ir.FunctionType(i32, [i32, at.type])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "clock_gettime"), [i32(CLOCK), at])
        seconds, nanoseconds = (builder.load(builder.gep(at, [i32(0), i32(i)])) for i in (0, 1))
        return builder.add(builder.mul(seconds, i64(10**9)), nanoseconds)

    return types.int64(), build


@compiled()
def meet(barrier, team, alone=False):
    """Return False once all threads of the team have come here; True if the call is off.

    ``alone``: while thread 0 worked alone, the others' wait is no loss.
    """
    if team == 1:
        return False
    meeting = atomic_load(barrier, MEETING)
    if fetch_add(barrier, ARRIVED, 1) == team - 1:
        fetch_add(barrier, ARRIVED, -team)
        fetch_add(barrier, MEETING, 1)
        return False
    for _ in range(SPIN):
        if atomic_load(barrier, MEETING) != meeting:
            return False
        pause()
    # Another thread has lost its core and may need this one, or it will never come.
    since, lost, off = clock(), 0, False
    while not off and atomic_load(barrier, MEETING) == meeting:
        give_way()
        lost = 0 if alone else clock() - since
        allowed = max(barrier[ALLOWED], (clock() - barrier[BEGUN]) // 3)
        off = atomic_load(barrier, OFF) != 0 or atomic_load(barrier, LOST) // (team - 1) + lost > allowed
    fetch_add(barrier, LOST, lost)
    if off and not barrier[OFF]:
        barrier[OFF] = CALLED_OFF
    return off


class Pace:
    """How many threads the next call uses: fewer while other processes occupy some of the cores.

    Half are left out when the last few calls would have been as quick without them. After a pause they are tried for a
    call. The pause doubles each time they prove too many, and halves with each call that goes well.
    """

    def __init__(self, most: int):
        self.threads = self.most = most
        self._pauses = [SHORTEST] * (most + 1)
        """nanoseconds to wait before trying each number of threads"""
        self._since, self._harm = 0, 0.0
        """nanoseconds of calls with this number of threads; and what the last few lost, 1 being what half the threads
        would lose"""

    @property
    def left(self) -> int:
        """Nanoseconds until more threads are tried; `NEVER` if there are no more."""
        return NEVER if self.threads == self.most else self._pauses[2 * self.threads] - self._since

    def after(self, took: int, lost: float) -> None:
        """Take note of a call of so many nanoseconds, and of the share of its time that it lost to late threads."""
        now = self.threads
        # Without a loss, half the threads take twice the time, or less, since all wait for the same memory: so threads
        # may lose half of theirs, or less. No call counts for more than twice that: one is not enough.
        harm = min(lost * 3, 2.0) if now > 1 else 0.0
        self._harm += (harm - self._harm) / 3
        self._since += took
        if self._harm > 1:
            self._pauses[now] = min(2 * self._pauses[now], LONGEST)
            self.threads, self._since, self._harm = now // 2, 0, 0.0
        elif harm <= 1:
            self._pauses[now] = max(SHORTEST, self._pauses[now] // 2)
            if now < self.most and self._since >= self._pauses[2 * now]:
                self.threads, self._since, self._harm = 2 * now, 0, 1.0


class Team:
    """The calling thread and others of the team's own run ``step(t, team, barrier, *args)`` together, step by step.

    They are at most ``size``, and as many as `Pace` says. After an error or an interrupt (Ctrl-C) in one of them, the
    others leave the step at their next meeting.
    """

    def __init__(self, size: int):
        self.pace, self._others = Pace(size), ThreadPoolExecutor(max(size - 1, 1), thread_name_prefix="hat-engine")

    def run(self, step, args) -> bool:
        """Whether all of it ran; else threads were late, or it is time to try more of them."""
        # The barrier is the step's own: whatever an interrupted one leaves behind, the next does not see.
        size, barrier = self.pace.threads, np.zeros(BARRIER, np.int64)
        barrier[BEGUN], barrier[ALLOWED] = nanoseconds(), LATE
        barrier[END] = barrier[BEGUN] + self.pace.left

        def take_part(t: int) -> None:
            try:
                step(t, size, barrier, *args)
            except BaseException:
                barrier[OFF] = CALLED_OFF
                raise

        try:
            others = [self._others.submit(take_part, t) for t in range(1, size)]
            take_part(0)
            for other in others:
                other.result()
        except BaseException:
            barrier[OFF] = CALLED_OFF
            raise
        took = int(nanoseconds() - barrier[BEGUN])
        lost = 1.0 if barrier[OFF] == CALLED_OFF else barrier[LOST] / max(size - 1, 1) / max(took, 1)
        self.pace.after(took, lost)
        return not barrier[OFF]


_one_step = threading.Lock()
_teams: dict[int, Team] = {}


def size(threads: int) -> int:
    """Threads of the team that is allowed so many: a power of two, up to `PARTIALS` and the number of cores."""
    return 1 << (max(1, min(threads, cores(), PARTIALS)).bit_length() - 1)


def run(step, args, size: int) -> bool:
    """Run ``step(t, team, barrier, *args)`` in a team of at most ``size``, a power of two; False if the rest needs
    another call.

    One step at a time per process: two would spin against each other.
    """
    with _one_step:
        return _team(size).run(step, args)


def paced(threads: int) -> int:
    """As many of torch's ``threads`` as the engine's pace allows: they meet, too, and beside a busy process two of them
    may take ten times as long as one."""
    with _one_step:
        pace = _team(size(threads)).pace
    return threads if pace.threads == pace.most else pace.threads


def _team(size: int) -> Team:
    if size not in _teams:
        _teams[size] = Team(size)
    return _teams[size]


def use_torch_threads(count: int, threads: int) -> None:
    """Make torch use ``count`` threads for what the calling thread asks of it; other threads keep theirs, ``threads``.

    After work on a whole vocabulary, torch's threads go on spinning for some milliseconds, on the cores that the next
    step needs. torch's setting is per thread, but also becomes that of future threads, which another thread restores.
    """
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
        back = threading.Thread(target=torch.set_num_threads, args=(threads,))
        back.start()
        back.join()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _forget_teams() -> None:
    """In a forked child: the threads were not copied, and the lock may have been held."""
    global _one_step
    _one_step = threading.Lock()
    _teams.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_teams)
