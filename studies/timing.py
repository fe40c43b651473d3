"""What studies of speed share: a timed decode, the same base in plain transformers, and forced shares of the work."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from hat_lib.base.load import load_base
from hat_lib.calibration.quantiles import score_quantiles
from hat_lib.decoding.speed import now, replay
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.policies import Forced, Policy
from hat_lib.method.trace import Masks

CONTEXT = 64  # tokens in the cache before the first timed decode step, over all sequences


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
        text = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0)).to(hat.base.device)
        quantiles = score_quantiles(hat, [text], progress=False)
        policies = {c: hat.threshold_policy(quantiles.thresholds(c)) for c in gated}
    return {c: partial(hat.using, policies[c]) for c in gated} | {1.0: hat.dense}
