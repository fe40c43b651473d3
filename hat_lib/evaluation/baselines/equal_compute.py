"""Equal work: turn a control's dial until it executes what was asked for.

A `Family` is a control with one dial, from nothing (0) to everything (1). `matched` returns the member that realises a
capacity on a text. It looks at the work alone, never at what the model predicts, so it may be given the very text that
is measured afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hat_lib.config import HatError, check_capacity
from hat_lib.model.policies import KeepAll, Policy
from hat_lib.model.transformer import HierarchicalTransformer

Blocks = Iterable[Sequence[int] | Mapping]
"""Text: token-id lists, or rows of `load_text`. All of it is run a few times: 2,000 tokens are enough."""
Family = Callable[[float], Policy]
"""A control for each setting of its dial in [0, 1]; it keeps more as the dial rises, and everything at 1."""


class OutOfReach(HatError):
    """This control cannot realise the capacity on this text: no reason to stop a sweep, but a row without a result."""


# `matched` stops here; a control further off than `TOLERANCE` is no control.
CLOSE, TOLERANCE, STEPS = 0.002, 0.01, 24
MIN_TOKENS = 256


def matched(hat: HierarchicalTransformer, family: Family, blocks: Blocks, capacity: float) -> Policy:
    """The member of ``family`` that realises ``capacity`` on ``blocks``, within 0.01 and mostly within 0.002.

    Protected tokens are part of it, so texts cut into much shorter blocks realise more. Raises `OutOfReach`
    for a capacity that no member of the family comes near, and another `HatError` for one outside [0.1, 1] and for a
    text of less than 256 tokens.
    """
    capacity, texts = check_capacity(capacity), text_tensors(hat, blocks)
    if capacity == 1.0:
        return KeepAll()
    low, high = (0.0, 0.0), (1.0, 1.0)  # (dial, realised) at both ends of the bracket
    best = (np.inf, np.nan, None)
    for _ in range(STEPS):
        # Where a straight line between the ends would cross, held off them so that the bracket always shrinks.
        step = float(np.clip((capacity - low[1]) / max(high[1] - low[1], 1e-9), 0.1, 0.9))
        dial = low[0] + step * (high[0] - low[0])
        policy = family(dial)
        realised = realised_capacity(hat, policy, texts)
        best = min(best, (abs(realised - capacity), realised, policy), key=lambda found: found[0])
        if best[0] <= CLOSE:
            break
        low, high = (low, (dial, realised)) if realised > capacity else ((dial, realised), high)
    if best[0] > TOLERANCE:
        raise OutOfReach(f"this control cannot realise capacity {capacity} on this text: its nearest is {best[1]:.3f}")
    return best[2]


@torch.no_grad()
def realised_capacity(hat: HierarchicalTransformer, policy: Policy, texts: Sequence[Tensor]) -> float:
    """Executed / routable work under ``policy`` without exits, over all tokens of ``texts`` (``[1, T]`` each)."""
    kept = 0.0
    with hat.dense(), hat.using(policy):
        for ids in texts:
            hat.lm.model(ids, use_cache=False)
            kept += hat.trace.capacity * ids.shape[1]
    return kept / sum(ids.shape[1] for ids in texts)


def for_site(keep: Tensor, site: str, x: Tensor) -> Tensor:
    """A decision per row, ``[n]``, in the shape that the site takes."""
    return keep if site == "ffn" else keep[:, None].expand_as(x)


def text_tensors(hat: HierarchicalTransformer, blocks: Blocks) -> list[Tensor]:
    """The blocks as int64 ``[1, T]`` on the model's device."""
    rows = [b["input_ids"] if isinstance(b, Mapping) else b for b in blocks]
    texts = [torch.as_tensor(b, device=hat.base.device).view(1, -1) for b in rows if len(b)]
    found = sum(t.shape[1] for t in texts)
    if found < MIN_TOKENS:
        raise HatError(f"a control is matched on at least {MIN_TOKENS} tokens of text, got {found}")
    return texts
