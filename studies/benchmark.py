"""Wall-clock time of what `decode` leaves out, at forced shares: ``data/results/benchmark.csv``.

The token grain and exits in decode, for one sequence and for several, and both grains in prefill; the channel grain
decodes one sequence for comparison. A ratio only means something within one run, so the variants take turns on the same
forced tokens, and a speedup is the median of the rounds' ratios. ``speedup_hf`` is what a user gains over plain
transformers; ``speedup_dense`` is the method's own part, over our dense path; ``ideal`` is what the realised shares
would give if time followed weights (decode) or FLOPs (prefill).
"""

import gc
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from hat_lib.backbone.base import load_base
from hat_lib.calibration.quantiles import score_quantiles
from hat_lib.config import HatConfig, check_capacity, check_exit_rate
from hat_lib.inference.speed import Variant, now, replay, take_turns
from hat_lib.model.cost import Work, state_cost
from hat_lib.model.policies import Forced, Policy
from hat_lib.model.token_state import Masks, TokenState
from hat_lib.model.transformer import HierarchicalTransformer
from studies.common import SPEEDS, Machine, machine, markdown, ratios, rounded, saved, speeds
from studies.plotting import speed

ABOUT = "speed of the token grain, of exits and of prefill at forced shares, on TinyLlama's shape with random weights"
MINUTES = 10
KEY = ("granularity", "phase", "batch", "capacity", "exit_rate")
CONTEXT = 64  # tokens in the cache before the first timed decode step, over all sequences
PREFILL = 512  # tokens of a timed prefill, split between the prompts of a batch


class Setting(NamedTuple):
    capacity: float  # requested, like the next
    exit_rate: float = 0.0


@dataclass(frozen=True)
class Row(Machine):
    """Times are milliseconds per forward, medians over rounds."""

    granularity: str
    phase: str  # decode (one token per sequence) or prefill
    batch: int
    tokens: int  # per sequence: cached at the first timed step (decode), or of the prompt (prefill)
    capacity: float  # requested, like the next
    exit_rate: float
    realised: float
    realised_exit: float
    model_share: float
    ideal: float
    ms_hf: float
    ms_dense: float
    ms_adaptive: float
    speedup_hf: float
    speedup_dense: float
    efficiency_hf: float  # speedup_hf / ideal
    efficiency_dense: float
    rounds: int


def plain_part(model) -> LlamaForCausalLM:
    """What is called: ``lm`` of a `HierarchicalTransformer`, a plain model itself."""
    return getattr(model, "lm", model)


@torch.inference_mode()
def decode_ms(model, ids: Tensor, steps: int, context: int = CONTEXT) -> float:
    """Mean milliseconds of a decode step over ``steps`` tokens of ``ids`` [B, T], after ``context`` cached ones.

    ``model`` is a `HierarchicalTransformer` or a plain one. Neither the prompt is timed nor a first step, in which the
    engine may pack weights.
    """
    lm = plain_part(model)
    cache = DynamicCache(config=lm.config)
    lm(input_ids=ids[:, :context], cache=cache, use_cache=True, logits_to_keep=1)
    replay(model, ids[:, context : context + 1], cache)
    cache.crop(-1)
    start = now(model)
    replay(model, ids[:, context : context + steps], cache)
    return 1e3 * (now(model) - start) / steps


def measure(
    hat, plain, settings: Mapping[Setting, Callable], ids: Tensor, *, phase: str, rounds: int, steps: int
) -> Iterator[Row]:
    """A row for each of ``settings``, whose values make the context to run ``hat`` in; ``plain`` is `plain_copy`.

    ``ids`` are the tokens to force, int64 ``[B, >= CONTEXT + steps]``; ``phase`` is "decode" or "prefill".
    """
    prompts, context = ids[:, : max(1, PREFILL // len(ids))], max(1, CONTEXT // len(ids))
    decode = phase == "decode"

    def once(model) -> float:
        if decode:
            return decode_ms(model, ids, steps, context)
        lm, start = plain_part(model), now(model)
        lm(input_ids=prompts, cache=DynamicCache(config=lm.config), use_cache=True, logits_to_keep=1)
        return 1e3 * (now(model) - start)

    hf, dense = Variant("hf", plain, torch.inference_mode), Variant("dense", hat, hat.dense)
    adaptive = [Variant(f"{s}", hat, around) for s, around in settings.items()]
    take_turns([hf, dense, *adaptive], lambda v: once(v.model), rounds)
    for setting, v in zip(settings, adaptive, strict=True):
        with v.around(), hat.collect() as states, torch.inference_mode():
            once(hat)
            trace = TokenState.cat(states[2:] if decode else states)
            cost = state_cost(hat, trace)
        ideal, columns = _ideal(cost, phase, len(ids)), {"ms_adaptive": statistics.median(v.times)}
        for way in (hf, dense):
            speedup = statistics.median(ratios(way.times, v.times))
            columns |= {f"ms_{way.name}": statistics.median(way.times)}
            columns |= {f"speedup_{way.name}": speedup, f"efficiency_{way.name}": speedup / ideal}
        yield rounded(
            Row,
            **machine(hat.base) | setting._asdict() | columns,
            granularity=hat.config.granularity,
            phase=phase,
            batch=len(ids),
            tokens=context if decode else prompts.shape[1],
            realised=trace.capacity,
            realised_exit=trace.exit_rate,
            model_share=cost.model_share,
            ideal=ideal,
            rounds=rounds,
        )


def _ideal(cost: Work, phase: str, batch: int) -> float:
    """Dense / executed: weights read for decode, an upper bound in a batch, whose rows share them; FLOPs for prefill,
    where the head only serves the last token."""
    dense, executed = cost.dense_weight_bytes, cost.weight_bytes
    if phase == "prefill":
        head = {"head": batch * cost.dense_flops["head"].flatten()[0]}
        dense, executed = cost.dense_flops | head, cost.flops | head
    return float(sum(work.sum() for work in dense.values()) / sum(work.sum() for work in executed.values()))


def plain_copy(hat: HierarchicalTransformer) -> LlamaForCausalLM:
    """The same base in plain transformers, with its own weights."""
    return load_base(hat.base.name, dtype=hat.base.dtype, device=hat.base.device).model


def forced_tokens(hat: HierarchicalTransformer, capacity: float, batch: int, tokens: int, seed: int = 0) -> Policy:
    """Each token skips ``L (1 - capacity)`` FFNs, drawn at random; layer 0 always runs."""
    n, generator = hat.config.n_layers, np.random.default_rng(seed)
    skipped = n * (1 - capacity)
    keep = np.ones((n, batch, tokens), dtype=bool)
    for b, t in np.ndindex(batch, tokens):
        count = int(skipped) + (generator.random() < skipped % 1)
        keep[generator.choice(np.arange(1, n), size=min(count, n - 1), replace=False), b, t] = False
    return Forced(Masks({(i, "ffn"): torch.from_numpy(keep[i]).to(hat.base.device) for i in range(1, n)}))


def forced(
    hat: HierarchicalTransformer, capacities: Iterable[float], batch: int, tokens: int
) -> dict[float, Callable[[], AbstractContextManager]]:
    """Capacity -> a function that makes a context in which ``hat`` executes that share of a text ``[batch, tokens]``:
    the same at each site (channel grain), or `forced_tokens`."""
    gated = {c for c in capacities if c < 1}
    if hat.config.granularity == "token":
        policies = {c: forced_tokens(hat, c, batch, tokens) for c in gated}
    else:
        quantiles = score_quantiles(hat, [random_text(hat, 1, tokens)], progress=False)
        policies = {c: hat.threshold_policy(quantiles.thresholds(c)) for c in gated}
    return {c: partial(hat.using, policies[c]) for c in gated} | {1.0: hat.dense}


def random_text(hat: HierarchicalTransformer, batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(hat.base.device)


def rows(
    done: Collection = (),
    *,
    base: str = "random:tinyllama",
    channel: Sequence[float] = (1.0, 0.75, 0.6),
    token: Sequence[float] = (1.0, 0.7, 0.55, 0.4),
    exits: Sequence[float] = (0.3, 0.6),
    batches: Sequence[int] = (1, 8),
    rounds: int = 5,
    steps: int = 16,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Both grains at every capacity, decode and prefill; the token grain also at every batch size and exit rate. A
    batch has as many tokens in total as a single sequence; a turn of decode has ``steps`` tokens."""
    leaving = [Setting(1.0, check_exit_rate(rate)) for rate in exits]
    for granularity, capacities, more, sizes in (("channel", channel, [], [1]), ("token", token, leaving, batches)):
        asked = [*(Setting(check_capacity(c)) for c in capacities), *more]
        plan = {at: [s for s in asked if (granularity, *at, *s) not in done]
                for at in product(("decode", "prefill"), sizes)}  # fmt: skip
        if any(plan.values()):
            yield from _grain(granularity, plan, base, rounds, steps, dtype)
            gc.collect()  # gigabytes in cycles of models and hooks, whose size the collector cannot see


def _grain(granularity: str, plan: Mapping, base: str, rounds: int, steps: int, dtype: str | None) -> Iterator[Row]:
    loaded = load_base(base, dtype=dtype)
    half = loaded.model.config.num_hidden_layers // 2
    hat = HierarchicalTransformer(loaded, HatConfig.default(loaded, granularity=granularity, exit_layers=(half,)))
    plain, sizes = plain_copy(hat), {size for _, size in plan}
    ids = random_text(hat, max(sizes), max(PREFILL, CONTEXT + steps))
    capacities = {s.capacity for asked in plan.values() for s in asked}
    with torch.inference_mode():
        around = {size: forced(hat, capacities, size, ids.shape[1]) for size in sizes}
    for (phase, size), asked in plan.items():
        if asked:
            draws = torch.from_numpy(np.random.default_rng(0).random((size, ids.shape[1]))).to(ids.device)
            settings = {s: around[size][s.capacity] for s in asked}
            for s in asked:
                if s.exit_rate:
                    settings[s] = partial(hat.using, exits=Forced(Masks(exits={half: draws < s.exit_rate})))
            yield from measure(hat, plain, settings, ids[:size], phase=phase, rounds=rounds, steps=steps)


def figures(results: Path | None = None) -> dict:
    return {"benchmark": speed.benchmark(saved("benchmark", results).query("exit_rate == 0"))}


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["grain", "phase", "batch", "capacity realised", "tokens that leave", *SPEEDS]
    lines = [
        [r.granularity, r.phase, r.batch, f"{r.realised:.2f}", f"{r.realised_exit:.0%}",
         *speeds(r.ideal, r.speedup_dense, r.speedup_hf)]
        for r in saved("benchmark", results).itertuples()
    ]  # fmt: skip
    return {"benchmark": markdown(header, lines)}
