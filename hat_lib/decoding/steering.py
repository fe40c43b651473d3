"""Steering: thresholds that move while a text is decoded, so that realised capacity matches the request.

A text of another kind than calibration's realises a little more or less than was asked for, in the layers and in the
head. Each sequence has an offset, and ``exp(offset)`` multiplies the thresholds of its layers, which make up for the
head, too. After each forward of ``n`` tokens::

    offset += (executed - asked) * (1 - (1 - gain * slope) ** n) / slope

For one token that is ``gain`` times its excess; a prompt moves the offset as far as its tokens would have, one by one,
if each unit of the offset lowers what is executed by ``slope``. Decisions then depend on how the text before was split
into forwards, so it is off unless asked for (`with hat.steered():`). The KV cache remembers the offset after each
token.
"""

import numpy as np
import torch
from transformers.cache_utils import Cache

from hat_lib.decoding.row_memory import remember, remembered
from hat_lib.method.thresholds import Thresholds
from hat_lib.method.trace import Trace

GAIN = 0.5
SLOPE = 0.25
"""on the bundled base: 0.31, 0.24 and 0.09 at capacities of 0.44, 0.61 and 0.82"""
LIMIT = 1.0
"""of offsets, either way"""


def offsets(cache: Cache | None, batch: int, start: int) -> np.ndarray:
    """Offset of each sequence after ``start`` tokens, float32 ``[B]``."""
    return remembered(cache, "offsets", torch.zeros(batch, start))[:, -1:].sum(1).numpy()


def set_offsets(cache: Cache, start: int, moved: np.ndarray) -> None:
    """Remember the offsets after each of the tokens from ``start``, float32 ``[B, T]``."""
    before = remembered(cache, "offsets", torch.zeros(len(moved), start))
    remember(cache, "offsets", torch.cat([before, torch.from_numpy(moved)], dim=1))


def asked_for(thresholds: Thresholds, layers: int, head_work: float) -> float:
    """The share of a token's routable work that was asked for; the head's, 0 without a shortlist, in layers."""
    return (layers * thresholds.layer_capacity + head_work * thresholds.head_share) / (layers + head_work)


def move(cache: Cache | None, trace: Trace, thresholds: Thresholds, gain: float) -> None:
    """Move the offsets at the end of a forward, by what it executed beyond what was asked for."""
    if cache is None or not gain:
        return
    asked = asked_for(thresholds, trace.n_layers, trace.head_work)
    # In numpy: after an engine step the CPU's caches hold nothing of torch, and its operations cost several times more.
    real, protected, depth = (a.cpu().numpy() for a in (trace.real, trace.protected, trace.exit_layer))
    counted = real & ~protected & (depth == trace.n_layers)
    site_share = (trace.site_share if trace.executed is None else trace.executed).cpu().numpy()
    layers, sites = site_share.shape[:2]
    share = (trace.site_work @ site_share.sum(0).reshape(sites, -1)).reshape(counted.shape)
    head = trace.head_read.nan_to_num(trace.expected_head_share).cpu().numpy()
    share = (share + trace.head_work * head) / (layers + trace.head_work)
    moved = np.empty(share.shape, np.float32)
    for row, before in enumerate(offsets(cache, trace.batch, trace.start).tolist()):
        now, total, n = before, 0.0, 0
        for token, (executed, counts) in enumerate(zip(share[row].tolist(), counted[row].tolist(), strict=True)):
            if counts:
                total, n = total + executed, n + 1
                reach = (1 - (1 - gain * SLOPE) ** n) / SLOPE
                now = min(max(before + (total / n - asked) * reach, -LIMIT), LIMIT)
            moved[row, token] = now
    set_offsets(cache, trace.start, moved)
