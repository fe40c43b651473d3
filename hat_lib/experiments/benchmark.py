"""Wall-clock of both grains at forced shares, interleaved: ``data/results/benchmark.csv``.

A ratio is only worth something inside one run, so the variants take turns: in each round every variant
processes the same tokens once, and what is reported is the median over rounds of the round's ratio.
``speedup_hf`` is what a user gains over plain transformers; ``speedup_dense`` is the method's own part, over
this library's dense path; ``ideal`` is what the realised shares would give if time followed weights (decode)
or FLOPs (prefill). Tokens are forced, not sampled, so every variant sees the same text.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from hat_lib.backbone.base import load_base
from hat_lib.calibration.capacity import score_quantiles
from hat_lib.config import HatConfig, HatError, check_capacity
from hat_lib.experiments.columns import machine, rounded
from hat_lib.experiments.tables import markdown, saved, times
from hat_lib.inference.speed import Variant, now, take_turns
from hat_lib.model.cost import state_cost
from hat_lib.model.policies import Forced, Policy
from hat_lib.model.token_state import Masks, TokenState
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting.style import benchmark as draw

ABOUT = "speed of a grain at forced shares, on TinyLlama's shape"
MINUTES = 15
KEY = ("granularity", "phase", "batch", "capacity", "exit_rate")
CONTEXT = 64
"""tokens in the cache before the first timed decode step"""
PREFILL = 512
"""tokens of a timed prefill, shared by the prompts of a batch"""


class Setting(NamedTuple):
    """What is requested."""

    capacity: float
    exit_rate: float = 0.0


@dataclass(frozen=True)
class Row:
    """One variant of one measurement. Times are milliseconds per forward, medians over rounds."""

    base: str
    device: str
    dtype: str
    threads: int
    granularity: str
    phase: str
    """decode (one token per sequence) or prefill"""
    batch: int
    tokens: int
    """keys in the cache at the first timed step (decode), or tokens of each prompt (prefill)"""
    capacity: float
    exit_rate: float
    """both as requested"""
    realised: float
    realised_exit: float
    model_share: float
    ideal: float
    ms_hf: float
    ms_dense: float
    ms_adaptive: float
    speedup_hf: float
    speedup_dense: float
    efficiency_hf: float
    """speedup_hf / ideal"""
    efficiency_dense: float
    rounds: int
    peak_mb: float
    """peak resident memory of the process before plain transformers' copy was loaded"""
    weights_mb: float
    """distinct weight storage that the adaptive model holds, base included"""
    base_mb: float
    """the base's weights alone"""


@torch.inference_mode()
def decode_ms(lm: LlamaForCausalLM, ids: Tensor, steps: int, context: int = CONTEXT) -> float:
    """Mean milliseconds of one decode step over ``steps`` forced tokens after ``context`` cached ones.

    The mean, because tokens differ in work: of ten tokens one may leave early.
    """
    cache = DynamicCache(config=lm.config)
    lm(input_ids=ids[:, :context], cache=cache, use_cache=True, logits_to_keep=1)
    start = now(lm)
    for t in range(context, context + steps):
        lm(input_ids=ids[:, t : t + 1], cache=cache, use_cache=True, logits_to_keep=1)
    return 1e3 * (now(lm) - start) / steps


@torch.inference_mode()
def prefill_ms(lm: LlamaForCausalLM, ids: Tensor) -> float:
    """Milliseconds of one forward over ``ids`` with the logits of the last token alone, as generate does."""
    start = now(lm)
    lm(input_ids=ids, cache=DynamicCache(config=lm.config), use_cache=True, logits_to_keep=1)
    return 1e3 * (now(lm) - start)


def ratio(slow: Variant, fast: Variant) -> float:
    """Median over rounds of slow / fast, paired by round."""
    return statistics.median(a / b for a, b in zip(slow.times, fast.times, strict=True))


def measure(
    hat: HierarchicalTransformer,
    plain: LlamaForCausalLM,
    settings: Mapping[Setting, Callable],
    ids: Tensor,
    *,
    phase: str,
    rounds: int,
    steps: int,
    memory: dict[str, float] | None = None,
) -> list[Row]:
    """A row for each setting.

    Args:
        settings: setting -> function that makes a context in which ``hat`` runs at it.
        plain: the same base in plain transformers.
        ids: tokens to force, int64 ``[B, >= context + steps]``.
        phase: "decode" or "prefill".
        memory: as `_memory` gives it; None takes it now.
    """
    memory = _memory(hat) if memory is None else memory
    prompts = ids[:, : max(1, PREFILL // len(ids))]
    variants = {"hf": Variant("hf", plain, torch.inference_mode), "dense": Variant("dense", hat.lm, hat.dense)}
    variants |= {s: Variant(f"{s}", hat.lm, around) for s, around in settings.items()}
    if phase == "decode":
        take_turns(list(variants.values()), lambda v: decode_ms(v.lm, ids, steps), rounds)
    else:
        take_turns(list(variants.values()), lambda v: prefill_ms(v.lm, prompts), rounds)

    found = []
    for setting, around in settings.items():
        v = variants[setting]
        with around(), hat.collect() as states, torch.inference_mode():
            decode_ms(hat.lm, ids, steps) if phase == "decode" else prefill_ms(hat.lm, prompts)
            trace = TokenState.cat(states[1:] if phase == "decode" else states)
            cost = state_cost(hat, trace)
        hf, own, ideal = ratio(variants["hf"], v), ratio(variants["dense"], v), _ideal(cost, phase, len(ids))
        found.append(
            rounded(
                Row,
                **machine(hat.base),
                granularity=hat.config.granularity,
                phase=phase,
                batch=len(ids),
                tokens=CONTEXT if phase == "decode" else prompts.shape[1],
                **setting._asdict(),
                realised=trace.capacity,
                realised_exit=trace.exit_rate,
                model_share=cost.model_share,
                ideal=ideal,
                ms_hf=statistics.median(variants["hf"].times),
                ms_dense=statistics.median(variants["dense"].times),
                ms_adaptive=statistics.median(v.times),
                speedup_hf=hf,
                speedup_dense=own,
                efficiency_hf=hf / ideal,
                efficiency_dense=own / ideal,
                rounds=rounds,
                **memory,
            )
        )
    return found


def _ideal(cost, phase: str, batch: int) -> float:
    """Dense / executed: weights read for decode, FLOPs for prefill, where the head serves the last token alone.

    In a batch a weight is read once for all rows, so the ideal of a batched decode is that of the rows' mean
    only if rows are compacted; it is reported as an upper bound.
    """
    if phase == "decode":
        executed = sum(v.sum() for v in cost.weight_bytes.values())
        return float(sum(v.sum() for v in cost.dense_weight_bytes.values()) / executed)
    last = {"head": batch * float(cost.dense_flops["head"].flatten()[0])}
    dense = {k: float(v.sum()) for k, v in cost.dense_flops.items()} | last
    executed = {k: float(v.sum()) for k, v in cost.flops.items()} | last
    return sum(dense.values()) / sum(executed.values())


def forced_tokens(hat: HierarchicalTransformer, capacity: float, batch: int, tokens: int, seed: int = 0) -> Policy:
    """Token grain at an exact capacity: the same number of FFNs skipped for every token, drawn at random.

    Layer 0 always runs, so the others skip ``L (1 - capacity)`` of L - 1 between them.
    """
    n = hat.config.n_layers
    generator = np.random.default_rng(seed)
    skipped = n * (1 - capacity)
    keep = np.ones((n, batch, tokens), dtype=bool)
    for b, t in np.ndindex(batch, tokens):
        count = int(skipped) + (generator.random() < skipped % 1)
        keep[generator.choice(np.arange(1, n), size=min(count, n - 1), replace=False), b, t] = False
    return Forced(Masks({(i, "ffn"): torch.from_numpy(keep[i]).to(hat.base.device) for i in range(1, n)}))


def forced_channels(hat: HierarchicalTransformer, ids: Tensor, capacities: Iterable[float]) -> dict[float, Policy]:
    """Channel grain at a share: one quantile of the scores per site, the same share everywhere."""
    quantiles = score_quantiles(hat, [ids], progress=False)
    return {c: hat.threshold_policy(quantiles.cuts(c)) for c in capacities}


def rows(
    done: Collection = (),
    *,
    base: str = "random:tinyllama",
    channel: Sequence[float] = (1.0, 0.75, 0.6),
    token: Sequence[float] = (1.0, 0.7, 0.55, 0.4),
    batches: Sequence[int] = (1, 8),
    rounds: int = 5,
    steps: int = 12,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Both grains at every capacity, decode and prefill, at every batch size.

    A batch prefills as many tokens as one prompt does, in shorter prompts, so that the two can be compared.
    Each grain runs in a process of its own, so that its peak memory is its own.

    Args:
        channel, token: capacities of each grain; none leaves it out.
        rounds: in which every variant takes one turn; medians over them.
        steps: decode steps of one turn.
    """
    if min(rounds, steps, *batches) < 1:
        raise HatError(f"rounds, steps and batch sizes must be at least 1, got {rounds}, {steps} and {batches}")
    for granularity, capacities in (("channel", channel), ("token", token)):
        asked = [check_capacity(c) for c in capacities]
        plan = {at: [c for c in asked if (granularity, *at, c, 0.0) not in done]
                for at in product(("decode", "prefill"), batches)}  # fmt: skip
        if any(plan.values()):
            with get_context("spawn").Pool(1) as pool:
                yield from pool.apply(of_grain, (granularity, plan, base, rounds, steps, dtype))


def of_grain(
    granularity: str,
    plan: Mapping[tuple[str, int], Sequence[float]],
    base: str,
    rounds: int = 5,
    steps: int = 12,
    dtype: str | None = None,
) -> list[Row]:
    """The rows of one grain.

    Two copies of the base are in memory: the adaptive one, and plain transformers', loaded after the peak was read.

    Args:
        plan: capacities by phase and batch size.
    """
    loaded = load_base(base, dtype=dtype)
    shape = HatConfig.published if granularity == "token" else HatConfig.default
    hat = HierarchicalTransformer(loaded, shape(loaded, exit_layers=()))
    sizes, gated = [size for _, size in plan], {c for capacities in plan.values() for c in capacities if c < 1}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (max(sizes), max(PREFILL, CONTEXT + steps)), generator=generator).to(loaded.device)
    with torch.inference_mode():
        policies = forced_channels(hat, ids[:1], gated) if granularity == "channel" else {}
        hat.lm(ids[:1, :PREFILL], use_cache=True, logits_to_keep=1)
    memory = _memory(hat)
    plain = load_base(base, dtype=dtype).model
    found: list[Row] = []
    for (phase, size), capacities in plan.items():
        if granularity == "token":
            policies = {c: forced_tokens(hat, c, size, ids.shape[1]) for c in gated}
        settings = {Setting(c): partial(hat.using, policies[c]) if c < 1 else hat.dense for c in capacities}
        if settings:
            found += measure(hat, plain, settings, ids[:size], phase=phase, rounds=rounds, steps=steps, memory=memory)
    return found


def _memory(hat: HierarchicalTransformer) -> dict[str, float]:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in hat.parameters()}
    if hat.base.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(hat.base.device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    own = sum(p.numel() * p.element_size() for p in hat.lm.parameters())
    return {"peak_mb": peak, "weights_mb": sum(storages.values()) / 2**20, "base_mb": own / 2**20}


def figures(results: Path | None = None) -> dict[str, Figure]:
    return {"benchmark": draw(saved("benchmark", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["grain", "phase", "batch", "capacity realised", "ideal", "over our own dense path",
              "over plain transformers"]  # fmt: skip
    lines = [
        [r.granularity, r.phase, r.batch, f"{r.realised:.2f}", times(r.ideal), times(r.speedup_dense, r.ideal),
         times(r.speedup_hf)]
        for r in saved("benchmark", results).itertuples()
    ]  # fmt: skip
    return {"benchmark": markdown(header, lines)}
