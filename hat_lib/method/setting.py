"""Modes: what a forward decides by. The model has one, and a thread another inside each context that it enters.

A nested context changes only what it names: a control set by `using` decides both around and inside ``at(capacity)``.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Self

from torch import Tensor

from hat_lib.config import HatError, check_capacity, check_exit_rate, check_fraction
from hat_lib.decoding.steering import GAIN
from hat_lib.method.grain import column_norm
from hat_lib.method.head import Shortlist
from hat_lib.method.policies import ExitPolicy, ExitThresholds, Forced, KeepAll, Policy, Threshold
from hat_lib.method.thresholds import Calibration
from hat_lib.method.trace import Masks, Trace

if TYPE_CHECKING:
    from hat_lib.decoding.generate import GenerateCall
    from hat_lib.method.forward import Forward


OWN = "own"
"""in a `Mode`: as the method itself has it at this capacity"""


@dataclass(frozen=True)
class Decided:
    """The method's own decisions at a capacity and an exit rate; by default, at 1.0 and 0."""

    layer_capacity: float = 1.0
    """what the capacity leaves for the layers, if the head has a part in it"""
    policy: Policy = KeepAll()
    exits: ExitPolicy | None = None
    corrected: float = 0.0
    """strength of the corrections; 0 for none"""
    shortlist: Shortlist | None = None
    """how the head decides; None reads it in full"""


@dataclass(frozen=True)
class Mode:
    """What a forward decides by."""

    capacity: float = 1.0
    exit_rate: float = 0.0
    """both as requested"""
    own: Decided = Decided()
    """what follows from them; the next four decide in its place"""
    control: Policy | None = None
    exit_control: ExitPolicy | None = None
    corrected: float | str = OWN
    shortlist: Shortlist | None | str = OWN
    steer: float = 0.0
    """gain of steering; 0 leaves thresholds where they are"""
    compact: bool = True
    """leave out rows that a layer does not run; else compute everything and multiply by the masks"""
    engine: bool = False
    """use the engine for forwards of a few tokens, outside generate as well"""
    reference: bool = False
    """never use the engine"""
    last_only: bool = False
    """a prompt's tokens but the last get only K and V in the last layer"""
    weights: str | None = None
    """format of the engine's weights; None for the model's own"""
    record: bool = False
    """keep the decisions of each forward"""
    states: tuple[list[Trace], ...] = ()
    """they collect the state of each forward"""
    dropped: Tensor | None = None
    """bool ``[L, B]``: layers left out for a sequence, in training"""

    @property
    def policy(self) -> Policy:
        """What decides which work runs."""
        return self.control or self.own.policy

    @property
    def exits(self) -> ExitPolicy | None:
        """What decides which tokens leave."""
        return self.exit_control or self.own.exits

    @property
    def strength(self) -> float:
        """Of the corrections."""
        return self.own.corrected if self.corrected is OWN else self.corrected

    @property
    def head(self) -> Shortlist | None:
        """How the head decides."""
        return self.own.shortlist if self.shortlist is OWN else self.shortlist

    @property
    def moving(self) -> float:
        """Gain of steering where it moves thresholds: those of the method, below capacity 1."""
        return self.steer if self.capacity < 1 and self.control is None else 0.0


@dataclass
class Frame:
    """A call of the causal LM, or of a part of it, under way in a thread."""

    mode: Mode
    """what it decides by, from its beginning to its end"""
    run: Forward | None = None
    """while its layers run"""
    state: Trace | None = None
    """what they decided"""
    final_state: Tensor | None = None
    """what the head is reading"""


class Context(threading.local):
    """What a model shares with its layers: its mode, for all threads, and each thread's own modes and forwards."""

    def __init__(self, shared: list[Mode]):
        self.shared = shared
        """the model's own mode, alone in a list that all threads share"""
        self.entered: list[list[Mode]] = []
        """those of the contexts that this thread has entered, innermost last, each alone in a list"""
        self.frames: list[Frame] = []
        """forwards under way, innermost last"""
        self.call: GenerateCall | None = None
        """the call of generate under way"""
        self.last: Trace | None = None

    @property
    def mode(self) -> Mode:
        return (self.entered[-1] if self.entered else self.shared)[0]

    @mode.setter
    def mode(self, mode: Mode) -> None:
        (self.entered[-1] if self.entered else self.shared)[0] = mode

    def __deepcopy__(self, memo) -> Context:
        """Itself: a copy of a part of the model, such as an adapter's of the head, works in the same model."""
        return self

    def __reduce_ex__(self, protocol):
        raise HatError("an adapted model is never pickled: use save_pretrained or state_dict, or unload() it first")

    @contextmanager
    def frame(self, state: Trace | None = None) -> Iterator[Frame]:
        """Context of a forward, whose end leaves the thread as it was, whatever ends it."""
        depth = len(self.frames)
        try:
            self.frames.append(Frame(self.mode, state=state))
            yield self.frames[-1]
        finally:
            del self.frames[depth:]

    @property
    def run(self) -> Forward | None:
        """The layers under way; None where a part of the model is called by hand: it then acts as the base's."""
        return self.frames[-1].run if self.frames else None

    @property
    def reading(self) -> Frame | None:
        """The forward whose head is under way, if that has a shortlist."""
        frame = self.frames[-1] if self.frames else None
        return frame if frame and frame.run is None and frame.mode.head is not None else None

    @property
    def trace(self) -> Trace | None:
        """The state of the innermost forward under way, else of the last one."""
        under_way = [frame.run.state if frame.run else frame.state for frame in self.frames[-1:]]
        return next(filter(None, under_way), self.last)


@contextmanager
def combined(*makers: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Several contexts as one, each made and entered inside the one before it."""
    with ExitStack() as stack:
        for make in makers:
            stack.enter_context(make())
        yield


class Modes:
    """The part of a `HierarchicalTransformer` that sets modes."""

    _context: Context
    _calibration: Calibration | None

    @property
    def calibration(self) -> Calibration | None:
        """The tables behind capacity and exit rate; a new one takes effect in every open context of this thread."""
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        if calibration is not None:
            calibration.check(self.config)
        stack = [self._context.shared, *self._context.entered]
        decided = [self._decided(mode, calibration) for (mode,) in stack]  # raises before any change
        for entered, mode in zip(stack, decided, strict=True):
            entered[0] = mode
        self._calibration, self.prices = calibration, []

    @property
    def capacity(self) -> float:
        """Requested executed / routable work, 0.1-1.0. Setting it needs no retraining. Below the lowest measured one,
        that one's thresholds are used, with a warning; so it is for exit rates."""
        return self._context.mode.capacity

    @capacity.setter
    def capacity(self, value: float) -> None:
        mode = replace(self._context.mode, capacity=check_capacity(value))
        if mode.capacity < 1.0 and self.grain.warning:
            warnings.warn(f"{self.grain.name} grain at capacity {value}: {self.grain.warning}", stacklevel=3)
        self._context.mode = self._decided(mode, self.calibration)
        if self.calibration is not None:
            _warn_below("capacity", mode.capacity, self.calibration.capacities)

    @property
    def exit_rate(self) -> float:
        """Requested share of tokens that leave before the last layer, 0-1; 0 turns exits off."""
        return self._context.mode.exit_rate

    @exit_rate.setter
    def exit_rate(self, value: float) -> None:
        mode = replace(self._context.mode, exit_rate=check_exit_rate(value))
        self._context.mode = self._decided(mode, self.calibration)
        if mode.exit_rate > 0:
            _warn_below("exit rate", mode.exit_rate, chain.from_iterable(self.calibration.exit_rates))

    @property
    def controlled(self) -> bool:
        """Whether `using` or `force` decides in place of the method."""
        return self._context.mode.control is not None or self._context.mode.exit_control is not None

    def _decided(self, mode: Mode, calibration: Calibration | None) -> Mode:
        """``mode`` with the method's own decisions at its capacity and exit rate; raises if there are none."""
        self._check_loaded()
        capacity, exit_rate = mode.capacity, mode.exit_rate
        own = {"corrected": self.correction_strength(capacity)}
        if capacity < 1.0:
            if calibration is None:
                hint = "run `hat calibrate`, or load a checkpoint"
                raise HatError(f"capacity {capacity} needs calibrated thresholds: {hint}")
            own["policy"] = self.threshold_policy(calibration.thresholds_at(capacity))
            own["layer_capacity"] = calibration.layer_capacity_at(capacity, self.site_work)
            if (head := calibration.head_at(capacity)) is not None:
                own["shortlist"] = self.shortlist(*head)
        if exit_rate > 0.0:
            if not self.gates or calibration is None or calibration.exit_rates is None:
                raise HatError(f"exit rate {exit_rate} needs trained exit gates; this model has none (use 0)")
            own["exits"] = ExitThresholds(self.gates, calibration.exit_thresholds(exit_rate, capacity))
        return replace(mode, own=Decided(**own))

    def threshold_policy(self, thresholds: dict[tuple[int, str], float]) -> Threshold:
        """The method's own decisions at these thresholds, by (layer, site)."""
        return Threshold(self.grain, self.routers, thresholds)

    def correction_strength(self, capacity: float) -> float:
        """Strength of the corrections at a capacity; 0 if there are none."""
        return self.grain.correction_strength(capacity) if self.corrections else 0.0

    @property
    def has_shortlist(self) -> bool:
        """Whether the head has a shortlist at capacities below 1.0."""
        return self.calibration is not None and self.calibration.head_thresholds is not None

    def shortlist(self, threshold: float, margin: float, share: float = 1.0) -> Shortlist:
        """The head's decision at a threshold on its channels' scores and a margin in nats."""
        if self._head_norm is None:
            self._head_norm = column_norm(self.lm.lm_head)
        return Shortlist(threshold / self._head_norm, margin, share)

    # -- contexts ----------------------------------------------------------------------------------

    @contextmanager
    def changed(self, **fields) -> Iterator[Self]:
        """Any fields of `Mode`, as given: ``compact=False`` computes everything and multiplies by the masks,
        ``shortlist=None`` reads the head in full. Its end takes back this change and no other."""
        self._check_loaded()
        # Of the thread that enters: a generator that holds a context may be closed in another one.
        entered, own = self._context.entered, [replace(self._context.mode, **fields)]
        try:
            entered.append(own)
            yield self
        finally:
            entered[:] = [other for other in entered if other is not own]

    @contextmanager
    def at(self, capacity: float | None = None, exit_rate: float | None = None) -> Iterator[Self]:
        """Another capacity and exit rate; None leaves what is set."""
        with self.changed():
            if capacity is not None:
                self.capacity = capacity
            if exit_rate is not None:
                self.exit_rate = exit_rate
            yield self

    def dense(self) -> AbstractContextManager[Self]:
        """The base, within rounding: nothing is skipped and no token exits."""
        nobody = {"control": None, "exit_control": None, "corrected": OWN, "shortlist": OWN, "steer": 0.0}
        return self.changed(capacity=1.0, exit_rate=0.0, own=Decided(), **nobody)

    def correcting(self, strength: float = 1.0) -> AbstractContextManager[Self]:
        """Corrections at a given strength, from 0 (none) to 1, whatever is skipped."""
        strength = check_fraction("strength", strength, 0.0, 1.0)
        if strength and not self.corrections:
            raise HatError("this model has no corrections: train some, with correction_rank in its config")
        return self.changed(corrected=strength)

    def steered(self, gain: float = GAIN) -> AbstractContextManager[Self]:
        """Thresholds that move while a text is decoded, so that it executes the capacity asked for (channel grain)."""
        if not self.grain.scales_thresholds:
            raise HatError(f"the thresholds of the {self.grain.name} grain cannot be steered")
        return self.changed(steer=check_fraction("gain", gain, 0.0, 1.0))

    def engine(self) -> AbstractContextManager[Self]:
        """Forwards of up to eight tokens, with a cache, on the engine if it may: for decoding loops of one's own. What
        is done to the base (hooks, adapters) inside is not noticed."""
        return self.changed(engine=self._fast.why_not() is None)

    def reference(self) -> AbstractContextManager[Self]:
        """Every forward on the reference path, as if there were no engine."""
        return self.changed(reference=True)

    def using(self, policy: Policy | None = None, exits: ExitPolicy | None = None) -> AbstractContextManager[Self]:
        """Decisions and exits from any source (`Random`, `ExitThresholds`, ...), whatever is asked for; None leaves
        what is set."""
        changes = {"control": policy, "exit_control": exits}
        return self.changed(**{name: value for name, value in changes.items() if value is not None})

    def force(self, masks: Masks) -> AbstractContextManager[Self]:
        """Decisions, exits included, as recorded by `record`; a forward that they do not fit raises `HatError`."""
        forced = Forced(masks)
        return self.changed(control=forced, exit_control=forced)

    def record(self) -> AbstractContextManager[Self]:
        """Each forward also keeps its decisions, in ``hat.trace.masks``."""
        return self.changed(record=True)

    @contextmanager
    def collect(self) -> Iterator[list[Trace]]:
        """A list of the states of all forwards inside (``Trace.cat`` joins decode steps)."""
        states: list[Trace] = []
        with self.changed(states=(*self._context.mode.states, states)):
            yield states


def _warn_below(what: str, value: float, measured: Iterable[float]) -> None:
    if value < (lowest := min((m for m in measured if m > 0), default=0.0)):
        text = f"{what} {value:g} is below the lowest measured one, {lowest:g}, whose thresholds are used"
        warnings.warn(text, stacklevel=4)
