"""What a run writes down while it trains: one CSV row per logged step, which notebooks plot live.

Columns: phase, step, steps, seconds, then the metrics of `hat_lib.training.objective` averaged since the row before,
the share of each layer (``share_L``) and of each site (``share_qkv`` ...), gradient norm, learning rate, tokens per
second and the estimated seconds left. A cell is empty where a phase has no such metric. A resumed run drops the rows
past the step that it goes on from.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback

from hat_lib.model.transformer import HierarchicalTransformer

METRICS = ("loss", "capacity", "kl", "share", "z_loss", "entropy", "gate_loss", "wrong", "exit_rate", "agreement")


class CsvLog(TrainerCallback):
    """Appends to ``path``; only the main process writes."""

    def __init__(self, path: Path, phase: str, hat: HierarchicalTransformer):
        self.path, self.phase, self.hat = Path(path), phase, hat
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, float] = {}
        self.site_share, self.count, self.tokens = None, 0, 0
        self.since = time.monotonic()

    def note(self, metrics: dict, tokens: int) -> None:
        """Add one micro-batch: what `Objective` returned, and its real tokens."""
        for name in METRICS:
            if name in metrics:
                self.sums[name] = self.sums.get(name, 0.0) + float(
                    metrics[name].detach() if isinstance(metrics[name], torch.Tensor) else metrics[name]
                )
        if "site_share" in metrics:
            share = metrics["site_share"].cpu()
            self.site_share = share if self.site_share is None else self.site_share + share
        self.count, self.tokens = self.count + 1, self.tokens + tokens

    def means(self) -> dict[str, float]:
        """Metrics by name, averaged since the row before; the loss is Trainer's to log."""
        return {k: round(v / self.count, 6) for k, v in self.sums.items() if k != "loss"}

    def on_train_begin(self, args, state, control, **kwargs):
        self._clear()
        self.start = time.monotonic()
        self.first = state.global_step
        if not state.is_world_process_zero:
            return
        kept = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                whole = [r for r in csv.DictReader(file) if None not in (*r, *r.values())]  # a kill may cut the last
                kept = [r for r in whole if not self._later(r, state.global_step)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.columns = list(kept[0]) if kept else self._columns()
        temporary = self.path.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)
        temporary.replace(self.path)
        self.before = seconds_so_far(self.path, self.phase)

    def _columns(self) -> list[str]:
        shares = [f"share_{s}" for s in self.hat.grain.sites] + [f"share_{i}" for i in range(self.hat.config.n_layers)]
        tail = ["grad_norm", "learning_rate", "tokens_per_second", "eta_seconds"]
        return ["phase", "step", "steps", "seconds", *METRICS, *shares, *tail]

    def _later(self, row: dict, step: int) -> bool:
        if row["phase"] == self.phase:
            return int(row["step"]) > step or step == 0
        return self.phase == "routers"  # gates are trained on these routers

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.count or not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        now = time.monotonic()
        row = {name: f"{total / self.count:.6g}" for name, total in self.sums.items()}
        if self.site_share is not None:
            share = self.site_share / self.count
            work = torch.tensor(self.hat.site_work)
            row |= {f"share_{s}": f"{v:.4f}" for s, v in zip(self.hat.grain.sites, share.mean(0).tolist(), strict=True)}
            row |= {f"share_{i}": f"{v:.4f}" for i, v in enumerate((share @ work).tolist())}
        done = max(1, state.global_step - self.first)
        row |= {
            "phase": self.phase,
            "step": state.global_step,
            "steps": state.max_steps,
            "seconds": f"{self.before + now - self.start:.1f}",
            "grad_norm": f"{float(logs.get('grad_norm', float('nan'))):.4g}",
            "learning_rate": f"{logs.get('learning_rate', float('nan')):.4g}",
            "tokens_per_second": f"{self.tokens * args.world_size / (now - self.since):.0f}",
            "eta_seconds": f"{(now - self.start) / done * (state.max_steps - state.global_step):.0f}",
        }
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        self._clear()


def seconds_so_far(path: Path, phase: str) -> float:
    """Seconds that a phase has taken by its last row, over all the times that it was resumed; 0 without a row."""
    if not path.exists():
        return 0.0
    with path.open(newline="") as file:
        return max((float(row["seconds"]) for row in csv.DictReader(file) if row["phase"] == phase), default=0.0)


class Bar(ProgressCallback):
    """Trainer's bar with the loss on it, instead of a line for every logged step."""

    def __init__(self, phase: str):
        super().__init__()
        self.phase = phase

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.phase)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}")
