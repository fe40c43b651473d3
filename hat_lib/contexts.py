"""The settings of a `HierarchicalTransformer`, and the contexts that change them for a thread.

A nested context changes only what it names: a control set by `using` decides both around and inside ``at(capacity)``.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from itertools import chain, product
from typing import Self

from torch import Tensor

from hat_lib.base.families import LINEARS
from hat_lib.checkpoint import check_calibration
from hat_lib.config import HatError, check_capacity, check_exit_rate, check_fraction, shown
from hat_lib.decoding.steering import GAIN
from hat_lib.method.setting import Context, ExitPolicy, Policy, Setting
from hat_lib.method.thresholds import Calibration, Thresholds
from hat_lib.method.trace import Masks, Trace


@contextmanager
def combined(*makers: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Several contexts as one, each made and entered inside the one before it."""
    with ExitStack() as stack:
        for make in makers:
            stack.enter_context(make())
        yield


class Contexts:
    """The part of a `HierarchicalTransformer` that sets what forwards decide by."""

    _context: Context
    _calibration: Calibration | None

    @property
    def calibration(self) -> Calibration | None:
        """The tables behind capacity and exit rate; a new one takes effect in every open context of this thread."""
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        if calibration is not None:
            check_calibration(calibration, self.config)
        stack = [self._context.shared, *self._context.entered]
        changed = [self._at(setting, calibration) for (setting,) in stack]  # raises before any change
        for entered, setting in zip(stack, changed, strict=True):
            entered[0] = setting
        self._calibration, self.prices = calibration, []

    @property
    def capacity(self) -> float:
        """Requested executed / routable work, 0.1-1.0. Setting it needs no retraining. Below the lowest measured one,
        that one's thresholds are used, with a warning; so it is for exit rates."""
        return self._context.setting.thresholds.capacity

    @capacity.setter
    def capacity(self, value: float) -> None:
        capacity = check_capacity(value)
        if capacity < 1.0 and self.grain.warning:
            warnings.warn(f"{self.grain.name} grain at capacity {value}: {self.grain.warning}", stacklevel=3)
        self._context.setting = self._at(self._context.setting, self.calibration, capacity=capacity)
        if self.calibration is not None:
            _warn_below("capacity", capacity, self.calibration.capacities)

    @property
    def exit_rate(self) -> float:
        """Requested share of tokens that leave before the last layer, 0-1; 0 turns exits off."""
        return self._context.setting.thresholds.exit_rate

    @exit_rate.setter
    def exit_rate(self, value: float) -> None:
        exit_rate = check_exit_rate(value)
        self._context.setting = self._at(self._context.setting, self.calibration, exit_rate=exit_rate)
        if exit_rate > 0:
            _warn_below("exit rate", exit_rate, chain.from_iterable(self.calibration.exit_rates))

    @property
    def controlled(self) -> bool:
        """Whether `using` or `force` decides in place of the method."""
        return self._context.setting.controlled

    def _at(self, setting: Setting, calibration: Calibration | None, *, capacity=None, exit_rate=None) -> Setting:
        """``setting`` at another capacity or exit rate, or by another calibration; raises if that has no thresholds."""
        self._check_loaded()
        capacity = setting.thresholds.capacity if capacity is None else capacity
        exit_rate = setting.thresholds.exit_rate if exit_rate is None else exit_rate
        values = {"capacity": capacity, "exit_rate": exit_rate, "correction": self.correction_strength(capacity)}
        thresholds = self._dense
        if capacity < 1.0:
            if calibration is None:
                hint = "run `hat calibrate`, or load a checkpoint"
                raise HatError(f"capacity {capacity} needs calibrated thresholds: {hint}")
            thresholds = self.threshold_policy(calibration.thresholds_at(capacity))
            values["layer_capacity"] = calibration.layer_capacity_at(capacity, self.site_work)
            if (head := calibration.head_at(capacity)) is not None:
                values |= zip(("head", "margin", "head_share"), head, strict=True)
        if exit_rate > 0.0:
            if not self.gates or calibration is None or calibration.exit_rates is None:
                raise HatError(f"exit rate {exit_rate} needs trained exit gates; this model has none (use 0)")
            values["exit"] = calibration.exit_thresholds(exit_rate, capacity)
        return replace(setting, thresholds=thresholds.holding({**values, **setting.named}))

    @property
    def _dense(self) -> Thresholds:
        return Thresholds.dense(self.config.n_layers, len(self.grain.sites), len(self.gates))

    def threshold_policy(self, thresholds: Mapping[tuple[int, str], float]) -> Thresholds:
        """The method's own decisions at these thresholds, by (layer, site), for `using`; without one, a site keeps
        everything. At ``(0, "token")`` is the strength of token sensitivity in all layers, by default 1."""
        layers, sites = range(self.config.n_layers), self.grain.sites
        if unknown := thresholds.keys() - set(product(layers, (*sites, "token"))):
            raise HatError(
                f"thresholds are by (layer, site), with sites {', '.join(sites)}, got {shown(unknown.pop())}"
            )
        known = {place: value for place, value in thresholds.items() if not self.grain.always_runs(*place)}
        site = [[known.get((i, s), float("-inf")) for s in sites] for i in layers]
        return self._dense.holding({"site": site, "sensitivity": known.get((0, "token"), 1.0)})

    def correction_strength(self, capacity: float) -> float:
        """Strength of the corrections at a capacity; 0 if there are none."""
        return self.grain.correction_strength(capacity) if self.corrections else 0.0

    @property
    def has_shortlist(self) -> bool:
        """Whether the head has a shortlist at capacities below 1.0."""
        return self.calibration is not None and self.calibration.head_thresholds is not None

    def shortlist(self, threshold: float, margin: float, share: float = 1.0) -> tuple[float, float, float]:
        """The head's decision at a threshold on its channels' scores and a margin in nats, for `changed`."""
        return threshold, margin, share

    # -- contexts ----------------------------------------------------------------------------------

    @contextmanager
    def changed(self, **fields) -> Iterator[Self]:
        """Any fields of `Setting`, as given, or of its thresholds: ``compact=False`` computes everything and multiplies
        by the masks, ``shortlist=None`` reads the head in full. Its end takes back this change and no other."""
        self._check_loaded()
        with _added(self._context.entered, [self._context.setting.holding(**fields)]):
            yield self

    @contextmanager
    def at(self, capacity: float | None = None, exit_rate: float | None = None) -> Iterator[Self]:
        """Another capacity and exit rate; None leaves what is set.

        >>> with hat.at(0.5):
        ...     logits = hat.lm(torch.tensor(rows["input_ids"][:7])).logits
        >>> f"{hat.trace.capacity:.1f} of the work, for {hat.trace.real.sum()} tokens"
        '0.5 of the work, for 896 tokens'
        """
        with self.changed():
            if capacity is not None:
                self.capacity = capacity
            if exit_rate is not None:
                self.exit_rate = exit_rate
            yield self

    def dense(self) -> AbstractContextManager[Self]:
        """The base, within rounding: nothing is skipped and no token exits."""
        return self.changed(**self.in_full)

    @property
    def in_full(self) -> dict[str, object]:
        """The fields of a `Setting` by which nothing is skipped and no token exits."""
        return {"thresholds": self._dense, "named": {}, "decide": None, "leave": None, "gain": 0.0}

    def correcting(self, strength: float = 1.0) -> AbstractContextManager[Self]:
        """Corrections at a given strength, from 0 (none) to 1, whatever is skipped."""
        strength = check_fraction("strength", strength, 0.0, 1.0)
        if strength and not self.corrections:
            raise HatError("this model has no corrections: train some, with correction_rank in its config")
        return self.changed(correction=strength)

    def steered(self, gain: float = GAIN) -> AbstractContextManager[Self]:
        """Thresholds that move while a text is decoded, so that it executes the capacity asked for (channel grain)."""
        if not self.grain.scales_thresholds:
            raise HatError(f"the thresholds of the {self.grain.name} grain cannot be steered")
        return self.changed(gain=check_fraction("gain", gain, 0.0, 1.0))

    def engine(self) -> AbstractContextManager[Self]:
        """Forwards of up to eight tokens, with a cache, on the engine if it may: for decoding loops of one's own. What
        is done to the base (hooks, adapters) inside is not noticed."""
        return self.changed(engine=True) if self._decoding.why_not() is None else self.changed()

    def reference(self) -> AbstractContextManager[Self]:
        """Every forward on the reference path, as if there were no engine."""
        return self.changed(engine=False)

    def using(
        self, policy: Policy | Thresholds | None = None, exits: ExitPolicy | Sequence[float] | None = None
    ) -> AbstractContextManager[Self]:
        """Decisions and exits from any source, whatever is asked for: a policy (`hat_lib.evaluation.controls` has some)
        or other thresholds, for the routers (`threshold_policy`) and one for each gate. None leaves what is set."""
        fields = {}
        if isinstance(policy, Thresholds):
            fields |= {"decide": None, "site": policy.site, "sensitivity": policy.sensitivity}
        elif policy is not None:
            if not callable(policy):
                raise HatError(f"expected a policy or hat.threshold_policy(...), got {shown(policy)}")
            fields["decide"] = policy
        if callable(exits):
            fields["leave"] = exits
        elif exits is not None:
            fields |= {"leave": None, "exit": exits}
        return self.changed(**fields)

    def force(self, masks: Masks) -> AbstractContextManager[Self]:
        """Decisions, exits included, as recorded by `record`; a forward that they do not fit raises `HatError`."""
        return self.changed(decide=masks.decide, leave=masks.leave)

    def record(self) -> AbstractContextManager[Self]:
        """Each forward also keeps its decisions, in ``hat.trace.masks``."""
        return self.changed(record=True)

    @contextmanager
    def watching(self, see: Callable[[int, str, Tensor, Tensor], None]) -> Iterator[None]:
        """Context: call ``see(layer, site, x, activation)`` after each site that runs, with tensors of the graph: what
        the router reads, ``[..., C]``, and what is zeroed where it skips, that same input or the FFN's output."""

        def watch(layer, site: str):
            ffn = site == "ffn"
            module = layer.mlp if ffn else layer.layer.get_submodule(LINEARS[site][0])
            return module.register_forward_hook(
                lambda _, args, out: see(layer.index, site, args[0], out if ffn else args[0])
            )

        with ExitStack() as hooks:
            for layer in self.layers:
                for site in self.grain.sites:
                    hooks.enter_context(watch(layer, site))
            yield

    def collect(self) -> AbstractContextManager[list[Trace]]:
        """A list of the traces of all forwards inside (``Trace.cat`` joins decode steps)."""
        return _added(self._context.collectors, [])


@contextmanager
def _added(stack: list[list], own: list) -> Iterator[list]:
    """Context: ``own`` is on a stack of this thread. Its end removes that and nothing else, whatever thread it is in: a
    generator that holds a context may be closed late, and elsewhere."""
    try:
        stack.append(own)
        yield own
    finally:
        stack[:] = [other for other in stack if other is not own]


def _warn_below(what: str, value: float, measured: Iterable[float]) -> None:
    if value < (lowest := min((m for m in measured if m > 0), default=0.0)):
        text = f"{what} {value:g} is below the lowest measured one, {lowest:g}, whose thresholds are used"
        warnings.warn(text, stacklevel=4)
