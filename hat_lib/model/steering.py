"""Steering: thresholds that move while a text is decoded, so that realised capacity matches the request.

Thresholds are set on other text, and a text of another kind realises a little more or less than what was asked for.
Steered, each sequence has an offset, and ``exp(offset)`` multiplies all thresholds of its layers. After each forward
of ``n`` tokens the offset grows by what they executed beyond what was asked, on average:

    offset += (executed - asked) * (1 - (1 - gain * slope) ** n) / slope

For one token that is ``gain`` times what it executed beyond. A prompt moves the offset as far as its tokens would have
one by one, if ``slope`` is how much less is executed for each unit of the offset; a long one as far as it takes.

It is causal and a sequence's own, so a row alone still equals the row in a batch. But a token's decisions now depend on
how the text before it was cut into forwards: a parallel forward moves its offset once, at the end, and decoding moves
it at every token. So it is off unless asked for (`with hat.steered():`). Offsets stay with the KV cache; beams that
change places keep the place's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hat_lib.model.token_state import TokenState

GAIN = 0.2
SLOPE = 0.25
"""of the bundled base: 0.31, 0.24 and 0.09 at capacities of 0.44, 0.61 and 0.82"""
LIMIT = 1.0
"""offsets stay within it: a text beyond is not what the thresholds are for"""


def offsets(cache: Cache | None, batch: int, device: torch.device) -> Tensor:
    """Of each sequence so far, fp32 ``[B]``."""
    found = getattr(cache, "hat_offsets", None)
    if found is None or batch % len(found):
        return torch.zeros(batch, device=device)
    return found.to(device).repeat_interleave(batch // len(found))  # beams begin as copies


def move(cache: Cache | None, state: TokenState, asked: float, gain: float) -> None:
    """Note at the end of a forward what it executed beyond ``asked``, a share of the layers' work."""
    if cache is None:
        return
    counted = state.real & ~state.protected & ~state.exited
    tokens = counted.sum(1)
    beyond = ((state.share.mean(0) - asked) * counted).sum(1) / tokens.clamp(min=1)
    reach = (1 - (1 - gain * SLOPE) ** tokens) / SLOPE
    before = offsets(cache, state.batch, state.real.device)
    cache.hat_offsets = (before + beyond * reach).clamp(-LIMIT, LIMIT)
