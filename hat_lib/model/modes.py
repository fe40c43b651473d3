"""Modes: the ways to run a `HierarchicalTransformer` for a while, each a context that puts back what was set.

A mode is what a forward decides by. The model has one of its own, set by ``hat.capacity`` and ``hat.exit_rate``; inside
a context the thread that entered it has another, and every other thread still has the model's. What is nested changes
what it names and nothing else: a control put in place by `using` decides around and inside ``at(capacity)``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from torch import Tensor

from hat_lib.model.policies import ExitPolicy, Forced, KeepAll, Policy
from hat_lib.model.token_state import Masks, TokenState

if TYPE_CHECKING:
    from hat_lib.model.forward_pass import ForwardPass


@dataclass(frozen=True)
class Mode:
    """What a forward decides by."""

    capacity: float = 1.0
    exit_rate: float = 0.0
    """both as requested"""
    routed: Policy = KeepAll()
    """the method's own decisions at this capacity"""
    gated: ExitPolicy | None = None
    """the method's own exits at this rate and capacity"""
    control: Policy | None = None
    """decides in place of ``routed``"""
    exit_control: ExitPolicy | None = None
    """decides in place of ``gated``"""
    compact: bool = True
    """rows that a layer does not run are left out; else they are computed, and dropped"""
    record: bool = False
    states: list[TokenState] | None = None
    """takes the state of each forward"""
    dropped: Tensor | None = None
    """bool ``[L, B]``: layers left out for a sequence, in training"""

    @property
    def policy(self) -> Policy:
        return self.control or self.routed

    @property
    def exits(self) -> ExitPolicy | None:
        return self.exit_control or self.gated


class Context:
    """What a model shares with its layers: the mode, and the forward under way, both of the thread that asks."""

    def __init__(self):
        self._shared, self._thread = Mode(), threading.local()

    @property
    def mode(self) -> Mode:
        return self.own or self._shared

    @mode.setter
    def mode(self, mode: Mode) -> None:
        """Of this thread inside a context, else of the model."""
        if self.own:
            self.own = mode
        else:
            self._shared = mode

    def change(self, change: Callable[[Mode], Mode]) -> None:
        """Change the model's mode and this thread's."""
        self._shared = change(self._shared)
        if self.own:
            self.own = change(self.own)

    @property
    def own(self) -> Mode | None:
        """The mode that this thread has from the contexts that it entered."""
        return getattr(self._thread, "mode", None)

    @own.setter
    def own(self, mode: Mode | None) -> None:
        self._thread.mode = mode

    @property
    def passes(self) -> list[ForwardPass | None]:
        """Forwards under way in this thread, the innermost last; None for one that has not begun in earnest."""
        return self._thread.__dict__.setdefault("passes", [])

    @property
    def trace(self) -> TokenState | None:
        """The state of this thread's innermost forward, or else of its last one."""
        passes = self.passes
        return passes[-1].state if passes and passes[-1] else getattr(self._thread, "trace", None)

    def end(self) -> ForwardPass | None:
        """The innermost forward is done; returns it."""
        ended = self.passes.pop()
        if ended is not None:
            self._thread.trace = ended.state
        return ended


class Modes:
    """Mixed into the model, which has ``capacity`` and ``exit_rate``. All contexts hold for the thread that enters."""

    _context: Context

    @contextmanager
    def _changed(self, **changes) -> Iterator[Self]:
        before = self._context.own
        self._context.own = replace(self._context.mode, **changes)
        try:
            yield self
        finally:
            self._context.own = before

    @contextmanager
    def at(self, capacity: float | None = None, exit_rate: float | None = None) -> Iterator[Self]:
        """Context: another capacity and exit rate; None leaves what is set."""
        with self._changed():
            if capacity is not None:
                self.capacity = capacity
            if exit_rate is not None:
                self.exit_rate = exit_rate
            yield self

    def dense(self) -> AbstractContextManager[Self]:
        """Context: the base, within rounding; nothing skipped, nobody exits."""
        nothing = {"routed": KeepAll(), "gated": None, "control": None, "exit_control": None}
        return self._changed(capacity=1.0, exit_rate=0.0, **nothing)

    def masked(self) -> AbstractContextManager[Self]:
        """Context: compute everything and multiply by the masks; what compaction must equal."""
        return self._changed(compact=False)

    def using(self, policy: Policy) -> AbstractContextManager[Self]:
        """Context: decisions from any source (`Random`, `Static`, ...), at any capacity; exits as they are set."""
        return self._changed(control=policy)

    def exiting(self, exits: ExitPolicy) -> AbstractContextManager[Self]:
        """Context: exits from any source (`ExitThresholds`, ...), at any exit rate; decisions as they are set."""
        return self._changed(exit_control=exits)

    def force(self, masks: Masks) -> AbstractContextManager[Self]:
        """Context: decisions, exits included, as recorded by `record`."""
        forced = Forced(masks)
        return self._changed(control=forced, exit_control=forced)

    def record(self) -> AbstractContextManager[Self]:
        """Context: each forward also keeps its decisions, in ``hat.trace.masks``."""
        return self._changed(record=True)

    def dropping(self, layers: Tensor | None) -> AbstractContextManager[Self]:
        """Context: leave out whole layers, bool ``[L, B]``, for sequences of the batch: layer dropout in training."""
        return self._changed(dropped=layers)

    @contextmanager
    def collect(self) -> Iterator[list[TokenState]]:
        """Context: a list of the states of all forwards in it (``TokenState.cat`` joins decode steps)."""
        states: list[TokenState] = []
        with self._changed(states=states):
            yield states
