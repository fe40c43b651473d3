"""The learning curve of a run: what skipping costs on text it does not train on, in ``validation.csv``.

One row for each of `CAPACITIES`, before the first step and whenever the run is saved: step, tokens trained on so far,
capacity, executed share of the layers' work, KL(base || routed) in nats per token and the relative increase in
perplexity, at the thresholds the run trains at, with the head in full.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from hat_lib.contexts import combined
from hat_lib.evaluation.perplexity import score_each
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.setting import Policy
from hat_lib.training.budget_split import Thresholds

CAPACITIES = (0.75, 0.55, 0.4)


def extend_curve(
    path: Path, hat: HierarchicalTransformer, blocks: Dataset, thresholds: Thresholds, step: int, tokens: int
) -> None:
    """Measure ``hat`` on rows of `load_text` after ``step`` steps and ``tokens`` tokens; its gates do not matter."""
    training = hat.training
    hat.eval()
    settings = [as_trained(hat, hat.threshold_policy(thresholds(c)), c) for c in CAPACITIES]
    base, found = score_each(hat, blocks, settings, progress=False)
    hat.train(training)
    rows = [
        {
            "step": step,
            "tokens": tokens,
            "capacity": capacity,
            "share": round(at.layer_capacity, 4),
            "kl": round(at.kl, 5),
            "increase": round(float(np.expm1((at.nll - base.nll).sum() / base.tokens.sum())), 5),
        }
        for capacity, at in zip(CAPACITIES, found, strict=True)
    ]
    if step:
        before = pd.read_csv(path)
        rows = [*before[before["step"] < step].to_dict("records"), *rows]
    pd.DataFrame(rows).to_csv(path, index=False)


def as_trained(hat: HierarchicalTransformer, policy: Policy, capacity: float) -> Callable:
    """Makes the context routers are trained in at a capacity: a policy in the layers, the head in full."""
    correcting = partial(hat.correcting, hat.correction_strength(capacity))
    return partial(combined, hat.dense, partial(hat.using, policy), correcting)
