"""What a run writes while it trains: ``log.csv``, which notebooks plot live, and ``validation.csv``.

``log.csv`` has a row for each logged step, and for the one that a run stops or a phase ends with: phase, step, steps,
seconds, then the metrics of `Objective` averaged since the previous row, the share of each site (``share_qkv`` ...) and
layer (``share_0`` ...), gradient norm, learning rate, tokens per second and the estimated seconds left. A cell is empty
where a phase has no such metric.

``validation.csv`` is a learning curve, on text that the run does not train on. Before the first step and at each save
it gets a row for each of `CAPACITIES`: step, tokens trained on, capacity, executed share of the layers' work, KL from
the base in nats per token and relative increase in perplexity, at the training's thresholds, with the head in full.
"""

import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset

from hat_lib.config import replaced
from hat_lib.contexts import combined
from hat_lib.evaluation.perplexity import compare, score_each
from hat_lib.hat import HierarchicalTransformer
from hat_lib.training.objective import Objective, ThresholdsAt

METRICS = ("loss", "capacity", "kl", "share", "z_loss", "entropy", "gate_loss", "wrong", "exit_rate", "agreement")
CAPACITIES = (0.75, 0.55, 0.4)


class Log:
    """Appends to ``path``; for the main process only. A phase goes on from step ``start``: rows past it are dropped."""

    def __init__(self, path: Path, objective: Objective, start: int, steps: int):
        hat, phase = objective.hat, objective.phase
        self.path, self.phase, self.site_work, self.first, self.steps = path, phase, hat.site_work, start, steps
        self.shares = [f"share_{s}" for s in hat.grain.sites] + [f"share_{i}" for i in range(hat.config.n_layers)]
        tail = ["grad_norm", "learning_rate", "tokens_per_second", "eta_seconds"]
        self.columns = ["phase", "step", "steps", "seconds", *METRICS, *self.shares, *tail]
        rows = _rows(path)
        # Gates go on below the rows of their routers; routers begin the file.
        kept = (rows["step"].astype(int) <= start) | ((rows["phase"] != phase) & (phase != "routers"))
        with replaced(path) as written:
            rows[kept].reindex(columns=self.columns).to_csv(written, index=False)
        self.before, self.began = seconds_so_far(path, phase), time.monotonic()
        self.since = self.began

    def write(self, step: int, batches: list[dict], tokens: int, grad_norm: float, learning_rate: float) -> float:
        """Write the row of a step, and return its loss; ``batches`` are what `Objective` made of this process's
        micro-batches since the row before, of so many real ``tokens``."""
        now, work = time.monotonic(), torch.tensor(self.site_work)
        values = []
        for batch in batches:
            values.append({name: float(batch[name]) for name in METRICS if name in batch})
            if "site_share" in batch:
                share = batch["site_share"].cpu()
                shares = [*share.mean(0).tolist(), *(share @ work).tolist()]
                values[-1] |= zip(self.shares, shares, strict=True)
        means = dict(pd.DataFrame(values).mean()) | {"grad_norm": grad_norm, "learning_rate": learning_rate}
        pace = (now - self.began) / (step - self.first)
        row = {name: f"{value:.6g}" for name, value in means.items()} | {
            "phase": self.phase,
            "step": step,
            "steps": self.steps,
            "seconds": f"{self.before + now - self.began:.1f}",
            "tokens_per_second": f"{tokens * PartialState().num_processes / (now - self.since):.0f}",
            "eta_seconds": f"{pace * (self.steps - step):.0f}",
        }
        pd.DataFrame([row], columns=self.columns).to_csv(self.path, mode="a", header=False, index=False)
        self.since = now
        return means["loss"]


def seconds_so_far(path: Path, phase: str) -> float:
    """Seconds a phase had taken by its last row, summed over all resumptions; 0 without a row."""
    rows = _rows(path)
    return max(rows.loc[rows["phase"] == phase, "seconds"].astype(float), default=0.0)


def _rows(path: Path) -> pd.DataFrame:
    """The whole rows of a log, as text; a kill may have truncated the last."""
    if not path.exists():
        return pd.DataFrame(columns=["phase", "step", "seconds"])
    return pd.read_csv(path, dtype=str).dropna(subset="eta_seconds")


def extend_curve(
    path: Path, hat: HierarchicalTransformer, blocks: Dataset, thresholds: ThresholdsAt, step: int, tokens: int
) -> None:
    """Measure ``hat`` on rows of `load_text` after ``step`` steps and ``tokens`` tokens; its gates do not matter."""

    def as_trained(capacity: float):
        policy, strength = hat.threshold_policy(thresholds(capacity)), hat.correction_strength(capacity)
        return partial(combined, hat.dense, partial(hat.using, policy), partial(hat.correcting, strength))

    base, found = score_each(hat, blocks, [as_trained(c) for c in CAPACITIES], progress=False)
    rows = pd.DataFrame(
        {
            "step": step,
            "tokens": tokens,
            "capacity": capacity,
            "share": round(at.layer_capacity, 4),
            "kl": round(at.kl, 5),
            "increase": round(compare(base, at).increase, 5),
        }
        for capacity, at in zip(CAPACITIES, found, strict=True)
    )
    if step:
        before = pd.read_csv(path)
        rows = pd.concat([before[before["step"] < step], rows])
    with replaced(path) as written:
        rows.to_csv(written, index=False)
