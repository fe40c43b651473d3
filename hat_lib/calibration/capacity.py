"""Calibrate on held-out text: the table that turns a capacity into thresholds.

`measure_capacities` makes it: for a ladder of budgets it sets thresholds, runs text, and notes which capacity and
shares came out. How a budget is split over layers and sites is the ``split``:

    damage    (default, no training) the closed form of `hat_lib.calibration.allocation`, from the prices below
    uniform   every site keeps the same share
    learned   the thresholds that the routers were trained with

The price of gating a site is the KL divergence that it causes, by one backward pass (`hat_lib.calibration.fisher`):
zeroing the channels with scores under a threshold changes the input x of a linear layer by -x there. At the channel
grain another pass comes before, which measures how sensitive each token is (`hat_lib.calibration.token_sensitivity`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.calibration.allocation import allocate
from hat_lib.calibration.fisher import backward
from hat_lib.calibration.token_sensitivity import SHARE, TOKENS, clear_token_sensitivity, fit_token_sensitivity
from hat_lib.config import HatError
from hat_lib.model.routers import MoERouter
from hat_lib.model.threshold_table import Calibration
from hat_lib.model.transformer import HierarchicalTransformer

# Shares at which the damage is priced; k and p of the damage model are a line through them in log-log.
PROBE_SHARES = (0.45, 0.6, 0.75)
# A steeper or flatter line than this is noise: a quadratic is the least, as the form itself is one.
EXPONENT_RANGE = (2.0, 6.0)
QUANTILES = 65
BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
# Least share of a site in the damage split: nothing is ever switched off for good.
FLOOR = 0.05
# Tokens that each budget is run on: a mean over every site and token, it needs few.
CHECK_TOKENS = 4096
# Scores kept per site, drawn at random from all tokens and channels; enough for an error well under a thousandth.
SAMPLES = 200_000


SPLITS = ("damage", "uniform", "learned")

Split = Callable[[float], dict[tuple[int, str], float]]
"""budget in (0, 1) -> threshold of each gated (layer, site)"""


def calibrate(
    hat: HierarchicalTransformer,
    blocks: Iterable[list[int]],
    *,
    split: str = "damage",
    token_sensitivity: bool = True,
    probe_tokens: int = 4096,
    seed: int = 0,
    text: str = "",
    progress: bool = True,
) -> Calibration:
    """Measure ``hat`` on ``blocks`` of token ids, without training; sets and returns its calibration.

    Args:
        blocks: token-id lists from held-out text; every fourth one serves the table of capacities alone.
        split: "damage" or "uniform", see the module's docstring.
        token_sensitivity: channel grain: measure which tokens lose more by gating; otherwise all are treated alike.
        probe_tokens: how many of the other tokens the backward pass sees, in whole blocks.
        seed: for the targets sampled from the base.
        text: what the blocks are, kept in the checkpoint.

    Raises `HatError` for a text with less than 256 tokens, or whose scores are all equal (token routers
    that were never fitted).
    """
    if split not in SPLITS[:2]:
        raise HatError(f"split must be {' or '.join(SPLITS[:2])}, got {split!r}")
    fit, check = held_out_parts(hat, blocks)
    with torch.no_grad():
        if hat.config.granularity == "token":
            fit_token_routers(hat, fit, progress)
        else:
            clear_token_sensitivity(hat)
        quantiles = score_quantiles(hat, fit, progress)
        if token_sensitivity and hat.config.granularity == "channel":
            fit_token_sensitivity(hat, _spread(fit, TOKENS), quantiles.cuts(SHARE), seed, progress)
            quantiles = score_quantiles(hat, fit, progress)
        if split == "damage":
            damage = _damage(hat, _spread(fit, probe_tokens), quantiles, seed, progress)
            shares = partial(_damage_shares, hat, *_fit_damage(damage))
        else:
            shares = partial(np.full, (hat.config.n_layers, len(hat.grain.sites)))
    at = partial(_at_shares, hat, quantiles, shares)
    text = f"{text}; quantiles of {quantiles.scores} scores a site from {quantiles.tokens} tokens".removeprefix("; ")
    return _set(hat, measure_capacities(hat, at, check, method=split, text=text, progress=progress))


def calibrate_learned(
    hat: HierarchicalTransformer, blocks: Iterable[list[int]], split: Split, *, text: str = "", progress: bool = True
) -> Calibration:
    """As `calibrate`, for trained routers: ``split`` gives the thresholds that they were trained with."""
    _, check = held_out_parts(hat, blocks)
    return _set(hat, measure_capacities(hat, split, check, method="learned", text=text, progress=progress))


def _set(hat: HierarchicalTransformer, calibration: Calibration) -> Calibration:
    """Put it in place; the tables of exits, which another calibration measures, stay."""
    if old := hat.calibration:
        exits = {name: getattr(old, name) for name in ("exit_capacities", "exit_rates", "exit_scores")}
        calibration = replace(calibration, **exits)
    hat.calibration = calibration
    return calibration


@torch.no_grad()
def measure_capacities(
    hat: HierarchicalTransformer, split: Split, blocks: list[Tensor], *, method: str, text: str, progress: bool = True
) -> Calibration:
    """The table: each of `BUDGETS` through ``split``, run on ``blocks`` (``[1, T]`` each)."""
    sites = hat.grain.sites
    thresholds, shares, capacities = [], [], []
    for budget in tqdm(BUDGETS, desc="capacities", disable=not progress):
        chosen = split(budget)
        kept, capacity, tokens = 0.0, 0.0, 0
        with hat.dense(), hat.using(hat.threshold_policy(chosen)):
            for block in blocks:
                hat.lm(block, use_cache=False, logits_to_keep=1)
                kept = kept + hat.trace.site_share.flatten(2).sum(-1).double().cpu().numpy()
                capacity += hat.trace.capacity * block.shape[1]
                tokens += block.shape[1]
        capacities.append(capacity / tokens)
        shares.append(kept / tokens)
        # A site that always runs is never asked; any finite number stands for it.
        thresholds.append([[chosen.get((i, s), 0.0) for s in sites] for i in range(hat.config.n_layers)])
    # At 1.0 the lowest score is kept: magnitudes end at 0, a token router's scores a little below the last threshold.
    last = np.asarray(thresholds[-1])
    everything = np.zeros_like(last) if hat.config.granularity == "channel" else last - (1 + np.abs(last))
    return Calibration(
        sites=list(sites),
        capacities=[*np.maximum.accumulate(np.round(capacities, 5)).tolist(), 1.0],
        thresholds=_rounded(np.stack([*np.minimum.accumulate(thresholds), everything], -1)),
        shares=_rounded(np.stack([*shares, np.ones_like(last)], -1)),
        method=method,
        text=text,
    )


def held_out_parts(hat, blocks) -> tuple[list[Tensor], list[Tensor]]:
    """Blocks to measure scores and prices on, and blocks to see what they realise."""
    blocks = [torch.tensor([b], device=hat.base.device) for b in blocks if len(b) > 1]
    total = sum(b.shape[1] for b in blocks)
    if total < 256:
        raise HatError(f"calibration needs at least 256 tokens of text, got {total}")
    fit = [b for i, b in enumerate(blocks) if i % 4 != 3]
    return fit, _spread(blocks[3::4] or blocks[-1:], CHECK_TOKENS)


def _damage_shares(hat, sensitivity: np.ndarray, exponent: np.ndarray, budget: float) -> np.ndarray:
    work = np.tile(hat.site_work, (hat.config.n_layers, 1))
    if hat.config.granularity == "token":
        work[0] = 1e-12  # layer 0's FFN always runs
    return allocate(sensitivity, work / work.sum(), budget, exponent, FLOOR)


def _at_shares(hat, quantiles, shares: Callable[[float], np.ndarray], budget: float) -> dict[tuple[int, str], float]:
    """Thresholds that keep the given share of the dense model's scores at each site."""
    table = shares(budget)
    return {(i, s): quantiles.cut((i, s), table[i, hat.grain.sites.index(s)]) for i, s in quantiles.tables}


@dataclass(frozen=True)
class ScoreQuantiles:
    """The dense model's scores, as a threshold for each share to keep."""

    tables: dict[tuple[int, str], np.ndarray]
    """scores at evenly spaced quantiles, by (layer, site)"""
    tokens: int
    """that the scores were drawn from"""
    scores: int
    """drawn at the site with most of them"""

    def cut(self, key: tuple[int, str], share: float) -> float:
        """The threshold that keeps ``share`` of a site's scores."""
        table = self.tables[key]
        return float(np.interp(1 - share, np.linspace(0, 1, len(table)), table))

    def cuts(self, share: float) -> dict[tuple[int, str], float]:
        """The same share at every site."""
        return {key: self.cut(key, share) for key in self.tables}


@torch.no_grad()
def score_quantiles(
    hat: HierarchicalTransformer, blocks: list[Tensor], progress: bool = True, seed: int = 0
) -> ScoreQuantiles:
    """Run the dense model over ``blocks`` (``[1, T]`` each), drawing up to `SAMPLES` scores a site at random.

    Rows and channels alike are drawn from the whole text: a stride would take one token of a block on a wide base.
    Protected tokens are left out. Raises `HatError` if all scores are equal.
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
        for block in tqdm(blocks, desc="scores", disable=not progress):
            hat.lm(block, use_cache=False, logits_to_keep=1)
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
    cuts = {key: [quantiles.cut(key, share) for share in PROBE_SHARES] for key in quantiles.tables}
    total = torch.zeros(len(PROBE_SHARES), hat.config.n_layers, len(sites), dtype=torch.float64)

    def price(layer: int, site: str, x: Tensor, value: Tensor):
        if (layer, site) not in cuts:  # it always runs
            return None
        free, score = ~hat.trace.protected.view(-1), hat.scores(layer, site, x)

        def use(gradient: Tensor) -> None:
            first_order = (value * gradient).float()
            if score.dim() == 1:
                first_order = first_order.sum(-1)
            for row, cut in zip(total, cuts[layer, site], strict=True):
                change = first_order * (score <= cut)
                change = change if change.dim() == 1 else change.sum(-1)
                row[layer, sites.index(site)] += change[free].double().pow(2).sum().item() / 2

        return use

    tokens = backward(hat, blocks, price, seed=seed, progress=progress, label="prices of sites")
    return total.numpy() / tokens


def _fit_damage(damage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k and p of ``k (1 - s)^p`` per site, ``[L, S]`` each, by least squares in log-log.

    A site that was never priced, because it always runs, gets the smallest k."""
    x = np.log(1 - np.asarray(PROBE_SHARES))
    y = np.log(np.maximum(damage, 1e-12)).reshape(len(x), -1)
    p = np.clip(np.polyfit(x, y, 1)[0], *EXPONENT_RANGE)
    log_k = (y - p * x[:, None]).mean(0)
    shape = damage.shape[1:]
    return np.exp(log_k).round(9).reshape(shape), p.round(4).reshape(shape)


def fit_token_routers(hat: HierarchicalTransformer, blocks, progress: bool = True) -> None:
    """Closed-form start for token routers: ridge regression of log ||FFN(x)|| on the router's input x.

    The published method trains them from scratch; this gives an untrained calibration something to rank by.
    Routers that already carry weights are left alone.
    """
    routers = [hat.routers[f"{i}_ffn"] for i in range(hat.config.n_layers)]
    if any(bool(r.weight.any()) for r in routers):
        return
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def see(layer: int, site: str, x: Tensor, out: Tensor) -> None:
        x, out = x.flatten(0, -2).float(), out.flatten(0, -2).float()
        rows.setdefault(layer, []).append((x, out.norm(dim=-1).clamp(min=1e-6).log()))

    with hat.dense(), hat.watching(see):
        for block in tqdm(blocks, desc="token routers", disable=not progress):
            hat.lm(block, use_cache=False, logits_to_keep=1)
    for index, pairs in rows.items():
        x, y = torch.cat([a for a, _ in pairs]).double(), torch.cat([b for _, b in pairs]).double()
        mean_x, mean_y = x.mean(0), y.mean()
        centred = x - mean_x
        gram = centred.T @ centred
        ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + ridge, centred.T @ (y - mean_y))
        router: MoERouter = routers[index]
        with torch.no_grad():
            router.weight.copy_(weight)
            router.bias.copy_(mean_y - mean_x @ weight)


def _spread(blocks: list[Tensor], tokens: int) -> list[Tensor]:
    """About ``tokens`` tokens of whole blocks, taken at even distances."""
    count = max(1, round(len(blocks) * tokens / sum(b.shape[1] for b in blocks)))
    picks = np.linspace(0, len(blocks) - 1, min(count, len(blocks))).round().astype(int)
    return [blocks[i] for i in picks]


def _rounded(table: np.ndarray) -> list:
    """To five significant digits, for JSON that a person can read."""
    return np.vectorize(lambda v: float(f"{v:.5g}"))(table).tolist()
