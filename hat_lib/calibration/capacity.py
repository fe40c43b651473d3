"""Calibrate on held-out text: the table that turns a capacity into thresholds.

For a ladder of budgets, `calibrate` sets thresholds, runs text, and notes the capacity and shares that come out. A
budget is split over layers and sites with the least damage, by prices in KL (`hat_lib.calibration.budget`); evenly; or
as the routers were trained (`calibrate_learned`). At the channel grain, an earlier pass measures how sensitive each
token is (`hat_lib.calibration.token_sensitivity`), and the head is one more site.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.base.load import Base
from hat_lib.calibration.budget import allocate, between, damage_curves, head_points, site_damage
from hat_lib.calibration.quantiles import (
    LEAST_TOKENS,
    SiteThresholds,
    block_tensors,
    check_batches,
    forwards,
    held_out_parts,
    score_quantiles,
)  # fmt: skip
from hat_lib.calibration.token_sensitivity import SHARE, TOKENS, fit_token_sensitivity, sensitivity_strength
from hat_lib.config import HatError
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.grain import GRAINS
from hat_lib.method.thresholds import EXIT_TABLES, HEAD_TABLES, Calibration
from hat_lib.text.blocks import count_tokens, held_out, load_text, spread, text_hash

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
SPLITS = ("damage", "uniform")

Head = tuple[float, float, float] | None  # threshold, margin and expected share of the head; None reads it in full


def calibrate_on(
    text: str, base: Base, granularity: str, *, tokens: int = 12_000, probe_tokens: int = 4096, **changes
) -> HierarchicalTransformer:
    """`hat calibrate`: ``base`` with routers calibrated on about ``tokens`` tokens of the train and validation splits
    of ``text``.

    ``changes`` are fields of the grain's `HatConfig`. Warns of a text that is too short to train on, too. Raises
    `HatError` as `load_text` and `calibrate` do.
    """
    rows = load_text(text, base.tokenizer, split="validation", max_tokens=2 * LEAST_TOKENS)
    if (held := count_tokens(rows)) < LEAST_TOKENS:
        warnings.warn(
            f"{text} is too short for `hat train`, which needs {LEAST_TOKENS} tokens in the validation split (5 % of a "
            f"file), got {held}",
            stacklevel=2,
        )
    blocks = held_out(text, base.tokenizer, tokens)
    hat = HierarchicalTransformer(base, GRAINS[granularity].config(base, **changes))
    splits = f"train and validation splits, {count_tokens(blocks)} tokens, SHA-256 {text_hash(blocks)[:16]}"
    calibrate(hat, blocks["input_ids"], probe_tokens=probe_tokens, text=f"{text}, {splits}")
    return hat


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
        blocks: from held-out text; about a fourth of it serves only the table of capacities.
        split: of a budget: "damage", the least; or "uniform", every site keeps the same share.
        token_sensitivity: channel grain: measure which tokens lose more by skipping; otherwise all are treated alike.
        head: channel grain: the head skips, too; otherwise it is read in full, and is not part of a capacity.
        probe_tokens: how many of the other tokens the backward pass sees, in whole blocks.
        seed: for the targets sampled from the base.
        text: what the blocks are, kept in the checkpoint.

    Raises `HatError` for a text with fewer than 256 tokens, or whose scores are all equal.

    >>> calibration = calibrate(hat, rows["input_ids"], progress=False)
    >>> hat.capacity = 0.6
    """
    if split not in SPLITS:
        raise HatError(f"split must be {' or '.join(SPLITS)}, got {split!r}")
    fit, check = held_out_parts(hat, blocks)
    sites, layers = hat.grain.sites, range(hat.config.n_layers)
    with torch.no_grad():
        if progress:
            _say_how_long(hat, fit, check, probe_tokens)
        if hat.grain.logits:
            fit_token_routers(hat, fit, progress)
        for name, parameter in hat.routers.named_parameters():
            if "_token." in name:  # all tokens alike
                parameter.zero_()
        quantiles = alike = score_quantiles(hat, fit, progress)  # alike: as if no token were more sensitive
        if token_sensitivity and hat.grain.scales_thresholds:
            fit_token_sensitivity(hat, spread(fit, TOKENS), quantiles.thresholds(SHARE), seed, progress)
            quantiles = score_quantiles(hat, fit, progress)
        points = head_points(hat, fit, progress) if head and hat.grain.has_shortlist else []
        work = np.tile(hat.site_work, (len(layers), 1))
        if split == "damage":
            curves = damage_curves(site_damage(hat, spread(fit, probe_tokens), quantiles, seed, progress))
            work[np.array([[hat.grain.always_runs(i, s) for s in sites] for i in layers])] = 1e-12
    head_work = hat.head_work if points else 0.0
    whole, rows = work.sum() + head_work, []
    for budget in BUDGETS:
        shares, point = np.full_like(work, budget), between(points, budget) if points else None
        if split == "damage":
            shares, point = allocate(curves, work / whole, budget, points, head_work / whole)
        strength, thresholds = sensitivity_strength(budget), {}
        for i, site in quantiles.tables:
            sensitive, same = (q.threshold((i, site), shares[i, sites.index(site)]) for q in (quantiles, alike))
            thresholds[i, site] = strength * sensitive + (1 - strength) * same
        if quantiles is not alike:
            thresholds |= {(i, "token"): strength for i in layers}
        rows.append((thresholds, point and (point.threshold, point.margin, point.share)))
    text = f"{text}; quantiles of {quantiles.scores} scores a site from {quantiles.tokens} tokens".removeprefix("; ")
    return _set_table(hat, rows, check, split, text, progress)


def _say_how_long(hat, fit: list[Tensor], check: list[Tensor], probe_tokens: int) -> None:
    """From one block: `calibrate` reads ``fit`` three times, goes back through parts of it, which takes as long as two
    more forwards, and reads ``check`` at each budget."""
    size = count_tokens(fit)
    tokens = 3 * (size + min(size, TOKENS) + min(size, probe_tokens)) + len(BUDGETS) * count_tokens(check)
    with hat.dense():
        list(forwards(hat, fit[:1]))  # the first one allocates
        began = time.monotonic()
        (timed,) = forwards(hat, fit[:1])
    minutes = tokens / timed * (time.monotonic() - began) / 60
    tqdm.write(f"calibration: about {max(minutes, 1):.0f} min", sys.stderr)


def calibrate_learned(
    hat: HierarchicalTransformer,
    blocks: Iterable[list[int]],
    split: Callable[[float], SiteThresholds],
    head: Callable[[float], Head],
    *,
    text: str = "",
    progress: bool = True,
) -> Calibration:
    """Like `calibrate`, for trained routers: from a budget in (0, 1), ``split`` gives the thresholds that they were
    trained with, ``head`` the head's. Nothing is fitted, so the table is measured on all of ``blocks``, which training
    must not have read."""
    batches = check_batches(block_tensors(hat, blocks))
    return _set_table(hat, [(split(b), head(b)) for b in BUDGETS], batches, "learned", text, progress)


@torch.no_grad()
def _set_table(
    hat, rows: list[tuple[SiteThresholds, Head]], blocks: list[Tensor], method: str, text: str, progress: bool
) -> Calibration:
    """Run ``blocks`` with the thresholds and the head of each of `BUDGETS`, and set the table; exit tables are kept."""
    sites, layers, tokens = hat.grain.sites, range(hat.config.n_layers), count_tokens(blocks)
    realised, shares = [], []
    for budget, (chosen, head) in zip(BUDGETS, tqdm(rows, desc="capacities", disable=not progress), strict=True):
        kept, total = 0.0, np.zeros(2)
        shortlist = head and hat.shortlist(*head)
        corrected = hat.correcting(hat.correction_strength(budget))
        with hat.dense(), hat.using(hat.threshold_policy(chosen)), corrected, hat.changed(shortlist=shortlist):
            for size in forwards(hat, blocks, logits=0 if head else 1):
                kept = kept + hat.trace.site_share.flatten(2).sum(-1).double().cpu().numpy()
                total += np.array([hat.trace.capacity, hat.trace.head_share]) * size
        realised.append(total / tokens)
        shares.append(kept / tokens)
    capacities, head_shares = np.transpose(realised)
    capacities = np.minimum(capacities, 1.0)  # a shortlist may be long on text that the base does not know
    # A site that always runs is never asked; any finite number will do.
    thresholds = np.array([[[chosen.get((i, s), 0.0) for s in sites] for i in layers] for chosen, _ in rows])
    # At 1.0 even the lowest score is kept: magnitudes end at 0, logits somewhere below the last threshold.
    last = thresholds[-1] - (1 + np.abs(thresholds[-1])) if hat.grain.logits else np.zeros_like(thresholds[-1])
    tables = {}
    if all(head for _, head in rows):
        head_thresholds, margins, _ = np.transpose([head for _, head in rows])
        falling, rising = np.minimum.accumulate(head_thresholds), np.maximum.accumulate(margins)
        columns = [*falling, 0.0], [*rising, rising[-1]], [*head_shares, 1.0]
        tables = dict(zip(HEAD_TABLES, map(_rounded, columns), strict=True))
    if (0, "token") in rows[0][0]:
        tables["sensitivity"] = _rounded([*(chosen[0, "token"] for chosen, _ in rows), 1.0])
    if hat.calibration:
        tables |= {name: getattr(hat.calibration, name) for name in EXIT_TABLES}
    hat.calibration = Calibration(
        sites=list(sites),
        capacities=[*np.maximum.accumulate(np.round(capacities, 5)).tolist(), 1.0],
        thresholds=_rounded(np.stack([*np.minimum.accumulate(thresholds), last], -1)),
        shares=_rounded(np.stack([*shares, np.ones_like(shares[-1])], -1)),
        method=method,
        text=text,
        **tables,
    )
    return hat.calibration


def fit_token_routers(hat: HierarchicalTransformer, blocks, progress: bool = True) -> None:
    """Closed-form start for untrained token routers: ridge regression of log ||FFN(x)|| on the router's input x. The
    published method trains them from scratch; this gives an untrained calibration something to rank by."""
    if any(router.weight.any() for router in hat.routers.values()):
        return
    inputs, norms = {name: [] for name in hat.routers}, {name: [] for name in hat.routers}

    def see(layer: int, site: str, x: Tensor, out: Tensor) -> None:
        inputs[f"{layer}_{site}"].append(x.flatten(0, -2).float())
        norms[f"{layer}_{site}"].append(out.flatten(0, -2).float().norm(dim=-1).clamp(min=1e-6).log())

    with hat.dense(), hat.watching(see):
        list(forwards(hat, blocks, "token routers", progress))
    for name, router in hat.routers.items():
        x, y = torch.cat(inputs[name]).double(), torch.cat(norms[name]).double()
        centred = x - x.mean(0)
        gram = centred.T @ centred
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        weight = torch.linalg.solve(gram, centred.T @ (y - y.mean()))
        router.weight.copy_(weight)
        router.bias.copy_(y.mean() - x.mean(0) @ weight)


def _rounded(table: np.ndarray) -> list:
    """To five significant digits, for JSON that a person can read."""
    return np.vectorize(lambda v: float(f"{v:.5g}"))(table).tolist()
