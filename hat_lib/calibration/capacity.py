"""Calibrate on held-out text: the table that turns a capacity into thresholds.

For a ladder of budgets, `calibrate` sets thresholds, runs text, and notes the capacity and shares that come out. How a
budget is split over layers and sites is the ``split``:

    damage    (default, no training) the closed form of `allocate`, from the prices below
    uniform   every site keeps the same share
    learned   the thresholds that the routers were trained with (`calibrate_learned`)

The price of gating a site is the KL divergence that it causes, from one backward pass (`hat_lib.calibration.fisher`):
zeroing the channels with scores below a threshold changes the input x of a linear layer by -x there. At the channel
grain, an earlier pass measures how sensitive each token is (`hat_lib.calibration.token_sensitivity`), and the head is
one more site, whose KL divergence is measured directly (`hat_lib.calibration.head`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.calibration.fisher import backward
from hat_lib.calibration.head import HeadPoint, at_slope, between, head_points
from hat_lib.calibration.token_sensitivity import SHARE, TOKENS, fit_token_sensitivity
from hat_lib.config import HatError
from hat_lib.model.threshold_table import EXIT_TABLES, HEAD_TABLES, Calibration
from hat_lib.model.transformer import HierarchicalTransformer

# Shares at which the damage is priced; k and p of the damage model come from a line through them in log-log.
PROBE_SHARES = (0.45, 0.6, 0.75)
# A steeper or flatter line than this is noise: the exponent is at least 2, as the form itself is quadratic.
EXPONENT_RANGE = (2.0, 6.0)
QUANTILES = 65
BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
# Least share of a site in the damage split: nothing is ever switched off entirely.
FLOOR = 0.05
# Fewest tokens to calibrate on.
LEAST_TOKENS = 256
# Tokens that each budget is run on: a mean over all sites and tokens needs few.
CHECK_TOKENS = 4096
# Of these, at most this many in one forward: the overhead of a short block costs as much as its work.
TOGETHER = 1024
# Scores kept per site, drawn at random from all tokens and channels; enough for an error well under a thousandth.
SAMPLES = 200_000

SPLITS = ("damage", "uniform", "learned")

Split = Callable[[float], dict[tuple[int, str], float]]
"""budget in (0, 1) -> threshold of each gated (layer, site)"""
HeadSplit = Callable[[float], tuple[float, float, float] | None]
"""budget -> threshold, margin and expected share of the head; None reads it in full"""


def calibrate(
    hat: HierarchicalTransformer,
    blocks: Iterable[list[int]],
    *,
    split: str = "damage",
    token_sensitivity: bool = True,
    head: bool = True,
    probe_tokens: int = 4096,
    seed: int = 0,
    text: str = "",
    progress: bool = True,
) -> Calibration:
    """Measure ``hat`` on ``blocks`` of token ids, without training; sets and returns its calibration.

    Args:
        blocks: token-id lists from held-out text; about a fourth of it serves only the table of capacities.
        split: "damage" or "uniform", see the module's docstring.
        token_sensitivity: channel grain: measure which tokens lose more by gating; otherwise all are treated alike.
        head: channel grain: gate the head, too; otherwise it is read in full, and is not part of a capacity.
        probe_tokens: how many of the other tokens the backward pass sees, in whole blocks.
        seed: for the targets sampled from the base.
        text: what the blocks are, kept in the checkpoint.

    Raises `HatError` for a text with fewer than 256 tokens, or whose scores are all equal.
    """
    if split not in SPLITS[:2]:
        raise HatError(f"split must be {' or '.join(SPLITS[:2])}, got {split!r}")
    fit, check = held_out_parts(hat, blocks)
    with torch.no_grad():
        if hat.grain.logits:
            fit_token_routers(hat, fit, progress)
        for name, parameter in hat.routers.named_parameters():
            if "_token." in name:  # all tokens alike
                parameter.zero_()
        quantiles = score_quantiles(hat, fit, progress)
        if token_sensitivity and hat.grain.scales_thresholds:
            fit_token_sensitivity(hat, _spread(fit, TOKENS), quantiles.cuts(SHARE), seed, progress)
            quantiles = score_quantiles(hat, fit, progress)
        work = np.tile(hat.site_work, (hat.config.n_layers, 1))
        points = head_points(hat, fit, progress) if head and hat.grain.has_shortlist else []
        if split == "damage":
            damage = _fit_damage(_damage(hat, _spread(fit, probe_tokens), quantiles, seed, progress))
            always = [[hat.grain.always_runs(i, s) for s in hat.grain.sites] for i in range(hat.config.n_layers)]
            work[np.array(always)] = 1e-12
    head_work = hat.head_work if points else 0.0
    whole = work.sum() + head_work

    @lru_cache
    def split_at(budget: float) -> tuple[np.ndarray, HeadPoint | None]:
        if split == "damage":
            return allocate(damage[0], work / whole, budget, damage[1], FLOOR, points, head_work / whole)
        return np.full_like(work, budget), between(points, budget) if points else None

    def at(budget: float) -> dict[tuple[int, str], float]:
        shares = split_at(budget)[0]
        return {(i, s): quantiles.threshold((i, s), shares[i, hat.grain.sites.index(s)]) for i, s in quantiles.tables}

    def head_at(budget: float) -> tuple[float, float, float] | None:
        point = split_at(budget)[1]
        return point and (point.threshold, point.margin, point.share)

    text = f"{text}; quantiles of {quantiles.scores} scores a site from {quantiles.tokens} tokens".removeprefix("; ")
    return _set_table(hat, at, head_at, check, split, text, progress)


def calibrate_learned(
    hat: HierarchicalTransformer,
    blocks: Iterable[list[int]],
    split: Split,
    head: HeadSplit,
    *,
    text: str = "",
    progress: bool = True,
) -> Calibration:
    """Like `calibrate`, for trained routers: ``split`` gives the thresholds that they were trained with, ``head`` the
    head's. Nothing is fitted, so the table is measured on all of ``blocks``, which training must not have read."""
    return _set_table(hat, split, head, _checking(hat, blocks), "learned", text, progress)


def recalibrate(
    hat: HierarchicalTransformer, blocks: Iterable[list[int]], *, text: str = "", progress: bool = True
) -> Calibration:
    """Measure on other ``blocks`` what each row of the table of ``hat`` realises; sets and returns the new table.

    Only capacities and shares change. Each row runs with corrections at the strength that belongs to its budget. Raises
    `HatError` for a table that does not have a row for each of `BUDGETS`, or fewer than 256 tokens.
    """
    old = hat.calibration
    if old is None or len(old.capacities) != len(BUDGETS) + 1:
        found = f"one of {len(old.capacities)}" if old else "none"
        raise HatError(f"expected a calibration of {len(BUDGETS) + 1} capacities to measure again, got {found}")
    keys = [(i, s) for i in range(hat.config.n_layers) for s in old.sites]
    rows = np.reshape(old.thresholds, (len(keys), -1)).T[:-1]
    splits = [dict(zip(keys, row.tolist(), strict=True)) for row in rows]
    heads = list(zip(*(getattr(old, name)[:-1] for name in HEAD_TABLES), strict=True)) if hat.gates_head else None
    realised = _realised(hat, splits, heads or [None] * len(rows), _checking(hat, blocks), progress)
    hat.calibration = replace(old, **realised, text=text)
    return hat.calibration


def allocate(
    sensitivity: np.ndarray,
    work: np.ndarray,
    budget: float,
    exponent: np.ndarray,
    floor: float,
    points: Sequence[HeadPoint] = (),
    head_work: float = 0.0,
) -> tuple[np.ndarray, HeadPoint | None]:
    """The share that each site keeps under one budget, and the point at which the head runs.

    Shares in [floor, 1], of the same shape as the arrays, that minimise ``sum k (1-s)^p + KL_h`` subject to
    ``sum w s + w_h s_h = budget`` (k ``sensitivity``, p ``exponent``, w ``work`` and w_h ``head_work``, 1 in all; KL_h
    and s_h are the head's, on the line through ``points``, if there are any).

    Lagrange's method gives ``1 - s_i = (lambda w_i / (p_i k_i))^(1/(p_i-1))``, clipped, and the point at which the
    head's line has slope ``lambda w_h``; lambda is found by bisection. Every site's share grows with the budget; a site
    with zero sensitivity gets the floor.
    """
    k = np.maximum(sensitivity, 1e-12)

    def shares(log_lambda: float) -> tuple[np.ndarray, float]:
        of_sites = np.clip(1 - np.exp((log_lambda + np.log(work / (exponent * k))) / (exponent - 1)), floor, 1.0)
        return of_sites, at_slope(points, np.exp(log_lambda) * head_work) if points else 1.0

    low, high = -80.0, 80.0  # of log lambda; the kept work falls as lambda grows
    for _ in range(100):
        middle = (low + high) / 2
        of_sites, of_head = shares(middle)
        low, high = (middle, high) if (work * of_sites).sum() + head_work * of_head > budget else (low, middle)
    of_sites, _ = shares(high)
    left = (budget - (work * of_sites).sum()) / head_work if points else 1.0
    return of_sites, between(points, left) if points else None


@torch.no_grad()
def _set_table(
    hat: HierarchicalTransformer, split: Split, head: HeadSplit, blocks: list[Tensor], method: str, text: str, progress
) -> Calibration:
    """Run each of `BUDGETS` on ``blocks``, split by ``split`` and ``head``, and set the table; exit tables are kept."""
    sites = hat.grain.sites
    splits, heads = [split(budget) for budget in BUDGETS], [head(budget) for budget in BUDGETS]
    realised = _realised(hat, splits, heads, blocks, progress)
    # A site that always runs is never asked; any finite number will do.
    thresholds = [[[cuts.get((i, s), 0.0) for s in sites] for i in range(hat.config.n_layers)] for cuts in splits]
    # At 1.0 even the lowest score is kept: magnitudes end at 0, logits somewhere below the last threshold.
    last = np.asarray(thresholds[-1])
    everything = last - (1 + np.abs(last)) if hat.grain.logits else np.zeros_like(last)
    thresholds = _rounded(np.stack([*np.minimum.accumulate(thresholds), everything], -1))
    found = Calibration(sites=list(sites), thresholds=thresholds, method=method, text=text, **realised)
    if all(heads):
        cuts, margins, _ = zip(*heads, strict=True)
        tables = [*np.minimum.accumulate(cuts), 0.0], [*np.maximum.accumulate(margins), max(margins)]
        found = replace(found, **{name: _rounded(t) for name, t in zip(HEAD_TABLES[:2], tables, strict=True)})
    if old := hat.calibration:
        found = replace(found, **{name: getattr(old, name) for name in EXIT_TABLES})
    hat.calibration = found
    return found


@torch.no_grad()
def _realised(hat, splits: Sequence[dict], heads: Sequence[tuple | None], blocks: list[Tensor], progress) -> dict:
    """The columns of a table that are measured on ``blocks``, by name, from the thresholds for each of `BUDGETS`."""
    capacities, shares, head_shares = [], [], []
    rows = zip(BUDGETS, splits, heads, strict=True)
    for budget, chosen, of_head in tqdm(rows, desc="capacities", total=len(BUDGETS), disable=not progress):
        kept, capacity, head_share, tokens = 0.0, 0.0, 0.0, 0
        shortlist = of_head and hat.shortlist(*of_head)
        corrected = hat.correcting(hat.correction_strength(budget))
        with hat.dense(), hat.using(hat.threshold_policy(chosen)), corrected, hat.shortlisting(shortlist):
            for size in forwards(hat, blocks, logits=0 if of_head else 1):
                kept = kept + hat.trace.site_share.flatten(2).sum(-1).double().cpu().numpy()
                capacity += hat.trace.capacity * size
                head_share += hat.trace.head_share * size
                tokens += size
        capacities.append(min(1.0, capacity / tokens))  # a shortlist may be long on text that the base does not know
        shares.append(kept / tokens)
        head_shares.append(head_share / tokens)
    found = {
        "capacities": [*np.maximum.accumulate(np.round(capacities, 5)).tolist(), 1.0],
        "shares": _rounded(np.stack([*shares, np.ones_like(shares[-1])], -1)),
    }
    return found | ({"head_shares": _rounded([*head_shares, 1])} if all(heads) else {})


def forwards(hat, blocks: Iterable[Tensor], label: str = "", progress: bool = False, logits: int = 1) -> Iterator[int]:
    """Run each of ``blocks`` (``[B, T]``) and yield its number of tokens; ``logits`` is how many to keep, 0 for all."""
    for block in tqdm(blocks, desc=label, disable=not progress):
        hat.lm(block, use_cache=False, logits_to_keep=logits)
        yield block.numel()


def held_out_parts(hat, blocks) -> tuple[list[Tensor], list[Tensor]]:
    """Text to measure scores and prices on, in blocks ``[1, T]``, and other text to see what they realise, in batches
    ``[B, T]``: every fourth block or, where that is less than an eighth of the tokens, the last quarter of each."""
    blocks = _tensors(hat, blocks)
    fit, check = [b for i, b in enumerate(blocks) if i % 4 != 3], blocks[3::4]
    if 8 * _size(check) < _size(blocks):
        fit, check = zip(*(b.tensor_split([3 * b.shape[1] // 4], 1) for b in blocks), strict=True)
    return list(fit), _together(_spread(check, CHECK_TOKENS))


def _checking(hat, blocks) -> list[Tensor]:
    """Batches ``[B, T]`` to see what is realised, where nothing is fitted."""
    return _together(_spread(_tensors(hat, blocks), CHECK_TOKENS))


def _tensors(hat, blocks) -> list[Tensor]:
    blocks = [torch.tensor([b], device=hat.base.device) for b in blocks if len(b) > 1]
    if _size(blocks) < LEAST_TOKENS:
        raise HatError(f"calibration needs at least {LEAST_TOKENS} tokens of text, got {_size(blocks)}")
    return blocks


def _size(blocks: Iterable[Tensor]) -> int:
    return sum(b.numel() for b in blocks)


def _together(blocks: list[Tensor]) -> list[Tensor]:
    """Blocks of the same length as batches of at most `TOGETHER` tokens."""
    found, length = [], Tensor.numel
    for size, alike in groupby(sorted(blocks, key=length), length):
        found += torch.cat(list(alike)).split(max(1, TOGETHER // size))
    return found


class ScoreQuantiles(NamedTuple):
    """The dense model's scores, as a threshold for each share to keep."""

    tables: dict[tuple[int, str], np.ndarray]
    """scores at evenly spaced quantiles, by (layer, site)"""
    tokens: int
    """that the scores were drawn from"""
    scores: int
    """drawn at the site with most of them"""

    def threshold(self, key: tuple[int, str], share: float) -> float:
        """The threshold that keeps ``share`` of a site's scores."""
        table = self.tables[key]
        return float(np.interp(1 - share, np.linspace(0, 1, len(table)), table))

    def cuts(self, share: float) -> dict[tuple[int, str], float]:
        """Thresholds that keep the same share at every site."""
        return {key: self.threshold(key, share) for key in self.tables}


@torch.no_grad()
def score_quantiles(
    hat: HierarchicalTransformer, blocks: list[Tensor], progress: bool = True, seed: int = 0
) -> ScoreQuantiles:
    """Run the dense model over ``blocks`` (``[1, T]`` each), drawing up to `SAMPLES` scores per site at random.

    Both rows and channels are drawn from the whole text: on a wide base, a stride would take one token per block.
    Protected tokens are left out. Raises `HatError` if all scores are equal (token routers that were never fitted).
    """
    total, drawn = sum(b.shape[1] for b in blocks), np.random.default_rng(seed)
    found: dict[tuple[int, str], list[Tensor]] = {}
    tokens = 0

    def collect(layer, site, x, rows, state):
        score = hat.scores(layer, site, x)[~state.protected.view(-1)].flatten()
        wanted = math.ceil(SAMPLES * x.shape[0] / total)
        if wanted < len(score):
            score = score[torch.from_numpy(drawn.integers(len(score), size=wanted)).to(score.device)]
        found.setdefault((layer, site), []).append(score)

    with hat.dense(), hat.using(collect):
        for _ in forwards(hat, blocks, "scores", progress):
            tokens += int((~hat.trace.protected).sum())
    grid = np.linspace(0, 1, QUANTILES)
    kept = {key: torch.cat(scores).cpu().numpy() for key, scores in found.items()}
    tables = {key: np.quantile(scores, grid) for key, scores in kept.items()}
    if all(q[0] == q[-1] for q in tables.values()):
        raise HatError("every router score is equal, so no threshold can tell tokens apart: train or fit the routers")
    return ScoreQuantiles(tables, tokens, max(map(len, kept.values())))


def _damage(hat, blocks, quantiles, seed: int, progress) -> np.ndarray:
    """Predicted KL in nats per token of gating each site alone, ``[len(PROBE_SHARES), L, S]``."""
    sites = hat.grain.sites
    cuts = {key: [quantiles.threshold(key, share) for share in PROBE_SHARES] for key in quantiles.tables}
    total = torch.zeros(len(PROBE_SHARES), hat.config.n_layers, len(sites), dtype=torch.float64)

    def price(layer: int, site: str, x: Tensor, value: Tensor):
        if (layer, site) not in cuts:  # it always runs
            return None
        free, score = ~hat.trace.protected.view(-1), hat.scores(layer, site, x)

        def use(gradient: Tensor) -> None:
            first_order = (value * gradient).float()
            first_order = first_order.view(*score.shape, -1).sum(-1)  # of each unit
            for row, cut in zip(total, cuts[layer, site], strict=True):
                change = first_order * (score <= cut)
                change = change if change.dim() == 1 else change.sum(-1)
                row[layer, sites.index(site)] += change[free].double().pow(2).sum().item() / 2

        return use

    tokens = backward(hat, blocks, price, seed=seed, progress=progress, label="prices of sites")
    return total.numpy() / tokens


def _fit_damage(damage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k and p of ``k (1 - s)^p`` per site, ``[L, S]`` each, by least squares in log-log; the smallest k for a site that
    was not priced because it always runs."""
    x = np.log(1 - np.asarray(PROBE_SHARES))
    y = np.log(np.maximum(damage, 1e-12)).reshape(len(x), -1)
    p = np.clip(np.polyfit(x, y, 1)[0], *EXPONENT_RANGE)
    log_k = (y - p * x[:, None]).mean(0)
    shape = damage.shape[1:]
    return np.exp(log_k).round(9).reshape(shape), p.round(4).reshape(shape)


def fit_token_routers(hat: HierarchicalTransformer, blocks, progress: bool = True) -> None:
    """Closed-form start for untrained token routers: ridge regression of log ||FFN(x)|| on the router's input x. The
    published method trains them from scratch; this gives an untrained calibration something to rank by."""
    if any(router.weight.any() for router in hat.routers.values()):
        return
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def see(layer: int, site: str, x: Tensor, out: Tensor) -> None:
        x, out = x.flatten(0, -2).float(), out.flatten(0, -2).float()
        rows.setdefault(f"{layer}_{site}", []).append((x, out.norm(dim=-1).clamp(min=1e-6).log()))

    with hat.dense(), hat.watching(see):
        list(forwards(hat, blocks, "token routers", progress))
    for name, pairs in rows.items():
        x, y = torch.cat([a for a, _ in pairs]).double(), torch.cat([b for _, b in pairs]).double()
        mean_x, mean_y = x.mean(0), y.mean()
        centred = x - mean_x
        gram = centred.T @ centred
        ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + ridge, centred.T @ (y - mean_y))
        with torch.no_grad():
            hat.routers[name].weight.copy_(weight)
            hat.routers[name].bias.copy_(mean_y - mean_x @ weight)


def _spread(blocks: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """About ``tokens`` tokens in whole blocks, evenly spaced."""
    count = min(max(1, round(len(blocks) * tokens / _size(blocks))), len(blocks))
    return [blocks[i] for i in np.linspace(0, len(blocks) - 1, count).round().astype(int)]


def _rounded(table: np.ndarray) -> list:
    """To five significant digits, for JSON that a person can read."""
    return np.vectorize(lambda v: float(f"{v:.5g}"))(table).tolist()
