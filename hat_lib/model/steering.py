"""Steering: thresholds that move while a text is decoded, so that realised capacity matches the request.

A text of another kind than calibration's realises a little more or less than was asked for. Each sequence has an
offset, and ``exp(offset)`` multiplies the thresholds of its layers. After each forward of ``n`` tokens

    offset += (executed - asked) * (1 - (1 - gain * slope) ** n) / slope

For one token that is ``gain`` times its excess; a prompt moves the offset as far as its tokens would have, one by one,
if each unit of the offset lowers what is executed by ``slope``. Decisions then depend on how the text before was split
into forwards, so it is off unless asked for (`with hat.steered():`). Offsets are kept with the KV cache, by row; beams
that change rows do not take theirs along.
"""

from __future__ import annotations

import numpy as np
from transformers.cache_utils import Cache

from hat_lib.model.token_state import TokenState

GAIN = 0.2
SLOPE = 0.25
"""on the bundled base: 0.31, 0.24 and 0.09 at capacities of 0.44, 0.61 and 0.82"""
LIMIT = 1.0
"""of offsets, either way"""


def offsets(cache: Cache | None, batch: int) -> np.ndarray:
    """Offset of each sequence so far, float32 ``[B]``."""
    found = getattr(cache, "hat_offsets", np.zeros(1, np.float32))
    return found.repeat(batch // len(found))  # beams begin as copies


def move(cache: Cache | None, state: TokenState, asked: float, gain: float) -> None:
    """Move the offsets at the end of a forward, by what it executed beyond ``asked``, a share of the layers' work."""
    if cache is None:
        return
    # In numpy: after an engine step the CPU's caches hold nothing of torch, so its operations cost several times more.
    real, protected, depth = (a.cpu().numpy() for a in (state.real, state.protected, state.exit_layer))
    counted = real & ~protected & (depth == state.n_layers)
    site_share = (state.site_share if state.executed is None else state.executed).cpu().numpy()
    layers, sites = site_share.shape[:2]
    share = (state.site_work @ site_share.sum(0).reshape(sites, -1)).reshape(counted.shape) / layers
    moved = offsets(cache, state.batch).tolist()
    for row, tokens in enumerate(zip(share.tolist(), counted.tolist(), strict=True)):
        ran = [executed for executed, counts in zip(*tokens, strict=True) if counts]
        if ran:
            reach = (1 - (1 - gain * SLOPE) ** len(ran)) / SLOPE
            moved[row] = min(max(moved[row] + (sum(ran) / len(ran) - asked) * reach, -LIMIT), LIMIT)
    cache.hat_offsets = np.array(moved, np.float32)
