"""How a budget is split over sites and the head, by what skipping each of them costs.

Prices are KL divergences from the base, in nats per token. A site's is a curve over the share that it keeps, from a few
shares that a backward pass prices (`token_sensitivity.backward`): zeroing the channels with scores below a threshold
changes the input x of a linear layer by -x there. The head's is measured: several numbers of channels in the preview
and several margins (`hat_lib.method.head`) are tried on final states of the dense model; the lower convex hull is kept.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.calibration.quantiles import ScoreQuantiles
from hat_lib.calibration.token_sensitivity import backward
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.head import likely
from hat_lib.text.blocks import evenly

PROBE_SHARES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75)  # where damage is priced
FITTED = slice(-3, None)  # those of them that ``k (1 - s)^p`` is fitted to
EXPONENT_RANGE = (2.0, 6.0)  # of p: a steeper or flatter law is noise, and the form itself is quadratic
FLOOR, STEP = 0.05, 0.01  # least share of a site, so that none is ever switched off, and the steps in which shares rise
SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.55)  # of channels in the preview of the head, and
MARGINS = (7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 15.0)  # in nats, that are tried on so many tokens
HEAD_TOKENS = 1024
SLICE = 128  # rows of logits held at once


class HeadPoint(NamedTuple):
    """A way to run the head."""

    share: float  #: of its work, shortlist included
    kl: float  #: nats per token
    threshold: float
    margin: float


def allocate(
    curves: np.ndarray, work: np.ndarray, budget: float, points: Sequence[HeadPoint] = (), head_work: float = 0.0
) -> tuple[np.ndarray, HeadPoint | None]:
    """The share that each site keeps under one budget, and the point at which the head runs.

    Shares that minimise ``sum damage(s) + KL_h`` subject to ``sum w s + w_h s_h = budget``. The damage of sites is that
    of ``curves``, as from `damage_curves`; w is ``work [L, S]`` and w_h ``head_work``, 1 in all; KL_h and s_h are the
    head's, on the line through ``points``, if there are any.

    By Lagrange's method each site keeps all steps that lower its damage by more than ``lambda w`` a unit, and the head
    runs where its line has slope ``lambda w_h``; lambda is found by bisection.
    """
    slopes = -np.diff(curves) / STEP

    def shares(log_lambda: float) -> tuple[np.ndarray, float]:
        """Of sites, and the work in all."""
        price = np.exp(log_lambda)
        of_sites = FLOOR + STEP * (slopes > price * work[..., None]).sum(-1)
        return of_sites, (work * of_sites).sum() + head_work * (at_slope(points, price * head_work) if points else 1.0)

    low, high = -80.0, 80.0  # of log lambda; the kept work falls as lambda grows
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle)[1] > budget else (low, middle)
    (more, most), (less, least) = shares(low), shares(high)  # a few steps apart, all at one price
    of_sites = less + (more - less) * np.clip((budget - least) / max(most - least, 1e-12), 0, 1)
    return of_sites, between(points, (budget - (work * of_sites).sum()) / head_work) if points else None


def site_damage(
    hat, blocks: Sequence[Tensor], quantiles: ScoreQuantiles, seed: int = 0, progress: bool = True
) -> np.ndarray:
    """Predicted KL in nats per token of gating each site alone, ``[len(PROBE_SHARES), L, S]``."""
    sites = hat.grain.sites
    thresholds = {key: [quantiles.threshold(key, share) for share in PROBE_SHARES] for key in quantiles.tables}
    total = np.zeros((len(PROBE_SHARES), hat.config.n_layers, len(sites)))

    def price(layer: int, site: str, x: Tensor, score: Tensor, effect: Tensor) -> None:
        for row, threshold in enumerate(thresholds.get((layer, site), ())):  # none where a site always runs
            change = (effect * (score <= threshold)).view(len(x), -1).sum(-1)
            total[row, layer, sites.index(site)] += change.double().pow(2).sum().item() / 2

    return total / backward(hat, blocks, price, seed=seed, progress=progress, label="prices of sites")


def damage_curves(damage: np.ndarray) -> np.ndarray:
    """Damage at shares from `FLOOR` to 1 in steps of `STEP`, convex and 0 at 1, ``[L, S, G]``, from that at
    `PROBE_SHARES`, ``[P, L, S]``.

    Over the last three, and beyond, it is ``k (1 - s)^p``, by least squares in log-log, which misses most of the damage
    at low shares; so below them it runs through what was measured, exponentially from one share to the next.
    """
    shares, probes = np.linspace(FLOOR, 1, round((1 - FLOOR) / STEP) + 1), np.array(PROBE_SHARES)
    logs = np.log(np.maximum(damage, 1e-12)).reshape(len(probes), -1)
    x, y = np.log(1 - probes[FITTED]), logs[FITTED]
    p = np.clip(np.polyfit(x, y, 1)[0], *EXPONENT_RANGE)
    fitted = (y - p * x[:, None]).mean(0) + p * np.log(np.maximum(1 - shares, 1e-12))[:, None]
    at = np.searchsorted(shares, probes[FITTED][0] - STEP / 2)
    low = np.concatenate([logs[: FITTED.start], fitted[at][None]])
    below = np.array([np.interp(shares[:at], probes[: len(low)], row) for row in low.T]).T
    curves = np.exp(np.concatenate([below, fitted[at:]]))
    falls = np.maximum(-np.diff(curves, axis=0), 0)[::-1]  # from the end, and never slower than nearer to it
    rising = np.cumsum(np.maximum.accumulate(falls, axis=0), axis=0)
    curves = np.concatenate([np.zeros_like(rising[:1]), rising])[::-1]
    return curves.T.reshape(*damage.shape[1:], -1)


@torch.no_grad()
def head_points(hat: HierarchicalTransformer, blocks: Sequence[Tensor], progress: bool = True) -> list[HeadPoint]:
    """The hull of what `SHARES` and `MARGINS` make of the head, by rising work, on about `HEAD_TOKENS` evenly spaced
    tokens of ``blocks``, int64 ``[1, T]``. Empty if all are more work than the head in full, as for a base that finds
    all tokens equally likely.
    """
    lm, chosen = hat.lm, []
    with hat.dense():
        for block in tqdm(blocks, desc="final states", disable=not progress):
            states = lm.model(block, use_cache=False).last_hidden_state[0]
            chosen += evenly(states, HEAD_TOKENS // len(blocks))
        states = torch.stack(chosen)
        # A score is a magnitude times a norm: a shortlist at threshold 1 has thresholds of one over the norms.
        scores = states.float().abs() / (1.0 / hat.head_norm).to(states.device)
        thresholds = np.unique(np.quantile(scores.cpu().numpy(), 1 - np.array(SHARES))).tolist()
        sums = {(threshold, margin): np.zeros(2) for threshold in thresholds for margin in MARGINS}
        for rows in tqdm(states.split(SLICE), desc="the head", disable=not progress):
            full = lm.lm_head(rows)
            exact = F.log_softmax(full.float(), dim=-1)
            for threshold in thresholds:
                keep = rows.abs() > (threshold / hat.head_norm).to(rows.device)
                preview = lm.lm_head(rows * keep)
                for margin in MARGINS:
                    wanted = likely(preview, margin)
                    found = F.log_softmax(full.where(wanted, preview).float(), dim=-1)
                    work = float(keep.float().mean(1).sum() + wanted.float().mean(1).sum())
                    sums[threshold, margin] += work, float((exact.exp() * (exact - found)).sum())
    tried = [HeadPoint(*(total / len(states)).tolist(), *setting) for setting, total in sums.items()]
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
    steep = [after.share for before, after in pairwise(points) if -_slope(before, after) >= slope]
    return max(steep, default=points[0].share)


def between(points: Sequence[HeadPoint], share: float) -> HeadPoint:
    """The point at ``share`` on the line through ``points``; beyond its ends, the nearest one."""
    table = np.array(points)
    return HeadPoint(*(float(np.interp(share, table[:, 0], column)) for column in table.T))


def _slope(before: HeadPoint, after: HeadPoint) -> float:
    return (after.kl - before.kl) / (after.share - before.share)
