"""Timing in turns: variants of one computation, interleaved, so that their ratio means something."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import LlamaForCausalLM


@dataclass
class Variant:
    """A way to run: ``lm`` under ``around()``, a context such as ``hat.dense``."""

    name: str
    lm: LlamaForCausalLM
    around: Callable
    times: list[float] = field(default_factory=list)


def now(lm: LlamaForCausalLM) -> float:
    """Seconds on a clock, once the model's device has done what it was asked for."""
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return time.perf_counter()


def take_turns(variants: Sequence[Variant], once: Callable[[Variant], float], rounds: int) -> None:
    """One warm-up and ``rounds`` counted rounds, each variant once per round, alternating the order."""
    for r in range(rounds + 1):
        for v in variants if r % 2 else reversed(variants):
            with v.around():
                ms = once(v)
            if r:
                v.times.append(ms)
