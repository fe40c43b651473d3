"""Calibrate exits: the table that turns an exit rate, at a capacity, into one threshold per gate.

A gate scores whether the token read here is the base's. On held-out text, a logistic map per gate (Platt 1999) turns
its score into how often that was true, which makes the gates comparable: a token leaves at the first exit whose chance
is above one bar for all. The rate that a bar realises, and how often those that left agree, is measured on other
blocks, with exits on, because tokens that left change the keys and values that later tokens see. Skipped work changes
what a gate reads, so all of this is done at several capacities.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, logit
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.calibration.quantiles import held_out_parts
from hat_lib.config import HatError, check_capacity
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.thresholds import Calibration
from hat_lib.text.blocks import count_tokens

CAPACITIES = (0.4, 0.55, 0.75, 1.0)
RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""the last two lie close together, because interpolating between them is a jump"""
CERTAIN = 1e6  # thresholds beyond this are certain decisions; JSON has no infinity


@torch.no_grad()
def calibrate_exits(
    hat: HierarchicalTransformer,
    blocks: Iterable[list[int]],
    capacities: Sequence[float] = CAPACITIES,
    *,
    progress: bool = True,
) -> tuple[Calibration, list[list[float]]]:
    """Measure the exits of ``hat`` at ``capacities``; sets its calibration, with exits.

    Maps and bars are fitted on about three quarters of ``blocks``, which training must not have read; what they realise
    is measured on the rest. Returns the calibration and, for each of its capacities and exit rates (after 0), how often
    tokens that left agree with the base (1 if none did). Raises `HatError` without exit layers or a calibration of
    capacities, and for fewer than 256 tokens.
    """
    if not hat.gates or hat.calibration is None:
        raise HatError("exits are calibrated on a model with exit layers, and after its capacities")
    capacities, tables = sorted(map(check_capacity, capacities)), []
    parts = held_out_parts(hat, blocks)
    with hat.dense():  # with the base's next tokens
        fit, check = ([(b, hat.lm(b, use_cache=False).logits.argmax(-1)) for b in part] for part in parts)
    for capacity in tqdm(capacities, desc="exits", disable=not progress):
        with hat.dense(), hat.at(capacity):
            tables.append(_at_one_capacity(hat, fit, check))
    rates, scores, agreement = (list(column) for column in zip(*tables, strict=True))
    hat.calibration = replace(hat.calibration, exit_capacities=capacities, exit_rates=rates, exit_scores=scores)
    return hat.calibration, agreement


def _at_one_capacity(hat, fit: list[tuple[Tensor, Tensor]], check: list[tuple[Tensor, Tensor]]) -> tuple:
    """Realised rates ``[R]``, thresholds ``[R, E]``, and how often those that left agreed with the base ``[R - 1]``."""
    head, norm, seen = hat.lm.lm_head, hat.lm.model.norm, {depth: [] for depth in hat.gates}
    for block, base in fit:
        hidden = hat.lm.model(block, use_cache=False, output_hidden_states=True).hidden_states
        may = (hat.trace.real & ~hat.trace.protected)[0]  # leave
        for depth, gate in hat.gates.items():
            h = hidden[int(depth)][0]
            right = head(norm(gate.translate(h))).argmax(-1) == base[0]
            seen[depth].append(torch.stack([gate.score(h), right])[:, may])
    scores = [torch.cat(parts, 1).cpu().numpy() for parts in seen.values()]  # [2, n]: a gate's, and whether it is right
    maps = [_logistic(score, right) for score, right in scores]
    chances = [expit(a * score + b) for (a, b), (score, _) in zip(maps, scores, strict=True)]

    best = np.sort(np.max(chances, 0))  # a token leaves somewhere if its best chance is above the bar
    rates, table, agreement = [0.0], [[CERTAIN] * len(maps)], []
    for rate in RATES:
        bar = float(np.quantile(best, 1 - rate)) if rate < 1 else 0.0
        # The gate scores at which the chance is ``bar``.
        thresholds = [float(np.clip((logit(bar) - b) / a, -CERTAIN, CERTAIN)) for a, b in maps]
        same = []  # of each token that left: whether it agrees
        with hat.using(exits=thresholds):
            for block, base in check:
                hidden = hat.lm.model(block, use_cache=False).last_hidden_state
                left = hat.trace.exited
                same.append(hat.logits(hidden[left]).argmax(-1) == base[left])
        same = torch.cat(same).float()
        rates.append(len(same) / count_tokens([block for block, _ in check]))
        agreement.append(float(same.mean()) if len(same) else 1.0)
        table.append(thresholds)
    return np.maximum.accumulate(np.round(rates, 5)).tolist(), np.round(table, 6).tolist(), agreement


def _logistic(score: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """a >= 0 and b of ``P(right) = sigmoid(a score + b)``, by maximum likelihood with a little shrinkage."""
    target, spread = right.astype(float), score.std() or 1.0
    z = (score - score.mean()) / spread

    def loss(parameters):
        a, b = parameters
        p = a * z + b
        value = np.mean(np.logaddexp(0, p) - target * p) + 1e-3 * (a * a + b * b)
        error = expit(p) - target
        return value, np.array([np.mean(error * z) + 2e-3 * a, np.mean(error) + 2e-3 * b])

    a, b = minimize(loss, [1.0, 0.0], jac=True, bounds=[(1e-6, None), (None, None)]).x
    return a / spread, b - a * score.mean() / spread
