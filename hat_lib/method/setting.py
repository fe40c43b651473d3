"""Setting: what a forward decides by. The model has one, and a thread another inside each context that it enters
(`hat_lib.contexts`)."""

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from hat_lib.config import HatError
from hat_lib.method.thresholds import Thresholds
from hat_lib.method.trace import Trace

HOLDABLE = Thresholds._fields[3:]  # what a context may name: all but the requests and what follows from them


class Policy(Protocol):
    """Decides what work runs. It keeps no state between calls: any number of threads may use the same one."""

    def __call__(self, layer: int, site: str, x: Tensor, rows: Tensor | None, trace: Trace) -> Tensor | None:
        """For the ``n`` rows in ``rows`` (indices into B*T; None for all), what to keep: bool ``[n, units]``, or
        ``[n]`` for the whole FFN; None for everything. ``x [n, C]`` is the input of the site."""


class ExitPolicy(Protocol):
    """Decides which tokens leave after ``depth`` layers."""

    def __call__(self, depth: int, h: Tensor, rows: Tensor, trace: Trace) -> Tensor | None:
        """``h [n, D]``, the states of the running ``rows`` -> bool ``[n]``; None if none leaves."""


@dataclass(frozen=True)
class Setting:
    """What a forward decides by."""

    thresholds: Thresholds  #: the method's own decisions
    named: Mapping[str, object] = field(default_factory=dict)  #: of `HOLDABLE`, by contexts; stay at another capacity
    decide: Policy | None = None  #: in place of the routers
    leave: ExitPolicy | None = None  #: in place of the gates
    gain: float = 0.0  #: of steering; 0 leaves thresholds where they are
    compact: bool = True  #: leave out rows that a layer does not run; else compute everything and multiply by the masks
    record: bool = False  #: keep the decisions of each forward
    engine: bool | None = None  #: may the engine run forwards of a few tokens? None: in generate alone; False: never
    weight_format: str = "base"  #: of the engine's copy of the weights

    @property
    def controlled(self) -> bool:
        """Whether anything else than the method at its capacity and exit rate decides."""
        return bool(self.decide or self.leave or {"site", "exit"} & self.named.keys())

    @property
    def moving(self) -> float:
        """Gain of steering where it moves thresholds: those of the method, below capacity 1."""
        return self.gain if self.thresholds.capacity < 1 and self.decide is None else 0.0

    def holding(self, **fields) -> Self:
        """With some of its fields, or of its thresholds', changed. ``shortlist`` stands for the head's three."""
        if "shortlist" in fields:
            shortlist = fields.pop("shortlist") or (float("-inf"), 0.0, 1.0)
            fields |= zip(("head", "margin", "head_share"), shortlist, strict=True)
        if named := {name: fields.pop(name) for name in HOLDABLE if name in fields}:
            fields |= {"named": {**self.named, **named}, "thresholds": self.thresholds.holding(named)}
        return replace(self, **fields)


class Context(threading.local):
    """What a model shares with its layers: its setting, for all threads, and each thread's settings and forwards."""

    def __init__(self, shared: list[Setting], under_way: contextvars.ContextVar):
        self._under_way = under_way
        # Each setting is alone in a list: the model's own, and those of the contexts that this thread has entered.
        self.shared = shared
        self.entered: list[list[Setting]] = []
        self.collectors: list[list[Trace]] = []
        self.last: Trace | None = None

    @property
    def setting(self) -> Setting:
        return (self.entered[-1] if self.entered else self.shared)[0]

    @setting.setter
    def setting(self, setting: Setting) -> None:
        (self.entered[-1] if self.entered else self.shared)[0] = setting

    def __deepcopy__(self, memo) -> Self:
        """Itself: a copied part of the model, such as an adapter's of the head, works in the same model."""
        return self

    def __reduce_ex__(self, protocol):
        raise HatError("an adapted model is never pickled: use save_pretrained or state_dict, or unload() it first")

    @property
    def forwards(self) -> tuple:
        """Each `hat_lib.method.forward.Forward` under way in this thread, innermost last."""
        return self._under_way.get()

    @torch.compiler.disable(recursive=False)
    def run(self, forward, compute: Callable, *args, **kwargs):
        """``compute(...)``, as what a forward does."""
        # Not by a with-statement, which Ctrl-C can leave before its block has begun: Python itself ends this context.
        inside = contextvars.copy_context()
        inside.run(self._under_way.set, (*self.forwards, forward))
        return inside.run(compute, *args, **kwargs)

    @contextmanager
    def collecting_alone(self) -> Iterator[list[Trace]]:
        """A list of the traces of all forwards inside, which no other collector gets."""
        others, self.collectors[:] = self.collectors[:], [traces := []]
        try:
            yield traces
        finally:
            self.collectors[:] = others

    @property
    def forward(self):
        """The forward whose layers run; None where a part is called by hand, which then acts as the base's."""
        return self.forwards[-1] if self.forwards and self.forwards[-1].in_layers else None

    @property
    def reading(self):
        """The head's `Reading` of the forward under way; None where the head is read in full."""
        return None if not self.forwards or self.forward else self.forwards[-1].reading

    @property
    def trace(self) -> Trace | None:
        """Of the innermost forward under way, else of the last one."""
        return (self.forwards and self.forwards[-1].trace) or self.last
