"""Wall-clock: the adaptive model beside its own dense path and beside plain transformers, in one run.

A ratio is only worth something inside one run, so the variants take turns: in each round every variant
processes the same tokens once, and what is reported is the median over rounds of the round's ratio.
``speedup_hf`` is what a user gains over plain transformers; ``speedup_dense`` is the method's own part, over
this library's dense path; ``ideal`` is what the realised shares would give if time followed weights (decode)
or FLOPs (prefill). Tokens are forced, not sampled, so every variant sees the same text.
"""

from __future__ import annotations

import csv
import resource
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, LlamaForCausalLM

from hat_lib.backbone.base import Base, load_base
from hat_lib.calibration.capacity import score_quantiles
from hat_lib.config import HatConfig, HatError, check_capacity
from hat_lib.experiments.tables import markdown, saved, times
from hat_lib.inference.timing import Variant, now, take_turns
from hat_lib.model.cost import state_cost
from hat_lib.model.policies import Forced, Policy
from hat_lib.model.token_state import Masks, TokenState
from hat_lib.model.transformer import HierarchicalTransformer

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
    variants = {"hf": Variant("hf", plain, _nothing), "dense": Variant("dense", hat.lm, hat.dense)}
    variants |= {s: Variant(f"{s}", hat.lm, around) for s, around in settings.items()}
    if phase == "decode":
        take_turns(list(variants.values()), lambda v: decode_ms(v.lm, ids, steps), rounds)
    else:
        take_turns(list(variants.values()), lambda v: prefill_ms(v.lm, prompts), rounds)

    rows = []
    for setting, around in settings.items():
        v = variants[setting]
        with around(), hat.collect() as states, torch.inference_mode():
            decode_ms(hat.lm, ids, steps) if phase == "decode" else prefill_ms(hat.lm, prompts)
            trace = TokenState.cat(states[1:] if phase == "decode" else states)
            cost = state_cost(hat, trace)
        ideal = _ideal(cost, phase, ids.shape[0])
        hf, own = ratio(variants["hf"], v), ratio(variants["dense"], v)
        rows.append(
            Row(
                base=hat.base.name,
                device=_device_name(hat.base.device),
                dtype=str(hat.base.dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                granularity=hat.config.granularity,
                phase=phase,
                batch=ids.shape[0],
                tokens=CONTEXT if phase == "decode" else prompts.shape[1],
                **setting._asdict(),
                realised=round(trace.capacity, 4),
                realised_exit=round(trace.exit_rate, 4),
                model_share=round(cost.model_share, 4),
                ideal=round(ideal, 3),
                ms_hf=round(statistics.median(variants["hf"].times), 3),
                ms_dense=round(statistics.median(variants["dense"].times), 3),
                ms_adaptive=round(statistics.median(v.times), 3),
                speedup_hf=round(hf, 3),
                speedup_dense=round(own, 3),
                efficiency_hf=round(hf / ideal, 3),
                efficiency_dense=round(own / ideal, 3),
                rounds=rounds,
                **memory,
            )
        )
    return rows


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


def forced_channels(hat: HierarchicalTransformer, ids: Tensor, capacities: Iterable[float]) -> dict[float, dict]:
    """Channel grain at a share: one quantile of the scores per site, the same share everywhere."""
    quantiles = score_quantiles(hat, [ids], progress=False)
    return {c: quantiles.cuts(c) for c in capacities}


def at_thresholds(hat: HierarchicalTransformer, thresholds: dict):
    """A context that decides by the given thresholds."""
    return partial(hat.using, hat.threshold_policy(thresholds))


def benchmark(
    granularity: str,
    capacities: Sequence[float],
    base: str = "random:tinyllama",
    *,
    dtype=None,
    batches: Sequence[int] = (1, 8),
    rounds: int = 5,
    steps: int = 12,
    progress: bool = True,
) -> list[Row]:
    """Speed of one grain at forced shares, decode and prefill, at every batch size.

    A batch prefills as many tokens as one prompt does, in shorter prompts, so that the two can be compared.
    Meant for shapes without weights, whose ratios do not depend on the weights. Two copies of the base are in
    memory: the adaptive one, and plain transformers', loaded after the peak was read.
    """
    if min(rounds, steps, *batches) < 1:
        raise HatError(f"rounds, steps and batch sizes must be at least 1, got {rounds}, {steps} and {batches}")
    loaded = load_base(base, dtype=dtype)
    shape = HatConfig.published if granularity == "token" else HatConfig.default
    hat = HierarchicalTransformer(loaded, shape(loaded, exit_layers=()))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (max(batches), max(PREFILL, CONTEXT + steps)), generator=generator).to(loaded.device)
    gated = [c for c in map(check_capacity, capacities) if c < 1]
    with torch.inference_mode():
        if granularity == "channel":
            thresholds = forced_channels(hat, ids[:1], gated)
        hat.lm(ids[:1, :PREFILL], use_cache=True, logits_to_keep=1)
    memory = _memory(hat)
    plain = load_base(base, dtype=dtype).model

    rows: list[Row] = []
    phases = list(product(("decode", "prefill"), batches))
    for phase, size in tqdm(phases, desc=granularity, disable=not progress):
        if granularity == "channel":
            settings = {Setting(c): at_thresholds(hat, thresholds[c]) for c in gated}
        else:
            policies = {c: forced_tokens(hat, c, size, ids.shape[1]) for c in gated}
            settings = {Setting(c): partial(hat.using, policies[c]) for c in gated}
        settings |= {Setting(c): hat.dense for c in capacities if c == 1}
        rows += measure(hat, plain, settings, ids[:size], phase=phase, rounds=rounds, steps=steps, memory=memory)
    return rows


def decode_rows(
    hat: HierarchicalTransformer,
    plain: Base,
    ids: Tensor,
    capacities: Sequence[float],
    *,
    rounds: int = 9,
    steps: int = 24,
) -> list[Row]:
    """Batch-1 decode of real text at calibrated capacities, against a plain copy of the same base."""
    settings = {
        Setting(c): at_thresholds(hat, hat.calibration.thresholds_at(c)) if c < 1 else hat.dense for c in capacities
    }
    return measure(hat, plain.model, settings, ids, phase="decode", rounds=rounds, steps=steps)


def write_rows(path: str | Path, rows: Sequence) -> Path:
    """Dataclass rows to CSV, header from the field names; written beside and renamed."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(rows[0])])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        temporary.replace(path)
    except OSError as error:
        raise HatError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _memory(hat: HierarchicalTransformer) -> dict[str, float]:
    storages = {}
    for p in hat.parameters():
        storages[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
    own = sum(p.numel() * p.element_size() for p in hat.lm.parameters())
    if hat.base.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(hat.base.device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "peak_mb": round(peak, 1),
        "weights_mb": round(sum(storages.values()) / 2**20, 1),
        "base_mb": round(own / 2**20, 1),
    }


def _nothing():
    return torch.inference_mode()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["grain", "phase", "batch", "capacity realised", "ideal", "over our own dense path",
              "over plain transformers"]  # fmt: skip
    lines = [
        [r.granularity, r.phase, r.batch, f"{r.realised:.2f}", times(r.ideal), times(r.speedup_dense, r.ideal),
         times(r.speedup_hf)]
        for r in saved("benchmark", results).itertuples()
    ]  # fmt: skip
    return {"benchmark": markdown(header, lines)}
