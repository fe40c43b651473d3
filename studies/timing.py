"""What studies of speed share: a timed decode, the same base in plain transformers, and forced shares of the work."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from hat_lib.base.load import load_base
from hat_lib.calibration.quantiles import score_quantiles
from hat_lib.decoding.speed import now, replay
from hat_lib.hat import HierarchicalTransformer

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


def forced(
    hat: HierarchicalTransformer, capacities: Iterable[float], tokens: int
) -> dict[float, Callable[[], AbstractContextManager]]:
    """Capacity -> a function that makes a context in which ``hat``, of the channel grain, executes about that share of
    a text of so many ``tokens``, the same at each site."""
    text = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0)).to(hat.base.device)
    quantiles = score_quantiles(hat, [text], progress=False)
    policies = {c: hat.threshold_policy(quantiles.thresholds(c)) for c in capacities if c < 1}
    return {c: partial(hat.using, policy) for c, policy in policies.items()} | {1.0: hat.dense}
