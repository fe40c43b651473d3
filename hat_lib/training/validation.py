"""The learning curve of a run: what skipping costs on text it does not train on, in ``validation.csv``.

One row for each of `CAPACITIES`, before the first step and whenever the run is saved: step, tokens trained on so far,
capacity, executed share of the layers' work, KL(base || routed) in nats per token and the relative increase in
perplexity, at the thresholds the run trains at, with the head in full. A resumed run drops the rows past the step it
resumes from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hat_lib.evaluation.perplexity import score_each
from hat_lib.model.modes import combined
from hat_lib.model.policies import Policy
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.blocks import load_text, spread

CAPACITIES = (0.75, 0.55, 0.4)


def validation_blocks(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """About ``tokens`` tokens of a text's validation split, in evenly spaced blocks; rows of `load_text`."""
    return spread(load_text(text, tokenizer, split="validation", block_size=512), tokens)


class Validation:
    """Writes ``path``.

    Args:
        hat: the model being trained; its gates do not matter.
        blocks: rows of `load_text`, none of them trained on.
        thresholds: capacity -> thresholds by (layer, site).
        step_tokens: tokens per step, over all processes.
        start: the step that the phase goes on from.
    """

    def __init__(
        self,
        path: Path,
        hat: HierarchicalTransformer,
        blocks: Dataset,
        thresholds: Callable,
        step_tokens: int,
        start: int = 0,
    ):
        self.path, self.hat, self.blocks, self.thresholds = path, hat, blocks, thresholds
        self.step_tokens = step_tokens
        before = pd.read_csv(path).to_dict("records") if start and path.exists() else []
        self.rows = [row for row in before if row["step"] <= start]
        if not start:
            self.measure_at(0)

    def measure_at(self, step: int) -> None:
        self.rows += self.measure(step)
        pd.DataFrame(self.rows).to_csv(self.path, index=False)

    def measure(self, step: int) -> list[dict[str, float]]:
        """The rows of one step."""
        hat, training = self.hat, self.hat.training
        hat.eval()
        around = [as_trained(hat, hat.threshold_policy(self.thresholds(c)), c) for c in CAPACITIES]
        base, found = score_each(hat, self.blocks, around, progress=False)
        hat.train(training)
        return [
            {
                "step": step,
                "tokens": step * self.step_tokens,
                "capacity": capacity,
                "share": round(at.layer_capacity, 4),
                "kl": round(at.kl, 5),
                "increase": round(float(np.expm1((at.nll - base.nll).sum() / base.tokens.sum())), 5),
            }
            for capacity, at in zip(CAPACITIES, found, strict=True)
        ]


def as_trained(hat: HierarchicalTransformer, policy: Policy, capacity: float) -> Callable:
    """Makes the context routers are trained in at a capacity: a policy in the layers, the head in full."""
    correcting = partial(hat.correcting, hat.correction_strength(capacity))
    return partial(combined, hat.dense, partial(hat.using, policy), correcting)
