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
from functools import partial
from operator import call
from queue import SimpleQueue
from time import perf_counter, thread_time

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hat_lib.engine.compiling import compiled

# Indices into a barrier, each on its own cache line: how many have come, which meeting it is, whether it is off.
COME, MEETING, OFF, BARRIER = 0, 8, 16, 24
PATIENCE = 5_000
"""turns of the spin loop, some 100 us, before a thread starts to give way at each turn"""
SHORTEST, LONGEST = 4, 64
"""fewest and most steps before a number of threads that was too many is tried again"""
TIMED = len({thread_time() for _ in range(100)}) > 50
"""whether the system reports exactly how long a thread has run; some count in ticks of 10 ms or more"""
SYSTEM, X86 = platform.system(), platform.machine().lower() in ("x86_64", "amd64")


def _place(context, builder, array, args):
    data = cgutils.create_struct_proxy(array)(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def fetch_add(context, array, place, value):
    """Atomically add to an int64 in an array; returns what was there before."""

    def build(inner, builder, signature, args):
        return builder.atomic_rmw("add", _place(inner, builder, array, args), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), build


@intrinsic
def atomic_load(context, array, place):
    def build(inner, builder, signature, args):
        return builder.load_atomic(_place(inner, builder, array, args), "seq_cst", 8)

    return types.int64(array, types.intp), build


@intrinsic
def atomic_store(context, array, place, value):
    def build(inner, builder, signature, args):
        builder.store_atomic(args[2], _place(inner, builder, array, args), "seq_cst", 8)
        return inner.get_dummy_value()

    return types.void(array, types.intp, types.int64), build


@intrinsic
def relax(context):
    """Tell the processor that this is a spin-wait loop, if there is an instruction for it."""

    def build(inner, builder, signature, args):
        if X86:
            pause = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, pause, "llvm.x86.sse2.pause"), [])
        return inner.get_dummy_value()

    return types.void(), build


@intrinsic
def give_way(context):
    """Let another thread have this core, if the system has a call for it."""

    def build(inner, builder, signature, args):
        if SYSTEM != "Windows":
            call = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, call, "sched_yield"), [])
        return inner.get_dummy_value()

    return types.void(), build


@compiled()
def meet(barrier, team):
    """Return False once all threads of the team have come here; True if the step is called off."""
    if team == 1:
        return False
    meeting = atomic_load(barrier, MEETING)
    if fetch_add(barrier, COME, 1) == team - 1:
        atomic_store(barrier, COME, 0)
        atomic_store(barrier, MEETING, meeting + 1)
        return False
    turns = 0
    while atomic_load(barrier, MEETING) == meeting:
        turns += 1
        if turns < PATIENCE:
            relax()
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
        # Without a loss, n - 1 threads take n / (n - 1) of the time of n, or less, since all wait for the same memory:
        # so n threads may lose 1 / n of theirs, or less. No step counts for more than twice that: one is not enough.
        harm = min(lost * (now + 1), 2.0) if now > 1 else 0.0
        self._harm += (harm - self._harm) / 3
        self._since += 1
        if self._harm > 1:
            self._pauses[now] = min(2 * self._pauses[now], LONGEST)
            self.threads, self._since, self._harm = now - 1, 0, 0.0
        elif harm <= 1:
            self._pauses[now] = max(SHORTEST, self._pauses[now] // 2)
            if now < self.most and self._since >= self._pauses[now + 1]:
                self.threads, self._since, self._harm = now + 1, 0, 1.0


class Step:
    """One step that a team is asked to run, and how many of its threads are still at it."""

    def __init__(self, step, args, size: int):
        self.step, self.args, self.size, self.error = step, args, size, None
        self.running, self.done = [True] * (size - 1), threading.Event()
        self.ran: list[float] = []
        """seconds that each thread was on a core"""
        if size == 1:
            self.done.set()


class Team:
    """The calling thread and others of the team's own run ``step(t, team, barrier, *args)`` together, step by step.

    They are at most ``size``, and as many as `Pace` says. An interrupt (Ctrl-C) reaches the caller when the step is
    done; while the step is being compiled, the other threads are released.
    """

    def __init__(self, size: int):
        self.pace, self.barrier = Pace(size), np.zeros(BARRIER, np.int64)
        self._asked = [SimpleQueue() for _ in range(size - 1)]
        self._last = Step(None, (), 1)
        for t, asked in enumerate(self._asked, 1):
            threading.Thread(target=self._serve, args=(t, asked), name=f"hat-engine-{t}", daemon=True).start()

    def run(self, step, args) -> None:
        self._last.done.wait()  # for the others, if the caller was interrupted while it waited
        self.barrier[:] = 0
        size, start = self.pace.threads, perf_counter()
        asked = Step(step, args, size)
        # Noted as the others are woken: an interrupt between the two would make the next step wait for ever.
        last = partial(setattr, self, "_last", asked)
        wake = [partial(queue.put, asked) for queue in self._asked[: size - 1]]
        ours = partial(step, 0, size, self.barrier, *args)
        calls = [last, *wake, thread_time, ours, thread_time]
        try:
            *_, before, _, after = list(map(call, calls))  # no interrupt in between
        except BaseException:
            self.barrier[OFF] = 1
            raise
        finally:
            if self._last is asked:
                asked.done.wait()
            asked.args = ()  # else a deleted model's weights would be held until the next step
        if asked.error is not None:
            raise asked.error
        if TIMED:
            self.pace.after(1 - min([after - before, *asked.ran]) / (perf_counter() - start))

    def _serve(self, t: int, queue: SimpleQueue) -> None:
        while True:
            asked, before = queue.get(), thread_time()
            try:
                asked.step(t, asked.size, self.barrier, *asked.args)
                asked.ran.append(thread_time() - before)
            except BaseException as error:
                self.barrier[OFF], asked.error = 1, error
            asked.running.pop()
            if not asked.running:
                asked.done.set()
            del asked


_one_step = threading.Lock()
_teams: dict[int, Team] = {}
_ALONE = np.zeros(BARRIER, np.int64)


def run(step, args, threads: int) -> None:
    """Run ``step(t, team, barrier, *args)`` in a team of at most ``threads``, and no more than there are cores.

    One step at a time per process: two would spin against each other.
    """
    size = max(1, min(threads, cores()))
    with _one_step:
        if size == 1:
            step(0, 1, _ALONE, *args)
        else:
            team = _teams.get(size) or _teams.setdefault(size, Team(size))
            team.run(step, args)


def torch_alone(threads: int) -> None:
    """Make torch use one thread for what the calling thread asks of it; other threads keep theirs.

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


def _forget() -> None:
    """In a forked child: the threads were not copied, and the lock may have been held."""
    global _one_step
    _one_step = threading.Lock()
    _teams.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
