"""What a run logs while it trains: a CSV row per logged step, which notebooks plot live, and the same for tensorboard.

Columns: phase, step, steps, seconds, then the metrics of `hat_lib.training.objective` averaged since the previous row,
the share of each site (``share_qkv`` ...) and of each layer (``share_0`` ...), gradient norm, learning rate, tokens per
second and the estimated seconds left. A cell is empty where a phase has no such metric. A resumed run drops the rows
past the step it resumes from.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from hat_lib.model.transformer import HierarchicalTransformer

METRICS = ("loss", "capacity", "kl", "share", "z_loss", "entropy", "gate_loss", "wrong", "exit_rate", "agreement")


class Log:
    """Appends to ``path``, and to tensorboard files in ``work``; for the main process only.

    Args:
        start: the step that the phase goes on from.
        n_processes: each adds as many tokens as this one.
    """

    def __init__(
        self, path: Path, work: Path, phase: str, hat: HierarchicalTransformer, start: int, steps: int, n_processes: int
    ):
        self.path, self.phase, self.hat, self.first, self.steps = path, phase, hat, start, steps
        self.n_processes = n_processes
        shares = [f"share_{s}" for s in hat.grain.sites] + [f"share_{i}" for i in range(hat.config.n_layers)]
        tail = ["grad_norm", "learning_rate", "tokens_per_second", "eta_seconds"]
        self.columns = ["phase", "step", "steps", "seconds", *METRICS, *shares, *tail]
        kept = _rows(path) if start or phase != "routers" else []
        kept = [row for row in kept if row["phase"] != phase or int(row["step"]) <= start]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)
        temporary.replace(path)
        self.before, self.began = seconds_so_far(path, phase), time.monotonic()
        self.board = SummaryWriter(work / "tensorboard", purge_step=start + 1)
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, float] = {}
        self.site_share, self.count, self.tokens, self.since = None, 0, 0, time.monotonic()

    def add(self, metrics: dict, tokens: int) -> None:
        """Add one micro-batch: what `Objective` returned, and its number of real tokens."""
        for name in METRICS:
            if name in metrics:
                self.sums[name] = self.sums.get(name, 0.0) + float(torch.as_tensor(metrics[name]).detach())
        if "site_share" in metrics:
            share = metrics["site_share"].cpu()
            self.site_share = share if self.site_share is None else self.site_share + share
        self.count, self.tokens = self.count + 1, self.tokens + tokens

    def write(self, step: int, grad_norm: float, learning_rate: float) -> float:
        """Write the row of a step; returns its loss."""
        now = time.monotonic()
        values = {name: total / self.count for name, total in self.sums.items()}
        row = {name: f"{value:.6g}" for name, value in values.items()}
        if self.site_share is not None:
            share = self.site_share / self.count
            by_layer = share @ torch.tensor(self.hat.site_work)
            row |= {f"share_{s}": f"{v:.4f}" for s, v in zip(self.hat.grain.sites, share.mean(0).tolist(), strict=True)}
            row |= {f"share_{i}": f"{v:.4f}" for i, v in enumerate(by_layer.tolist())}
        pace = (now - self.began) / (step - self.first)
        row |= {
            "phase": self.phase,
            "step": step,
            "steps": self.steps,
            "seconds": f"{self.before + now - self.began:.1f}",
            "grad_norm": f"{grad_norm:.4g}",
            "learning_rate": f"{learning_rate:.4g}",
            "tokens_per_second": f"{self.tokens * self.n_processes / (now - self.since):.0f}",
            "eta_seconds": f"{pace * (self.steps - step):.0f}",
        }
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        for name, value in (values | {"grad_norm": grad_norm, "learning_rate": learning_rate}).items():
            self.board.add_scalar(f"train/{name}", value, step)
        self._clear()
        return values["loss"]

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
