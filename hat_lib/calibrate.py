"""Calibrate without training: held-out text -> the tables that turn a capacity into thresholds.

Three passes over text that no test uses. (1) Dense, collecting score quantiles per layer and site.
(2) Forward and backward on some of it, for what gating each site would cost. If y is sampled from the base
itself, the KL divergence that a small change d of an activation causes is, to second order,
``1/2 E[(grad_a log p(y) . d)^2]``: the Fisher quadratic form. Zeroing the channels with scores under a threshold
changes the input x of a linear layer by -x there, so one backward pass prices every site at every share.
(3) A few passes at whole budgets, to see which capacity each one realises.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .config import HatError
from .model import HierarchicalTransformer
from .router import MoERouter
from .state import TokenState
from .thresholds import Calibration

# Shares at which the damage is priced; k and p of the damage model are a line through them in log-log.
PROBE_SHARES = (0.45, 0.6, 0.75)
# A steeper or flatter line than this is noise: a quadratic is the least, as the form itself is one.
EXPONENT_RANGE = (2.0, 6.0)
QUANTILES = 65
BUDGETS = (0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
# Tokens for the budget curve: a mean over every site and token, it needs few.
CHECK_TOKENS = 2048
# Score samples kept per site; enough for a quantile error well under a thousandth.
SAMPLES = 200_000


class _Collect:
    """Policy that keeps everything and samples the scores it sees, rows spread evenly over the text."""

    def __init__(self, hat: HierarchicalTransformer, tokens: int):
        self.routers, self.tokens = hat.routers, tokens
        self.scores: dict[tuple[int, str], list[Tensor]] = {}

    def __call__(self, layer, site, x, rows, state: TokenState):
        score = self.routers[f"{layer}_{site}"].score(x[~state.protected.view(-1)])
        width = 1 if score.dim() == 1 else score.shape[1]
        self.scores.setdefault((layer, site), []).append(score[:: 1 + self.tokens * width // SAMPLES].flatten())
        return None


def calibrate(
    hat: HierarchicalTransformer,
    blocks: Iterable[list[int]],
    *,
    probe_tokens: int = 4096,
    seed: int = 0,
    text: str = "",
    progress: bool = True,
) -> Calibration:
    """Measure ``hat`` on ``blocks`` of token ids; sets and returns its calibration.

    Args:
        blocks: token-id lists from held-out text; every fourth one serves the budget curve alone.
        probe_tokens: how many of the other tokens the backward pass sees, in whole blocks.
        seed: for the targets sampled from the base.
        text: what the blocks are, kept in the checkpoint.

    Raises `HatError` for a text with less than 256 tokens, or whose scores are all equal (token routers
    that were never fitted).
    """
    blocks = [torch.tensor([b], device=hat.base.device) for b in blocks if len(b) > 1]
    total = sum(b.shape[1] for b in blocks)
    if total < 256:
        raise HatError(f"calibration needs at least 256 tokens of text, got {total}")
    check = blocks[3::4] or blocks[-1:]
    fit = [b for i, b in enumerate(blocks) if i % 4 != 3]
    check = _spread(check, CHECK_TOKENS)

    with torch.no_grad():
        if hat.config.granularity == "token":
            fit_token_routers(hat, fit, progress)
        quantiles = score_quantiles(hat, fit, progress)
        damage = _damage(hat, _spread(fit, probe_tokens), quantiles, seed, progress)
        sensitivity, exponent = _fit_damage(damage)

        sites = list(hat.grain.sites)
        work = np.tile(hat.site_work, (hat.config.n_layers, 1))
        if hat.config.granularity == "token":
            work[0] = 0  # layer 0's FFN always runs
        tables = {
            "sites": sites,
            "work": (work / work.sum()).tolist(),
            "sensitivity": sensitivity.tolist(),
            "exponent": exponent.tolist(),
            "quantiles": [[_rounded(quantiles.get((i, s), [0.0])) for s in sites] for i in range(hat.config.n_layers)],
            "text": text,
        }
        curve = _budget_curve(hat, Calibration(budget_curve=[[0.0], [0.0]], **tables), check, progress)
    hat.calibration = Calibration(budget_curve=curve, **tables)
    return hat.calibration


def score_quantiles(
    hat: HierarchicalTransformer, blocks: list[Tensor], progress: bool = True
) -> dict[tuple[int, str], np.ndarray]:
    """Scores of the dense model at `QUANTILES` evenly spaced quantiles, by (layer, site); blocks ``[1, T]``."""
    collect = _Collect(hat, sum(b.shape[1] for b in blocks))
    with hat.using(collect):
        for block in tqdm(blocks, desc="scores", disable=not progress):
            hat.lm(block, use_cache=False, logits_to_keep=1)
    grid = np.linspace(0, 1, QUANTILES)
    tables = {k: np.quantile(torch.cat(v).cpu().numpy(), grid) for k, v in collect.scores.items()}
    if all(q[0] == q[-1] for q in tables.values()):
        raise HatError("every router score is equal, so no threshold can tell tokens apart: train or fit the routers")
    return tables


def _damage(hat, blocks, quantiles, seed: int, progress) -> np.ndarray:
    """Predicted KL in nats per token of gating each site alone, ``[len(PROBE_SHARES), L, S]``."""
    grid = np.linspace(0, 1, QUANTILES)
    sites = hat.grain.sites
    cuts = {k: [float(np.interp(1 - share, grid, q)) for share in PROBE_SHARES] for k, q in quantiles.items()}
    total = torch.zeros(len(PROBE_SHARES), hat.config.n_layers, len(sites), dtype=torch.float64)
    tokens = 0

    def price(layer: int, site: str, x: Tensor, activation: Tensor) -> None:
        """Once the gradient of ``activation`` is known, add up what dropping low scores of x would cost."""
        if (layer, site) not in cuts:  # it always runs
            return
        protected = hat.trace.protected.view(-1)

        def hook(gradient: Tensor) -> None:
            score = hat.routers[f"{layer}_{site}"].score(x.detach())
            first_order = (activation.detach() * gradient).float()
            if score.dim() == 1:
                first_order = first_order.sum(-1)
            for row, cut in zip(total, cuts[layer, site], strict=True):
                change = first_order * (score <= cut)
                change = change if change.dim() == 1 else change.sum(-1)
                row[layer, sites.index(site)] += change[~protected].double().pow(2).sum().item() / 2

        activation.register_hook(hook)

    generator = torch.Generator(hat.base.device).manual_seed(seed)
    with hat.dense(), hat.grain.watching([a.grain for a in hat.layers], price):
        for block in tqdm(blocks, desc="sensitivity", disable=not progress):
            with torch.enable_grad():
                embedded = hat.lm.get_input_embeddings()(block).detach().requires_grad_()
                logits = hat.lm(inputs_embeds=embedded, use_cache=False).logits[0].float()
                target = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, target, reduction="sum").backward()
            tokens += block.shape[1]
    return total.numpy() / tokens


def _fit_damage(damage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k and p of ``k (1 - s)^p`` per site, ``[L, S]`` each, by least squares in log-log."""
    x = np.log(1 - np.asarray(PROBE_SHARES))
    y = np.log(np.maximum(damage, 1e-12)).reshape(len(x), -1)
    p = np.clip(np.polyfit(x, y, 1)[0], *EXPONENT_RANGE)
    log_k = (y - p * x[:, None]).mean(0)
    shape = damage.shape[1:]
    return np.exp(log_k).round(9).reshape(shape), p.round(4).reshape(shape)


def _budget_curve(hat, identity: Calibration, blocks, progress) -> list[list[float]]:
    """[realised capacities, budgets], both increasing."""
    realised = []
    for budget in tqdm(BUDGETS, desc="budgets", disable=not progress):
        hat.set_thresholds(identity.thresholds(budget))
        with hat.using(hat.threshold_policy()):
            tokens = kept = 0.0
            for block in blocks:
                hat.lm(block, use_cache=False, logits_to_keep=1)
                kept += hat.trace.capacity * block.shape[1]
                tokens += block.shape[1]
        realised.append(round(kept / tokens, 5))
    return [np.maximum.accumulate(realised).tolist(), list(BUDGETS)]


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
        rows.setdefault(layer, []).append((x.float(), out.float().norm(dim=-1).clamp(min=1e-6).log()))

    with hat.dense(), hat.grain.watching([a.grain for a in hat.layers], see):
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
        router.weight.data.copy_(weight)
        router.bias.data.copy_(mean_y - mean_x @ weight)


def _spread(blocks: list[Tensor], tokens: int) -> list[Tensor]:
    """About ``tokens`` tokens of whole blocks, taken at even distances."""
    count = max(1, round(len(blocks) * tokens / sum(b.shape[1] for b in blocks)))
    picks = np.linspace(0, len(blocks) - 1, min(count, len(blocks))).round().astype(int)
    return [blocks[i] for i in picks]


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{v:.5g}") for v in values]
