"""Calibrate without training: held-out text -> the tables that turn a capacity into thresholds.

Three passes over text that no test uses. (1) Dense, collecting score quantiles per layer and site.
(2) One pass per site with that site alone gated to `PROBE_SHARE`, for its sensitivity: KL(base || gated)
in nats per token. (3) A few passes at whole budgets, to see which capacity each one realises.
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

PROBE_SHARE = 0.45
# Exponent of the damage model k (1 - s)^p: measured, see LOG.md.
EXPONENT = 3.5
QUANTILES = 65
BUDGETS = (0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
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
        stride = max(1, self.tokens * width // SAMPLES)
        self.scores.setdefault((layer, site), []).append(score[:: min(stride, 8)].flatten())
        return None


class _Only:
    """Policy that gates one site and keeps everything elsewhere."""

    def __init__(self, hat: HierarchicalTransformer, layer: int, site: str):
        self.target, self.router = (layer, site), hat.routers[f"{layer}_{site}"]

    def __call__(self, layer, site, x, rows, state):
        return self.router.keep(x) if (layer, site) == self.target else None


def calibrate(
    hat: HierarchicalTransformer,
    blocks: Iterable[list[int]],
    *,
    probe_tokens: int = 1024,
    text: str = "",
    progress: bool = True,
) -> Calibration:
    """Measure ``hat`` on ``blocks`` of token ids; sets and returns its calibration.

    Args:
        blocks: token-id lists from held-out text; the first `probe_tokens` of them also serve the
            sensitivity passes, and the last quarter alone the budget curve.
        text: what the blocks are, kept in the checkpoint.

    Raises `HatError` for a text with less than 256 tokens, or whose scores are all equal (token routers
    that were never fitted).
    """
    blocks = [torch.tensor([b], device=hat.base.device) for b in blocks if len(b) > 1]
    total = sum(b.shape[1] for b in blocks)
    if total < 256:
        raise HatError(f"calibration needs at least 256 tokens of text, got {total}")
    cut = max(1, len(blocks) * 3 // 4)
    fit, check = blocks[:cut], blocks[cut:] or blocks[-1:]

    with torch.inference_mode():
        if hat.config.granularity == "token":
            fit_token_routers(hat, fit, progress)
        quantiles = _score_quantiles(hat, fit, progress)
        sensitivity = _sensitivities(hat, _first(fit, probe_tokens), quantiles, progress)

        sites = list(hat.grain.sites)
        work = np.tile(hat.site_work, (hat.config.n_layers, 1))
        if hat.config.granularity == "token":
            work[0] = 0  # layer 0's FFN always runs
        tables = {
            "sites": sites,
            "work": (work / work.sum()).tolist(),
            "sensitivity": sensitivity,
            "exponent": EXPONENT,
            "quantiles": [[_rounded(quantiles[i, s]) for s in sites] for i in range(hat.config.n_layers)],
            "text": text,
        }
        curve = _budget_curve(hat, Calibration(budget_curve=[[0.0], [0.0]], **tables), check, progress)
    hat.calibration = Calibration(budget_curve=curve, **tables)
    return hat.calibration


def _score_quantiles(hat, blocks, progress) -> dict[tuple[int, str], np.ndarray]:
    collect = _Collect(hat, sum(b.shape[1] for b in blocks))
    with hat.using(collect):
        for block in tqdm(blocks, desc="scores", disable=not progress):
            hat.lm(block, use_cache=False, logits_to_keep=1)
    grid = np.linspace(0, 1, QUANTILES)
    tables = {k: np.quantile(torch.cat(v).cpu().numpy(), grid) for k, v in collect.scores.items()}
    if all(q[0] == q[-1] for q in tables.values()):
        raise HatError("every router score is equal, so no threshold can tell tokens apart: train or fit the routers")
    return tables


def _sensitivities(hat, blocks, quantiles, progress) -> list[list[float]]:
    with hat.dense():
        teacher = [_log_probs(hat, b) for b in blocks]
    grid = np.linspace(0, 1, QUANTILES)
    out = []
    for layer in tqdm(range(hat.config.n_layers), desc="sensitivity", disable=not progress):
        row = []
        for site in hat.grain.sites:
            if (layer, site) not in quantiles:
                row.append(0.0)
                continue
            router = hat.routers[f"{layer}_{site}"]
            before = router.threshold
            router.set_threshold(float(np.interp(1 - PROBE_SHARE, grid, quantiles[layer, site])))
            with hat.using(_Only(hat, layer, site)):
                divergence = [_kl(t, _log_probs(hat, b)) for t, b in zip(teacher, blocks, strict=True)]
            router.set_threshold(before)
            row.append(round(float(np.mean(divergence)), 7))
        out.append(row)
    return out


def _budget_curve(hat, identity: Calibration, blocks, progress) -> list[list[float]]:
    """[realised capacities, budgets], both increasing."""
    before = hat.calibration, hat.capacity
    hat.calibration = identity
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
    hat.calibration = before[0]
    return [list(np.maximum.accumulate(realised)), list(BUDGETS)]


def fit_token_routers(hat: HierarchicalTransformer, blocks, progress: bool = True) -> None:
    """Closed-form start for token routers: ridge regression of log ||FFN(x)|| / ||h|| on the router's input.

    The published method trains them from scratch; this gives an untrained calibration something to rank by.
    Routers that already carry weights are left alone.
    """
    routers = [hat.routers[f"{i}_ffn"] for i in range(hat.config.n_layers)]
    if any(bool(r.weight.any()) for r in routers):
        return
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def watch(index):
        def hook(mlp, args, out):
            x = args[0].float()
            rows.setdefault(index, []).append((x, out.float().norm(dim=-1).clamp(min=1e-6).log()))

        return hook

    hooks = [layer.mlp.register_forward_hook(watch(i)) for i, layer in enumerate(hat.lm.model.layers)]
    try:
        with hat.dense():
            for block in tqdm(blocks, desc="token routers", disable=not progress):
                hat.lm(block, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
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


def _first(blocks: list[Tensor], tokens: int) -> list[Tensor]:
    out, total = [], 0
    for block in blocks:
        if total >= tokens:
            break
        out.append(block[:, : tokens - total])
        total += out[-1].shape[1]
    return [b for b in out if b.shape[1] > 1]


def _log_probs(hat, block: Tensor) -> Tensor:
    return F.log_softmax(hat.lm(block, use_cache=False).logits[0].float(), dim=-1)


def _kl(teacher: Tensor, student: Tensor) -> float:
    """KL(teacher || student), nats per token, from log-probabilities ``[T, V]``."""
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{v:.5g}") for v in values]
