"""Speed of a capacity on this machine: measured once, kept, and searched for a target speedup.

Wall-clock does not follow work: what a skipped weight saves depends on the machine, the dtype and the threads. So the
model of speed is a measurement, `SpeedCurve`: decode at some capacities, each beside the path that it is held
against, at the same positions of the same text. It is kept in the user's cache under everything that it depends on:
machine, torch, base, trained parameters, and the source of the code that decodes. `speed_curve` with ``refresh``
measures it anew, as after a cooler was cleaned or a neighbour moved out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, LlamaForCausalLM

from hat_lib.config import CAPACITY_MIN, HatError, cache_dir
from hat_lib.inference.timing import now
from hat_lib.model.schema import digest
from hat_lib.model.transformer import HierarchicalTransformer

VERSUS = {"dense": "our own dense path", "hf": "plain transformers"}
"""what a speedup is held against: our own dense path, or plain transformers"""
TARGET_MAX = 10.0
"""no capacity and no exit rate of a useful model comes near it"""
CAPACITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ROUNDS = 3
"""turns of each capacity, one after another: a machine drifts, and the first turn of a process is slow"""
CONTEXT, STEPS, WARM = 64, 24, 3
"""tokens in the cache, timed steps, and steps before them"""


@dataclass(frozen=True)
class SpeedCurve:
    """Decode speedup by capacity."""

    versus: str
    exit_rate: float
    capacities: list[float]
    """requested, rising to 1.0"""
    measured: list[float]
    """speedup at each, the median of `ROUNDS` turns"""
    machine: str
    """device, dtype and threads, for people"""
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    """slowest and fastest turn at each capacity; empty where that is not known"""

    def __post_init__(self):
        points = self.capacities, self.measured, self.low or self.measured, self.high or self.measured
        table = np.array(points, dtype=float)  # ValueError unless all are as long
        rising = table.ndim == 2 and table.size and (np.diff(table[0]) > 0).all()
        if not rising or not np.isfinite(table).all() or table.min() <= 0:
            raise HatError("a speed curve needs rising capacities and, for each, finite speedups above 0")

    @property
    def speedups(self) -> np.ndarray:
        """``measured`` made to fall, or stay, as capacity rises: least squares (isotonic regression)."""
        return _falling(self.measured)

    def at(self, capacity: float) -> float:
        """Predicted speedup, linear between measured capacities."""
        return float(np.interp(capacity, self.capacities, self.speedups))

    def spread(self, capacity: float) -> tuple[float, float]:
        """What the slowest and the fastest turns predict; both are made to fall too, so `at` lies between them."""
        slowest, fastest = _falling(self.low or self.measured), _falling(self.high or self.measured)
        return tuple(float(np.interp(capacity, self.capacities, points)) for points in (slowest, fastest))

    @property
    def largest(self) -> float:
        """The largest speedup that can be asked for."""
        return float(self.speedups[0])

    def capacity_for(self, target: float) -> float:
        """The largest capacity that reaches a speedup, by bisection; `HatError` names the maximum if none does."""
        if self.at(1.0) >= target:
            return 1.0
        if self.largest < target:
            raise HatError(
                f"target speedup {target:g} is out of reach here: at most {self.largest:.3f} over "
                f"{VERSUS[self.versus]} ({self.machine}, exit rate {self.exit_rate:g})"
            )
        low, high = CAPACITY_MIN, 1.0  # the first is fast enough, the last is not
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle) >= target else (low, middle)
        return low


def _falling(points: Sequence[float]) -> np.ndarray:
    return isotonic_regression(points, increasing=False).x


def check_target(value: object) -> float:
    """``value`` as a target speedup, in (0, 10], or `HatError`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number <= TARGET_MAX:
        raise HatError(f"target speedup must be a number above 0, at most {TARGET_MAX:g}, got {value!r}")
    return number


def check_versus(value: str) -> str:
    """``value``, one of `VERSUS`, or `HatError`."""
    if value not in VERSUS:
        raise HatError(f"versus must be one of {', '.join(VERSUS)}, got {value!r}")
    return value


@torch.inference_mode()
def paired_steps(
    variants: Sequence[tuple[LlamaForCausalLM, Callable]],
    ids: Tensor,
    cache: Cache,
    steps: int,
    mask: Tensor | None = None,
) -> np.ndarray:
    """Milliseconds of the same decode steps in each variant, fp64 ``[len(variants), steps]``.

    At each position the variants take turns on the same tokens behind the same cache, in alternating order.

    Args:
        variants: ``(lm, around)``: a model, and a function that makes the context to run it in.
        ids: int64 ``[B, T]``, T at least the cache's length plus ``steps``; tokens are forced.
        mask: ``[B, T]``, 0 at padding.
    """
    start = cache.get_seq_length()
    times = np.empty((len(variants), steps))
    for t in range(steps):
        position = start + t
        seen = {} if mask is None else {"attention_mask": mask[:, : position + 1]}
        for i, (lm, around) in list(enumerate(variants))[:: -1 if t % 2 else 1]:
            cache.crop(position - cache.get_seq_length())
            with around():
                began = now(lm)
                lm(input_ids=ids[:, position : position + 1], cache=cache, use_cache=True, logits_to_keep=1, **seen)
                times[i, t] = 1e3 * (now(lm) - began)
    return times


def speedup(times: np.ndarray, exits: bool = False) -> float:
    """Of the second row of `paired_steps` over its first: the median of the ratios, position by position.

    Where tokens exit, of the means: one token in ten that leaves early would not show in a median.
    """
    return float(times[0].mean() / times[1].mean() if exits else np.median(times[0] / times[1]))


def speed_curve(
    hat: HierarchicalTransformer,
    versus: str = "dense",
    *,
    exit_rate: float = 0.0,
    batch: int = 1,
    plain: Callable[[], LlamaForCausalLM] | None = None,
    refresh: bool = False,
    progress: bool = True,
) -> SpeedCurve:
    """The curve of this model on this machine; measured where the cache has none, in about half a minute.

    Args:
        versus: one of `VERSUS`.
        exit_rate: requested, at every capacity.
        batch: sequences that decode together.
        plain: gives the same base in plain transformers, and is asked for versus "hf" alone.
        refresh: measure anew, whatever the cache has.

    Warns where the cache cannot be written: the curve is good, and measured again next time.
    """
    check_versus(versus)
    path = cache_dir() / "speed" / f"{digest(_key(hat, versus, exit_rate, batch))[:24]}.json"
    known = None if refresh else _read(path)
    if known is not None and (known.versus, known.exit_rate) == (versus, exit_rate):
        return known
    reference = (hat.lm, hat.dense) if versus == "dense" else (plain(), torch.inference_mode)
    ids = sample(hat, CONTEXT + WARM + STEPS, batch)
    turns = {capacity: [] for capacity in CAPACITIES}
    for capacity in tqdm(CAPACITIES * ROUNDS, desc="speed curve", disable=not progress):
        with hat.at(capacity, exit_rate):
            turns[capacity].append(timed(hat, reference, ids))
    measured, low, high = ([round(float(of(t)), 4) for t in turns.values()] for of in (np.median, min, max))
    curve = SpeedCurve(versus, exit_rate, list(CAPACITIES), measured, _machine(hat), low, high)
    _write(path, curve)
    return curve


def timed(hat: HierarchicalTransformer, reference: tuple, ids: Tensor, mask: Tensor | None = None) -> float:
    """Speedup of ``hat`` as it is set over a reference ``(lm, around)``, on the last tokens of ``ids [B, T]``.

    All but `STEPS` + `WARM` tokens, or half of them if they are few, are put into the cache first.
    """
    steps = min(STEPS + WARM, ids.shape[1] // 2)
    context = ids.shape[1] - steps
    cache = DynamicCache(config=hat.lm.config)
    with torch.inference_mode(), hat.dense():
        first = {} if mask is None else {"attention_mask": mask[:, :context]}
        hat.lm(input_ids=ids[:, :context], cache=cache, use_cache=True, logits_to_keep=1, **first)
    times = paired_steps([reference, (hat.lm, torch.inference_mode)], ids, cache, steps, mask)
    return speedup(times[:, min(WARM, steps - 1) :], exits=hat.exit_rate > 0)


@torch.inference_mode()
def sample(hat: HierarchicalTransformer, tokens: int, batch: int = 1) -> Tensor:
    """Text of the base's own, int64 ``[batch, tokens]``, the same every time."""
    tokenizer = hat.base.tokenizer
    start = torch.tensor([tokenizer("The").input_ids] * batch, device=hat.base.device)
    with torch.random.fork_rng(), hat.dense():
        torch.manual_seed(0)
        more = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        out = hat.lm.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, **more, pad_token_id=tokenizer.pad_token_id
        )
    return out[:, :tokens]


def _machine(hat: HierarchicalTransformer) -> str:
    device, dtype = hat.base.device, str(hat.base.dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {dtype}"
    return f"{device.type}, {dtype}, {torch.get_num_threads()} threads"


def _key(hat: HierarchicalTransformer, versus: str, exit_rate: float, batch: int) -> dict:
    """All that a curve depends on."""
    adapter = hashlib.sha256()
    for name, parameter in sorted(hat.hat_parameters().items()):
        adapter.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
    return {
        "code": _code(),
        "torch": torch.__version__,
        "base": hat.base.fingerprint,
        "config": hat.config.to_dict(),
        "calibration": hat.calibration.to_dict() if hat.calibration else None,
        "adapter": adapter.hexdigest(),
        "cpu": f"{platform.machine()} {_cpu()} {os.cpu_count()}",
        "machine": _machine(hat),
        "versus": versus,
        "exit_rate": exit_rate,
        "batch": batch,
    }


@cache
def _code() -> str:
    """SHA-256 of the source that decodes and that times, where a version would stay the same from edit to edit."""
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(p for package in ("model", "engine", "inference") for p in (root / package).glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def _read(path: Path) -> SpeedCurve | None:
    """The curve in a file; None where it is missing, or damaged, or of another form: it is measured again."""
    try:
        return SpeedCurve(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _write(path: Path, curve: SpeedCurve) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(curve)))
        part.replace(path)
    except OSError as error:
        warnings.warn(f"speed curve not kept ({error}); set HAT_CACHE to a folder with room", stacklevel=3)
