"""Speed on this machine: variants timed in turns, and a curve of speedup by capacity that is searched for a target.

What a skipped weight saves depends on the machine, the dtype and the threads. So speed is modelled by a measurement,
`SpeedCurve`: decoding at several capacities, each beside the path it is compared with, at the same positions of the
same text. It is cached for the user, keyed by everything it depends on.
"""

import hashlib
import json
import os
import platform
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from scipy.optimize import isotonic_regression
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, LlamaForCausalLM

from hat_lib.base.machine import cpu_name
from hat_lib.config import CAPACITY_MIN, HatError, cache_dir, check_fraction
from hat_lib.decoding.generate import token_by_token

VERSUS = {"dense": "our own dense path", "hf": "plain transformers"}
"""what a speedup is relative to"""
check_target = partial(check_fraction, "target speedup", low=0.1, high=10.0)
"""a target as a number, or `HatError`; no useful model comes near these ends"""
CAPACITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ROUNDS = 3
"""passes over all capacities: a machine drifts, and the first turn of a process is slow"""
CONTEXT, STEPS, TURNS = 64, 28, 7
"""tokens in the cache; tokens decoded, in so many turns, the first to warm up"""

_SAMPLING = threading.Lock()


@dataclass
class Variant:
    """A way to run: ``model`` inside the context ``around()``, such as ``hat.dense``."""

    name: str
    model: object
    around: Callable
    times: list[float] = field(default_factory=list)


def now(model) -> float:
    """Seconds on a clock, once the model's device has finished its pending work."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def replay(model, ids: Tensor, cache: DynamicCache, mask: Tensor | None = None) -> None:
    """Decode a known text after a cache, token by token (`HierarchicalTransformer.replay`), on either model."""
    getattr(model, "replay", partial(token_by_token, model))(ids, cache, mask)


def take_turns(variants: Sequence[Variant], once: Callable[[Variant], float], rounds: int) -> None:
    """Call ``once`` on each variant in each round, after one to warm up that is dropped from ``times``. What runs just
    before a turn affects its time: so one round has a random order, the same in every run, and the next its reverse."""
    for r in range(1 + rounds):
        order = random.Random(r // 2).sample(variants, len(variants))
        for v in order if r % 2 else reversed(order):
            with v.around():
                v.times.append(once(v))
    for v in variants:
        del v.times[0]


@dataclass(frozen=True)
class SpeedCurve:
    """Decode speedup by capacity."""

    versus: str
    exit_rate: float
    capacities: list[float]
    """requested, rising to 1.0"""
    turns: list[list[float]]
    """speedups measured at each"""
    machine: str
    """device, dtype and threads, for display"""

    def at(self, capacity: float | np.ndarray, of: Callable = np.median) -> np.ndarray:
        """Predicted speedup: what ``of`` makes of the turns, made non-increasing in capacity by least squares (isotonic
        regression), linear between measured capacities."""
        speedups = isotonic_regression([of(turns) for turns in self.turns], increasing=False).x
        return np.interp(capacity, self.capacities, speedups)

    def spread(self, capacity: float) -> tuple[float, float]:
        """What the slowest and the fastest turns predict; `at` lies between them."""
        return self.at(capacity, min), self.at(capacity, max)

    @property
    def largest(self) -> float:
        """The largest speedup that can be requested."""
        return float(self.at(CAPACITY_MIN))

    def capacity_for(self, target: float) -> float:
        """The largest capacity, to 1e-4, that reaches ``target``; if none does, `HatError` names the maximum."""
        capacities = np.linspace(1.0, CAPACITY_MIN, 9001)
        reached = self.at(capacities) >= target
        if not reached.any():
            raise HatError(
                f"target speedup {target:g} is out of reach here: at most {self.largest:.3f} over "
                f"{VERSUS[self.versus]} ({self.machine}, exit rate {self.exit_rate:g})"
            )
        return float(capacities[reached.argmax()])


def speed_curve(
    hat,
    versus: str = "dense",
    *,
    exit_rate: float = 0.0,
    batch: int = 1,
    plain: Callable[[], LlamaForCausalLM] | None = None,
    refresh: bool = False,
) -> SpeedCurve:
    """The curve of this model on this machine: from the cache, or else measured in about half a minute.

    Args:
        versus: one of `VERSUS`.
        exit_rate: requested, at every capacity.
        batch: sequences that decode together.
        plain: returns the same base in plain transformers; called only for versus "hf".
        refresh: measure again, whatever the cache has.
    """
    path = _file(hat, versus, exit_rate, batch)
    if path.is_file() and not refresh:
        with suppress(ValueError, TypeError):  # half written: measured again
            return SpeedCurve(**json.loads(path.read_text()))
    reference = (hat, hat.dense) if versus == "dense" else (plain(), torch.inference_mode)
    ids = sample(hat, CONTEXT + STEPS, batch)
    turns = {capacity: [] for capacity in CAPACITIES}
    for capacity in tqdm(CAPACITIES * ROUNDS, desc="speed curve"):
        with hat.at(capacity, exit_rate), steer_to_capacity(hat):
            turns[capacity].append(round(timed(hat, reference, ids), 4))
    curve = SpeedCurve(versus, exit_rate, [*turns], [*turns.values()], _machine(hat))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(curve)))
    except OSError as error:  # it is valid, but will be measured again
        warnings.warn(f"speed curve not kept ({error}); set HAT_CACHE to a folder with space", stacklevel=2)
    return curve


def speedup_text(speedup: float | None, versus: str) -> str:
    """A measured speedup over ``versus`` in words: one below 1 is called slower, None too short a text."""
    if speedup is None:
        return "too short a text to measure"
    return f"{speedup:.3f}x, slower than {versus}" if round(speedup, 3) < 1 else f"{speedup:.3f}x over {versus}"


def steer_to_capacity(hat) -> AbstractContextManager:
    """Steering for a target speedup: texts that would execute less or more at a capacity are held to it."""
    return hat.steered() if hat.grain.scales_thresholds else nullcontext()


def timed(hat, reference: tuple, ids: Tensor, mask: Tensor | None = None) -> float:
    """Speedup of ``hat`` as it is set over a reference, at the same decode steps over the last tokens of a text.

    ``hat`` reads all but the last `STEPS` tokens, or half of them if they are few. Both then take turns at the same few
    tokens after the same cache. Returns the median of the ratios or, where tokens exit, the ratio of the means: one
    token in ten leaving early would not show in a median.

    Args:
        reference: ``(model, around)``: a model, and a function that makes the context to run it in.
        ids: int64 ``[B, T]``, at least four tokens.
        mask: ``[B, T]``, 0 at padding.
    """
    steps = min(STEPS, ids.shape[1] // 2)
    tokens = max(1, steps // TURNS)
    turns = steps // tokens
    context, cache = ids.shape[1] - tokens * turns, DynamicCache(config=hat.lm.config)

    def burst(v: Variant) -> float:
        start = context + tokens * len(v.times)
        cache.crop(start - cache.get_seq_length())
        began, end = now(v.model), start + tokens
        replay(v.model, ids[:, start:end], cache, None if mask is None else mask[:, :end])
        return now(v.model) - began

    base, ours = Variant("reference", *reference), Variant("adaptive", hat, torch.inference_mode)
    with torch.inference_mode():
        seen = None if mask is None else mask[:, :context]
        # All logits, though nobody reads them: steering goes by the head's work, too.
        hat.lm(input_ids=ids[:, :context], attention_mask=seen, cache=cache, use_cache=True)
        take_turns([base, ours], burst, turns - 1)
    theirs, mine = np.array(base.times), np.array(ours.times)
    return float(theirs.mean() / mine.mean() if hat.exit_rate > 0 else np.median(theirs / mine))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context for sampling: transformers draws from torch's generator, which all threads share, so one at a time does.
    It is then as it was before."""
    with _SAMPLING, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.inference_mode()
def sample(hat, tokens: int, batch: int = 1) -> Tensor:
    """Text sampled from the base, int64 ``[batch, tokens]``, the same every time."""
    tokenizer = hat.base.tokenizer
    start = torch.tensor([tokenizer("The").input_ids] * batch, device=hat.base.device)
    with seeded(0, hat.base.device), hat.dense():
        more = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": tokenizer.pad_token_id}
        return hat.lm.generate(start, attention_mask=torch.ones_like(start), do_sample=True, **more)[:, :tokens]


def _machine(hat) -> str:
    device, dtype = hat.base.device, str(hat.base.dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {dtype}"
    return f"{device.type}, {dtype}, {torch.get_num_threads()} threads"


def _file(hat, *settings) -> Path:
    """Where a curve is kept, by everything it depends on: also the source that decodes and times, since a version
    number would not change with every edit."""
    code, adapter = hashlib.sha256(), {n: p.detach().cpu().contiguous() for n, p in hat.hat_parameters().items()}
    for package in ("method", "engine", "decoding"):
        for path in sorted((Path(__file__).parents[1] / package).glob("*.py")):
            code.update(path.read_bytes())
    model = hat.base.fingerprint, hat.config, hat.calibration, hashlib.sha256(save(adapter)).hexdigest()
    machine = torch.__version__, platform.machine(), cpu_name(), os.cpu_count(), _machine(hat), hat.decoding
    key = hashlib.sha256(repr((code.hexdigest(), *model, *machine, *settings)).encode())
    return cache_dir() / "speed" / f"{key.hexdigest()[:24]}.json"
