"""What a run logs while it trains: a CSV row per logged step, which notebooks plot live, and the same for tensorboard.

Columns: phase, step, steps, seconds, then the metrics of `hat_lib.training.objective` averaged since the previous row,
the share of each site (``share_qkv`` ...) and of each layer (``share_0`` ...), gradient norm, learning rate, tokens per
second and the estimated seconds left. A cell is empty where a phase has no such metric.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from torch.utils.tensorboard import SummaryWriter

from hat_lib.training.objective import Objective

METRICS = ("loss", "capacity", "kl", "share", "z_loss", "entropy", "gate_loss", "wrong", "exit_rate", "agreement")


class Log:
    """Appends to ``path``, and to tensorboard files in ``work``; for the main process only.

    Args:
        start: the step that the phase goes on from; rows past it are dropped.
    """

    def __init__(self, path: Path, work: Path, objective: Objective, start: int, steps: int):
        hat, phase = objective.hat, objective.phase
        self.path, self.phase, self.hat, self.first, self.steps = path, phase, hat, start, steps
        self.shares = [f"share_{s}" for s in hat.grain.sites] + [f"share_{i}" for i in range(hat.config.n_layers)]
        tail = ["grad_norm", "learning_rate", "tokens_per_second", "eta_seconds"]
        self.columns = ["phase", "step", "steps", "seconds", *METRICS, *self.shares, *tail]
        kept = _rows(path) if start or phase != "routers" else []
        kept = [row for row in kept if row["phase"] != phase or int(row["step"]) <= start]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        pd.DataFrame(kept, columns=self.columns).to_csv(temporary, index=False)
        temporary.replace(path)
        self.before, self.began = seconds_so_far(path, phase), time.monotonic()
        self.board = SummaryWriter(work / "tensorboard", purge_step=start + 1)
        self.added: list[dict[str, float]] = []
        self.tokens, self.since = 0, self.began

    def add(self, metrics: dict, tokens: int) -> None:
        """Add one micro-batch: what `Objective` returned, and its number of real tokens."""
        values = {name: float(torch.as_tensor(metrics[name]).detach()) for name in METRICS if name in metrics}
        if "site_share" in metrics:
            share = metrics["site_share"].cpu()
            by_layer = share @ torch.tensor(self.hat.site_work)
            values |= dict(zip(self.shares, [*share.mean(0).tolist(), *by_layer.tolist()], strict=True))
        self.added.append(values)
        self.tokens += tokens

    def write(self, step: int, grad_norm: float, learning_rate: float) -> float:
        """Write the row of a step; returns its loss."""
        now = time.monotonic()
        means = dict(pd.DataFrame(self.added).mean()) | {"grad_norm": grad_norm, "learning_rate": learning_rate}
        pace = (now - self.began) / (step - self.first)
        tokens = self.tokens * PartialState().num_processes  # each process adds as many
        row = {name: f"{value:.6g}" for name, value in means.items()} | {
            "phase": self.phase,
            "step": step,
            "steps": self.steps,
            "seconds": f"{self.before + now - self.began:.1f}",
            "tokens_per_second": f"{tokens / (now - self.since):.0f}",
            "eta_seconds": f"{pace * (self.steps - step):.0f}",
        }
        pd.DataFrame([row], columns=self.columns).to_csv(self.path, mode="a", header=False, index=False)
        for name in means.keys() - set(self.shares):
            self.board.add_scalar(f"train/{name}", means[name], step)
        self.added, self.tokens, self.since = [], 0, now
        return means["loss"]

    def close(self) -> None:
        self.board.close()


def seconds_so_far(path: Path, phase: str) -> float:
    """Seconds a phase had taken by its last row, summed over all resumptions; 0 without a row."""
    return max((float(row["seconds"]) for row in _rows(path) if row["phase"] == phase), default=0.0)


def _rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a log; a kill may have truncated the last."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["eta_seconds"]]
