"""A team of threads that meets at barriers inside a step, and sleeps between steps.

numba's own threads (OpenMP) go on spinning after the work is done, which makes torch in the same process four times
slower. These are Python threads that run compiled code without the GIL: one queue each wakes them for a step, a spin
barrier on atomics keeps them together inside it, and between steps nothing spins.

All wait for the slowest. While another process occupies one of the cores, a step of two threads takes longer than a
step of one, so a team then runs its steps with fewer threads.
"""

from __future__ import annotations

import os
import platform
import threading
from queue import SimpleQueue
from time import perf_counter, thread_time

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hat_lib.engine.arrays import PARTIALS
from hat_lib.engine.compiling import compiled

# Indices into a barrier, each on its own cache line: how many have arrived, which meeting it is, whether it is off.
ARRIVED, MEETING, OFF, BARRIER = 0, 8, 16, 24
PATIENCE = 5_000
"""turns of the spin loop, some 100 us, before a thread starts to give way at each turn"""
SHORTEST, LONGEST = 4, 64
"""fewest and most steps before a number of threads that was too many is tried again"""
TIMED = len({thread_time() for _ in range(100)}) > 50
"""whether the system reports exactly how long a thread has run; some count in ticks of 10 ms or more"""


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


@compiled()
def meet(barrier, team):
    """Return False once all threads of the team have come here; True if the step is called off."""
    if team == 1:
        return False
    meeting = atomic_load(barrier, MEETING)
    if fetch_add(barrier, ARRIVED, 1) == team - 1:
        fetch_add(barrier, ARRIVED, -team)
        fetch_add(barrier, MEETING, 1)
        return False
    turns = 0
    while atomic_load(barrier, MEETING) == meeting:
        turns += 1
        if turns < PATIENCE:
            pause()
        else:  # another thread has lost its core and may need this one, or it will never come
            if atomic_load(barrier, OFF):
                return True
            give_way()
    return False


class Pace:
    """How many threads the next step uses: fewer while other processes occupy some of the cores.

    One is left out when the last few steps would have been as quick without it. After a pause it is tried for a step.
    The pause doubles each time it proves one too many, and halves with each step that goes well.
    """

    def __init__(self, most: int):
        self.threads = self.most = most
        self._pauses = [SHORTEST] * (most + 1)
        """steps to wait before trying each number of threads"""
        self._since, self._harm = 0, 0.0
        """steps with this number of threads; and what the last few lost, where 1 is what one thread fewer would lose"""

    def after(self, lost: float) -> None:
        """Take note of a step.

        Args:
            lost: the share of its time that the most hindered of its threads was not on a core.
        """
        now = self.threads
        # Without a loss, half the threads take twice the time, or less, since all wait for the same memory: so threads
        # may lose half of theirs, or less. No step counts for more than twice that: one is not enough.
        harm = min(lost * 3, 2.0) if now > 1 else 0.0
        self._harm += (harm - self._harm) / 3
        self._since += 1
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
        self.pace = Pace(size)
        self._queues = [SimpleQueue() for _ in range(size - 1)]
        for t, queue in enumerate(self._queues, 1):
            threading.Thread(target=_serve, args=(t, queue), name=f"hat-engine-{t}", daemon=True).start()

    def run(self, step, args) -> None:
        # Barrier and outcomes are the step's own: whatever an interrupted one leaves behind, the next does not see.
        size, barrier, outcomes = self.pace.threads, np.zeros(BARRIER, np.int64), SimpleQueue()
        start, before = perf_counter(), thread_time()
        try:
            for queue in self._queues[: size - 1]:
                queue.put((step, args, size, barrier, outcomes))
            step(0, size, barrier, *args)
            ran = [thread_time() - before]
            for _ in range(size - 1):
                outcome = outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                ran.append(outcome)
        except BaseException:
            barrier[OFF] = 1
            raise
        if TIMED:
            self.pace.after(1 - min(ran) / (perf_counter() - start))


def _serve(t: int, queue: SimpleQueue) -> None:
    while True:
        _take_part(t, *queue.get())  # keeps nothing of the step: a deleted model's weights would stay in memory


def _take_part(t: int, step, args, size: int, barrier: np.ndarray, outcomes: SimpleQueue) -> None:
    before = thread_time()
    try:
        step(t, size, barrier, *args)
        outcomes.put(thread_time() - before)
    except BaseException as error:
        barrier[OFF] = 1
        outcomes.put(error)


_one_step = threading.Lock()
_teams: dict[int, Team] = {}


def size(threads: int) -> int:
    """Threads of the team that is allowed so many: a power of two, up to `PARTIALS` and the number of cores."""
    return 1 << (max(1, min(threads, cores(), PARTIALS)).bit_length() - 1)


def run(step, args, size: int) -> None:
    """Run ``step(t, team, barrier, *args)`` in a team of at most ``size``, a power of two.

    One step at a time per process: two would spin against each other.
    """
    with _one_step:
        if size not in _teams:
            _teams[size] = Team(size)
        _teams[size].run(step, args)


def torch_on_one_thread(threads: int) -> None:
    """Make torch use one thread for what the calling thread asks of it; other threads keep theirs, ``threads``.

    After work on a whole vocabulary, torch's threads go on spinning for some milliseconds, on the cores that the next
    step needs. torch's setting is per thread, but also becomes that of future threads, which another thread restores.
    """
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
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
