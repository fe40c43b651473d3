"""Modes: the ways to run a `HierarchicalTransformer` for a while, each a context that puts back what was set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from hat_lib.model.policies import Forced, KeepAll, Policy
from hat_lib.model.token_state import Masks, TokenState


class Modes:
    """Mixed into the model, which has ``capacity``, ``exit_rate`` and the attributes that are swapped here."""

    @contextmanager
    def _swapped(self, **attributes) -> Iterator[Self]:
        before = {k: getattr(self, k) for k in attributes}
        for k, v in attributes.items():
            setattr(self, k, v)
        try:
            yield self
        finally:
            for k, v in before.items():
                setattr(self, k, v)

    @contextmanager
    def at(self, capacity: float | None = None, exit_rate: float | None = None) -> Iterator[Self]:
        """Context: another capacity and exit rate; None leaves what is set."""
        before, policy = (self.capacity, self.exit_rate), self._policy
        try:
            if capacity is not None:
                self.capacity = capacity
            if exit_rate is not None:
                self.exit_rate = exit_rate
            yield self
        finally:
            self.capacity, self.exit_rate = before
            self._policy = policy  # of `using` around this context, maybe

    def dense(self):
        """Context: the base, within rounding; nothing skipped, nobody exits."""
        return self._swapped(_policy=KeepAll(), _exit_policy=None, _exit_rate=0.0)

    def masked(self):
        """Context: the reference that computes everything and multiplies by the masks."""
        return self._swapped(compact=False)

    def using(self, policy: Policy):
        """Context: decisions from any source (`Random`, `Static`, ...); exits as they are set."""
        return self._swapped(_policy=policy)

    def exiting(self, exits):
        """Context: exits from any source with a method ``exits`` (`RandomExits`); decisions as they are set."""
        return self._swapped(_exit_policy=exits, _exit_rate=0.0)

    def force(self, masks: Masks):
        """Context: decisions, exits included, as recorded by `record`."""
        forced = Forced(masks)
        return self._swapped(_policy=forced, _exit_policy=forced)

    def record(self):
        """Context: each forward also keeps its decisions, in ``hat.trace.masks``."""
        return self._swapped(_record=True)

    @contextmanager
    def collect(self) -> Iterator[list[TokenState]]:
        """Context: a list of the states of all forwards in it (``TokenState.cat`` joins decode steps)."""
        states: list[TokenState] = []
        with self._swapped(_states=states):
            yield states
