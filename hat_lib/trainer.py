"""One phase of training on `transformers.Trainer`.

Progress bars, tensorboard, gradient accumulation, resuming and `torchrun` are Trainer's. Ours are the objective, what
is saved (routers and gates, never the base), and three ways to stop without loss: a time limit, Ctrl-C, and a
number that is not finite.

Resume files of Trainer hold pickles: they are read with ``weights_only=True``, from the run's own folder alone.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .checkpoint import read_checkpoint
from .config import HatError
from .model import HierarchicalTransformer
from .objective import Objective, Thresholds
from .recipe import Recipe
from .train_log import CsvLog


@dataclass(frozen=True)
class Outcome:
    """How a phase ended."""

    phase: str
    step: int
    steps: int
    seconds: float
    stopped: str = ""
    """"time", "interrupt", or empty when it ran to the end"""

    @property
    def done(self) -> bool:
        return not self.stopped


class HatTrainer(Trainer):
    """`Trainer` for an `Objective`: its loss, its adapter-only files, and a stop at the first NaN."""

    loss_is_scaled_for_ga = False  # ours is a mean over the micro-batch: Trainer divides by the accumulation

    def __init__(self, *args, record: CsvLog, **kwargs):
        super().__init__(*args, **kwargs)
        self.record = record
        self.add_callback(record)
        self.add_callback(_CheckGradients(self))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, step=self.state.global_step, steps=self.state.max_steps)
        if not torch.isfinite(out["loss"]):
            layer = first_bad_layer(self.model.hat, inputs)
            self._stop_at(f"the loss is {float(out['loss'])}", layer)
        self.record.note(out, int(inputs["attention_mask"].sum()))
        return (out["loss"], out) if return_outputs else out["loss"]

    def log(self, logs, start_time=None):
        if "loss" in logs:  # one step's metrics, for tensorboard and the table in a notebook
            logs |= self.record.means()
        super().log(logs, start_time)

    def check_gradients(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                self._stop_at(f"the gradient of {name} is not finite", None)

    def _stop_at(self, what: str, layer: str | None) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        where = f", first in {layer}" if layer else ""
        last = get_last_checkpoint(self.args.output_dir)
        kept = f"the checkpoint of step {last.rsplit('-', 1)[1]} is intact" if last else "nothing was saved before"
        raise HatError(f"training stopped at step {self.state.global_step}: {what}{where}, lr {rate:.3g}; {kept}")

    def _save(self, output_dir=None, state_dict=None):
        self.model.hat.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.hat.load_adapter(read_checkpoint(resume_from_checkpoint), resume_from_checkpoint)


class _CheckGradients(TrainerCallback):
    def __init__(self, trainer: HatTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.check_gradients()


class _Stops(TrainerCallback):
    """Stop in good order: at the time limit, or at the first Ctrl-C."""

    def __init__(self, max_minutes: float | None):
        self.limit = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.reason = ""

    def interrupt(self, *_) -> None:
        if self.reason:
            raise KeyboardInterrupt  # the second time at once
        self.reason = "interrupt"

    def on_step_end(self, args, state, control, **kwargs):
        if self.limit is not None and time.monotonic() > self.limit and not self.reason:
            self.reason = "time"
        if self.reason and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True


def train_phase(
    hat: HierarchicalTransformer,
    blocks: Dataset,
    recipe: Recipe,
    phase: str,
    thresholds: Thresholds,
    folder: Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    max_steps: int = -1,
    progress: bool = True,
) -> Outcome:
    """Run one phase in ``folder/work/<phase>``; ``hat`` holds the trained parameters afterwards.

    Args:
        blocks: rows of `training_text`.
        phase: "routers" or "exit".
        thresholds: see `Objective`.
        resume: go on from the newest sound checkpoint of this phase, if there is one.
        max_minutes: stop, saved, at the first step past this many minutes.
        max_steps: fewer steps than the epochs give; -1 for all.

    Raises `HatError` at the first loss or gradient that is not finite. At Ctrl-C the step is finished and saved.
    """
    work = folder / "work" / phase
    epochs, rate = (
        (recipe.router_epochs, recipe.router_lr) if phase == "routers" else (recipe.exit_epochs, recipe.exit_lr)
    )
    device = hat.base.device.type
    args = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=rate,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,  # below 1: a share of all steps
        max_grad_norm=recipe.max_grad_norm,
        logging_steps=recipe.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a NaN behind the running mean
        save_steps=recipe.save_steps,
        save_total_limit=2,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=device == "cpu",
        bf16=hat.base.dtype == torch.bfloat16,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device == "cuda",
        report_to=["tensorboard"],
        disable_tqdm=not progress,
    )
    objective = Objective(hat, recipe, phase, thresholds)
    stops = _Stops(max_minutes)
    trainer = HatTrainer(
        model=objective,
        args=args,
        train_dataset=blocks,
        data_collator=collate,
        callbacks=[stops],
        record=CsvLog(folder / "log.csv", phase, hat),
    )
    start, last = time.monotonic(), sound_checkpoint(work) if resume else None
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, stops.interrupt)
    try:
        trainer.train(resume_from_checkpoint=last and str(last))
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
        hat.eval()
        for p in hat.hat_parameters().values():
            p.requires_grad_(True)
    for router in hat.routers.values():  # what they precompute from their parameters
        router.set_threshold(router.threshold)
    state = trainer.state
    stopped = stops.reason if state.global_step < state.max_steps else ""
    return Outcome(phase, state.global_step, state.max_steps, time.monotonic() - start, stopped)


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Blocks to ``input_ids, attention_mask [B, T]``, right-padded, and ``index [B]``; int64."""
    width = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], mask[i, :n] = torch.as_tensor(row["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask, "index": torch.tensor([row["index"] for row in rows])}


def sound_checkpoint(work: Path) -> Path | None:
    """The newest of Trainer's checkpoints that is complete; half-written ones are passed over.

    Trainer writes straight into ``checkpoint-N``, its ``trainer_state.json`` last.
    """
    found = sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True)
    for folder in found:
        try:
            state = json.loads((folder / "trainer_state.json").read_text())
            read_checkpoint(folder)
            for file in ("optimizer.pt", "scheduler.pt"):
                torch.load(folder / file, weights_only=True, map_location="cpu")
            if state["global_step"] == int(folder.name.rsplit("-", 1)[1]):
                return folder
        except (HatError, OSError, ValueError, KeyError, RuntimeError):
            continue
    return None


@torch.no_grad()
def first_bad_layer(hat: HierarchicalTransformer, inputs: dict) -> str | None:
    """Where a value that is not finite first appears, as the dense base and the routers compute this batch."""
    for name, parameter in hat.named_parameters():
        if not torch.isfinite(parameter).all():
            return name
    bad: list[str] = []

    def watch(i):
        return lambda module, args, output: bad.append(f"layer {i}") if not torch.isfinite(output).all() else None

    hooks = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(hat.lm.model.layers)]
    try:
        with hat.dense():
            hat.lm.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None
