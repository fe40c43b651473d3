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

import numpy as np
from transformers.cache_utils import Cache

from hat_lib.model.token_state import TokenState

GAIN = 0.2
SLOPE = 0.25
"""of the bundled base: 0.31, 0.24 and 0.09 at capacities of 0.44, 0.61 and 0.82"""
LIMIT = 1.0
"""offsets stay within it: a text beyond is not what the thresholds are for"""

# In numpy: after a step of the engine no cache holds anything of torch, and its operations cost several times as much.


def offsets(cache: Cache | None, batch: int) -> np.ndarray:
    """Of each sequence so far, float32 ``[B]``."""
    found = getattr(cache, "hat_offsets", None)
    if found is None or batch % len(found):
        return np.zeros(batch, np.float32)
    return found.repeat(batch // len(found))  # beams begin as copies


def move(cache: Cache | None, state: TokenState, asked: float, gain: float) -> None:
    """Note at the end of a forward what it executed beyond ``asked``, a share of the layers' work."""
    if cache is None:
        return
    real, protected, depth = (a.cpu().numpy() for a in (state.real, state.protected, state.exit_layer))
    counted = real & ~protected & (depth == state.n_layers)
    site_share = (state.site_share if state.executed is None else state.executed).cpu().numpy()
    layers, sites = site_share.shape[:2]
    share = (state.site_work @ site_share.sum(0).reshape(sites, -1)).reshape(counted.shape) / layers
    moved = offsets(cache, state.batch).tolist()
    for row, tokens in enumerate(zip(share.tolist(), counted.tolist(), strict=True)):
        if ran := [executed for executed, counts in zip(*tokens, strict=True) if counts]:
            reach = (1 - (1 - gain * SLOPE) ** len(ran)) / SLOPE
            moved[row] = min(max(moved[row] + (sum(ran) / len(ran) - asked) * reach, -LIMIT), LIMIT)
    cache.hat_offsets = np.array(moved, np.float32)
