"""Perplexity of a text as it is decoded: token by token after a KV cache, the text's own tokens forced.

`score_each` runs a block in one parallel forward. In decoding the engine runs, and steering moves thresholds at every
token (`hat_lib.model.steering`). So what was timed in decode, steered to a capacity, is scored here as it ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from hat_lib.evaluation.perplexity import Score, _batches, _Tally
from hat_lib.model.cost import WorkTally
from hat_lib.model.token_state import TokenState
from hat_lib.model.transformer import HierarchicalTransformer


def score_decoded(
    hat: HierarchicalTransformer,
    dataset: Sequence[Mapping],
    settings: Sequence[Callable[[], AbstractContextManager]] = (nullcontext,),
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> tuple[Score, list[Score]]:
    """What `score_each` returns, with each block decoded token by token, for the base (``hat.dense()``) as well.

    Without steering it is the same within rounding, but that a head with a shortlist counts for all tokens and not for
    the scored ones alone. Up to eight blocks at a time are for the engine. The logits of a batch are held twice,
    ``[B, T, V]`` in the base's dtype. Arguments as in `score_each`. Raises `HatError` for a text without a scored
    token, and for a bad batch size.
    """
    settings = (hat.dense, *settings)
    tallies = [_Tally(lambda logits: logits, None, dataset) for _ in settings]  # what they are given are logits already
    spent = [WorkTally(hat) for _ in settings]

    def decode(lm, input_ids, **_):  # runs inside generate, where torch's threads sleep between steps
        for batch in _batches(dataset, batch_size, lm.device, progress):
            base = None
            for setting, tally, work in zip(settings, tallies, spent, strict=True):
                with setting(), hat.collect() as steps:
                    logits = _forced(lm, batch.ids)
                tally.add(batch, logits, base)
                state = TokenState.cat(steps)
                state.real = batch.real.bool()  # steps run only for the sake of longer blocks do not count
                work.add(state)
                base = logits if base is None else base
        return input_ids

    with torch.inference_mode():
        start = torch.zeros(1, 1, dtype=torch.long, device=hat.lm.device)
        hat.lm.generate(start, max_new_tokens=1, custom_generate=decode)
    for tally, work in zip(tallies, spent, strict=True):
        tally.spent = work
    base, *adaptive = [tally.score() for tally in tallies]
    return base, adaptive


def _forced(lm: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of ``ids [B, T]``, decoded one by one."""
    cache = DynamicCache(config=lm.config)
    return torch.cat([lm(input_ids=token, cache=cache, use_cache=True).logits for token in ids.split(1, dim=1)], dim=1)
