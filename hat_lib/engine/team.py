"""A team of threads that meets at barriers inside a step, and sleeps between steps.

numba's own threads (OpenMP) go on spinning after the work is done, which makes torch in the same process four times
slower. These are Python threads that run compiled code without the interpreter's lock: one lock each wakes them for a
step, a spin barrier on atomics keeps them together inside it, and between steps nothing spins.
"""

from __future__ import annotations

import os
import platform
import threading
from functools import partial
from operator import call
from queue import SimpleQueue

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hat_lib.engine.compiling import compiled

# Places in a barrier, each on a cache line of its own: how many have come, which meeting it is, whether it is off.
COME, MEETING, OFF, BARRIER = 0, 8, 16, 24
PATIENCE = 5_000
"""turns of the spinning loop, some 100 us, before a thread gives its core away at each turn"""
SYSTEM, X86 = platform.system(), platform.machine().lower() in ("x86_64", "amd64")


def _place(context, builder, array, args):
    data = cgutils.create_struct_proxy(array)(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def fetch_add(context, array, place, value):
    """Add to an int64 of an array, at once for all threads; returns what was there."""

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
    """Tell the processor that this is a loop that waits, where it can be told."""

    def build(inner, builder, signature, args):
        if X86:
            pause = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, pause, "llvm.x86.sse2.pause"), [])
        return inner.get_dummy_value()

    return types.void(), build


@intrinsic
def give_way(context):
    """Let another thread have this core, where the system has a call for it."""

    def build(inner, builder, signature, args):
        if SYSTEM != "Windows":
            call = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, call, "sched_yield"), [])
        return inner.get_dummy_value()

    return types.void(), build


@compiled()
def meet(barrier, team):
    """Return False when all threads of the team have come here; True if the step is called off."""
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
        else:  # somebody's core was taken away, and may be this one; or somebody will never come
            if atomic_load(barrier, OFF):
                return True
            give_way()
    return False


class Step:
    """One step that a team is asked for, and how many of its threads are still at it."""

    def __init__(self, step, args, helpers: int):
        self.step, self.args, self.error = step, args, None
        self.running, self.done = [True] * helpers, threading.Event()
        if not helpers:
            self.done.set()


class Team:
    """The asking thread and others of its own run ``step(t, team, barrier, *args)`` together, one step after another.

    An interrupt (Ctrl-C) reaches the asker when the step is done; or, while the step is compiled, the others are sent
    home.
    """

    def __init__(self, size: int):
        self.size, self.barrier = size, np.zeros(BARRIER, np.int64)
        self._asked = [SimpleQueue() for _ in range(size - 1)]
        self._last = Step(None, (), 0)
        for t, asked in enumerate(self._asked, 1):
            threading.Thread(target=self._serve, args=(t, asked), name=f"hat-engine-{t}", daemon=True).start()

    def run(self, step, args) -> None:
        self._last.done.wait()  # for the others, if the asker was interrupted while it waited
        self.barrier[:] = 0
        self._last = asked = Step(step, args, self.size - 1)
        ours = partial(step, 0, self.size, self.barrier, *args)
        try:
            list(map(call, [*(partial(queue.put, asked) for queue in self._asked), ours]))  # no interrupt comes between
        except BaseException:
            self.barrier[OFF] = 1
            raise
        finally:
            asked.done.wait()
            asked.args = ()  # or a model that is gone would keep its weights until the next step
        if asked.error is not None:
            raise asked.error

    def _serve(self, t: int, queue: SimpleQueue) -> None:
        while True:
            asked = queue.get()
            try:
                asked.step(t, self.size, self.barrier, *asked.args)
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
    """Run ``step(t, team, barrier, *args)`` in a team of at most ``threads``, and of the cores that there are.

    One step at a time in a process: two would spin against each other.
    """
    size = max(1, min(threads, cores()))
    with _one_step:
        if size == 1:
            step(0, 1, _ALONE, *args)
        else:
            team = _teams.get(size) or _teams.setdefault(size, Team(size))
            team.run(step, args)


def torch_alone(threads: int) -> None:
    """Let torch do in one thread what the calling thread asks of it; others keep theirs.

    After work on a whole vocabulary torch's threads go on spinning for some milliseconds, on the cores that the next
    step needs. torch's setting is the thread's own, but also that of threads to come, which another thread puts back.
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
    """In a forked child: the threads did not come along, and the lock may have been held."""
    global _one_step
    _one_step = threading.Lock()
    _teams.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
