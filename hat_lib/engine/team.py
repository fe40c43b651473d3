"""A team of threads that meets at barriers inside a step, and sleeps between steps.

numba's own threads (OpenMP) go on spinning after the work is done, which makes torch in the same process four times
slower. These are Python threads that run compiled code without the interpreter's lock: one lock each wakes them for a
step, a spin barrier on atomics keeps them together inside it, and between steps nothing spins.
"""

from __future__ import annotations

import os
import platform
import threading
from queue import SimpleQueue

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hat_lib.engine.compiling import compiled

# Places in a barrier, each on a cache line of its own: how many have come, and which meeting it is.
COME, MEETING, BARRIER = 0, 8, 16
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
    """Return when all threads of the team have come here."""
    if team == 1:
        return
    meeting = atomic_load(barrier, MEETING)
    if fetch_add(barrier, COME, 1) == team - 1:
        atomic_store(barrier, COME, 0)
        atomic_store(barrier, MEETING, meeting + 1)
        return
    turns = 0
    while atomic_load(barrier, MEETING) == meeting:
        turns += 1
        if turns < PATIENCE:
            relax()
        else:  # somebody's core was taken away: it may need this one
            give_way()


class Step:
    """One step that a team is asked for, and who of the team is still at it."""

    def __init__(self, step, args, size: int):
        self.step, self.args, self.error = step, args, None
        self.running, self.done = [True] * size, threading.Event()


class Team:
    """Threads that run ``step(t, team, barrier, *args)``, one step after another.

    Who asks for a step only waits for it, so an interrupt (Ctrl-C) ends the waiting and never a step half done.
    """

    def __init__(self, size: int):
        self.size, self.barrier = size, np.zeros(BARRIER, np.int64)
        self._asked = [SimpleQueue() for _ in range(size)]
        for t in range(size):
            threading.Thread(target=self._serve, args=(t,), name=f"hat-engine-{t}", daemon=True).start()

    def run(self, step, args) -> None:
        asked = Step(step, args, self.size)
        list(map(SimpleQueue.put, self._asked, [asked] * self.size))  # one call: no interrupt comes between
        try:
            asked.done.wait()
        except BaseException:
            asked.done.wait()  # some milliseconds: until then it writes what the next one would
            raise
        if asked.error is not None:
            raise asked.error

    def _serve(self, t: int) -> None:
        while True:
            asked = self._asked[t].get()
            try:
                asked.step(t, self.size, self.barrier, *asked.args)
            except BaseException as error:  # while compiling: before any barrier, and so in all of them
                asked.error = error
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
