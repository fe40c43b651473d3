"""What a run logs while it trains: one CSV row per logged step, which notebooks plot live.

Columns: phase, step, steps, seconds, then the metrics of `hat_lib.training.objective` averaged since the previous row,
the share of each site (``share_qkv`` ...) and of each layer (``share_0`` ...), gradient norm, learning rate, tokens per
second and the estimated seconds left. A cell is empty where a phase has no such metric. A resumed run drops the rows
past the step it resumes from.
"""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback

from hat_lib.config import HatError
from hat_lib.model.transformer import HierarchicalTransformer

METRICS = ("loss", "capacity", "kl", "share", "z_loss", "entropy", "gate_loss", "wrong", "exit_rate", "agreement")


class CsvLog(TrainerCallback):
    """Appends to ``path``, in the main process only; `HatError` if an existing file to continue has other columns."""

    def __init__(self, path: Path, phase: str, hat: HierarchicalTransformer):
        self.path, self.phase, self.hat = Path(path), phase, hat
        shares = [f"share_{s}" for s in hat.grain.sites] + [f"share_{i}" for i in range(hat.config.n_layers)]
        tail = ["grad_norm", "learning_rate", "tokens_per_second", "eta_seconds"]
        self.columns = ["phase", "step", "steps", "seconds", *METRICS, *shares, *tail]
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, float] = {}
        self.site_share, self.count, self.tokens = 0, 0, 0
        self.since = time.monotonic()

    def note(self, metrics: dict, tokens: int) -> None:
        """Add one micro-batch: what `Objective` returned, and its number of real tokens."""
        for name in set(METRICS) & set(metrics):
            self.sums[name] = self.sums.get(name, 0.0) + float(torch.as_tensor(metrics[name]).detach())
        if "site_share" in metrics:
            self.site_share = self.site_share + metrics["site_share"].cpu()
        self.count, self.tokens = self.count + 1, self.tokens + tokens

    def means(self) -> dict[str, float]:
        """Metrics by name, averaged since the previous row; the loss is left for Trainer to log."""
        return {k: round(v / self.count, 6) for k, v in self.sums.items() if k != "loss"}

    def on_train_begin(self, args, state, control, **kwargs):
        self._clear()
        self.start, self.first = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        kept = self._kept(state.global_step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)
        temporary.replace(self.path)
        self.before = seconds_so_far(self.path, self.phase)

    def _kept(self, step: int) -> list[dict]:
        """Rows up to ``step``. Training gates keeps the routers' rows; training routers afresh drops all rows."""
        if not self.path.exists() or (self.phase == "routers" and step == 0):
            return []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in (*row, *row.values())]  # a kill may truncate the last
        if reader.fieldnames != self.columns:
            other = sorted(set(reader.fieldnames or ()) ^ set(self.columns)) or ["another order"]
            raise HatError(f"{self.path} has other columns than this run writes, {other[0]} for one: move it away")
        last = {"routers": math.inf, self.phase: step}
        return [row for row in rows if int(row["step"]) <= last.get(row["phase"], -1)]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.count or not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        now = time.monotonic()
        row = {name: f"{total / self.count:.6g}" for name, total in self.sums.items()}
        if isinstance(self.site_share, torch.Tensor):
            share = self.site_share / self.count
            by_layer = share @ torch.tensor(self.hat.site_work)
            row |= {f"share_{s}": f"{v:.4f}" for s, v in zip(self.hat.grain.sites, share.mean(0).tolist(), strict=True)}
            row |= {f"share_{i}": f"{v:.4f}" for i, v in enumerate(by_layer.tolist())}
        pace = (now - self.start) / max(1, state.global_step - self.first)
        row |= {
            "phase": self.phase,
            "step": state.global_step,
            "steps": state.max_steps,
            "seconds": f"{self.before + now - self.start:.1f}",
            "grad_norm": f"{float(logs.get('grad_norm', math.nan)):.4g}",
            "learning_rate": f"{logs.get('learning_rate', math.nan):.4g}",
            "tokens_per_second": f"{self.tokens * args.world_size / (now - self.since):.0f}",
            "eta_seconds": f"{pace * (state.max_steps - state.global_step):.0f}",
        }
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        self._clear()


def seconds_so_far(path: Path, phase: str) -> float:
    """Seconds a phase had taken by its last row, summed over all resumptions; 0 without a row."""
    if not path.exists():
        return 0.0
    with path.open(newline="") as file:
        return max((float(row["seconds"]) for row in csv.DictReader(file) if row["phase"] == phase), default=0.0)


class Bar(ProgressCallback):
    """Trainer's progress bar, showing phase and loss instead of printing a line for every logged step."""

    def __init__(self, phase: str):
        super().__init__()
        self.phase = phase

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_description(f"{self.phase}, loss {logs['loss']:.4g}")
