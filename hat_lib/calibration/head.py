"""What the head costs at less than its full work: the points that calibration chooses between.

Two things say how much of the head is run: how many channels the preview reads, and the margin below the best preview
within which a token is read in full (`hat_lib.model.head`). Several of both are tried on final states of the dense
model, and the KL divergence of each pair is measured, not modelled. The points on the lower convex hull, along which
both grow, are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.model.head import likely
from hat_lib.model.transformer import HierarchicalTransformer

SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.55)
"""of channels in the preview"""
MARGINS = (7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 15.0)
"""nats"""
TOKENS = 1024
SLICE = 128
"""rows of logits held at once"""


class HeadPoint(NamedTuple):
    """A way to run the head."""

    share: float
    """of its work, shortlist included"""
    kl: float
    """nats per token"""
    threshold: float
    margin: float


@torch.no_grad()
def head_points(hat: HierarchicalTransformer, blocks: Sequence[Tensor], progress: bool = True) -> list[HeadPoint]:
    """The hull of what `SHARES` and `MARGINS` make of the head, by rising work. Empty if all of them are more work
    than the head itself, as for a base that finds all tokens equally likely: the head is then to be read in full.

    ``blocks`` are int64 ``[1, T]``; about `TOKENS` of their tokens are used, evenly spaced.
    """
    lm, chosen = hat.lm, []
    each = max(1, TOKENS // len(blocks))
    with hat.dense():
        for block in tqdm(blocks, desc="final states", disable=not progress):
            states = lm.model(block, use_cache=False).last_hidden_state[0]
            chosen.append(states[np.linspace(0, len(states) - 1, min(each, len(states))).round().astype(int)])
        states = torch.cat(chosen)
        # A score is a magnitude times a norm: a shortlist at threshold 1 has cuts of one over the norms.
        scores = states.float().abs() / hat.shortlist(1.0, 0.0).threshold.to(states.device)
        thresholds = np.quantile(scores.cpu().numpy(), 1 - np.array(SHARES))
        work, kl = np.zeros((2, len(SHARES), len(MARGINS)))
        for rows in tqdm(states.split(SLICE), desc="the head", disable=not progress):
            full = lm.lm_head(rows)
            exact = F.log_softmax(full.float(), dim=-1)
            for s, threshold in enumerate(thresholds):
                keep = hat.shortlist(threshold, 0.0).keep(rows)
                preview = lm.lm_head(rows * keep)
                for m, margin in enumerate(MARGINS):
                    wanted = likely(preview, margin)
                    found = F.log_softmax(full.where(wanted, preview).float(), dim=-1)
                    kl[s, m] += float((exact.exp() * (exact - found)).sum())
                    work[s, m] += float(keep.float().mean(1).sum() + wanted.float().mean(1).sum())
    tried = [
        HeadPoint(work[s, m] / len(states), kl[s, m] / len(states), float(threshold), margin)
        for s, threshold in enumerate(thresholds)
        for m, margin in enumerate(MARGINS)
    ]
    return hull([point for point in tried if point.share < 1])


def hull(points: Sequence[HeadPoint]) -> list[HeadPoint]:
    """The lower convex hull of damage over work, from the least work to the least damage; thresholds only fall along
    it, and margins only rise."""
    kept: list[HeadPoint] = []
    for point in sorted(points):
        if kept and (point.kl >= kept[-1].kl or point.threshold > kept[-1].threshold or point.margin < kept[-1].margin):
            continue
        while len(kept) > 1 and _slope(kept[-1], point) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(point)
    return kept


def at_slope(points: Sequence[HeadPoint], slope: float) -> float:
    """The share up to which a unit of work lowers the damage by more than ``slope``."""
    for before, after in pairwise(points):
        if -_slope(before, after) < slope:
            return before.share
    return points[-1].share


def between(points: Sequence[HeadPoint], share: float) -> HeadPoint:
    """The point at ``share`` on the line through ``points``; beyond its ends, the nearest one."""
    table = np.array(points)
    return HeadPoint(*(float(np.interp(share, table[:, 0], column)) for column in table.T))


def _slope(before: HeadPoint, after: HeadPoint) -> float:
    return (after.kl - before.kl) / (after.share - before.share)
