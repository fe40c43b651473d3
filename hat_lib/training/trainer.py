"""One phase of training on `transformers.Trainer`.

Progress bars, tensorboard, gradient accumulation, resuming and `torchrun` are Trainer's. Ours are the objective, what
is saved (routers and gates, never the base), and three ways to stop without loss: a time limit, Ctrl-C, and a
number that is not finite.

Resume files of Trainer hold pickles: they are read with ``weights_only=True``, from the run's own folder alone.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, distributed
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import safe_globals

from hat_lib.config import HatError
from hat_lib.model.checkpoint import read_checkpoint
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.training.log import Bar, CsvLog
from hat_lib.training.objective import Objective, Thresholds
from hat_lib.training.recipe import Recipe


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
        # One line for every logged step is what log.csv is for. A notebook's table is another callback, and stays.
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(Bar(record.phase))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, step=self.state.global_step, steps=self.state.max_steps)
        if not torch.isfinite(out["loss"]):
            where = first_bad_layer(self.model.hat, inputs)
            self._stop(f"the loss is {out['loss'].item()}, first in {where}")
        self.record.note(out, int(inputs["attention_mask"].sum()))
        return (out["loss"], out) if return_outputs else out["loss"]

    def log(self, logs, start_time=None):
        if "loss" in logs:  # one step's metrics, for tensorboard and the table in a notebook
            logs |= self.record.means()
        super().log(logs, start_time)

    def _clip_grad_norm(self, model):
        # Before the clipping, which divides by the norm of all, and so spreads one NaN to every parameter.
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                self._stop(f"the gradient of {name.removeprefix('hat.')} is not finite")
        return super()._clip_grad_norm(model)

    def _stop(self, what: str) -> None:
        step, rate = self.state.global_step + 1, self.optimizer.param_groups[0]["lr"]
        last = sound_checkpoint(Path(self.args.output_dir))
        kept = f"the checkpoint of step {_step(last)} is intact" if last else "nothing was saved before"
        raise HatError(f"training stopped in step {step}: {what}, lr {rate:.3g}; {kept}")

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:  # every process is asked
            self.model.hat.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.hat.load_adapter(read_checkpoint(resume_from_checkpoint), resume_from_checkpoint)


class _Stops(TrainerCallback):
    """Stop in good order, all processes after the same step: at the time limit, or at the first Ctrl-C."""

    REASONS = ("", "time", "interrupt")

    def __init__(self, max_minutes: float | None):
        self.limit = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.interrupted: float | None = None
        self.reason = ""

    def interrupt(self, *_) -> None:
        now = time.monotonic()
        if self.interrupted is None:
            self.interrupted = now
        elif now - self.interrupted > 1:  # sooner, it is torchrun that passes on what the terminal has sent already
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        self._decide(args, state)
        if self.reason:
            control.should_training_stop = control.should_save = True

    def on_train_end(self, args, state, control, **kwargs):
        self._decide(args, state)  # Ctrl-C while the last step was saved

    def _decide(self, args, state) -> None:
        late = self.limit is not None and time.monotonic() > self.limit and state.global_step < state.max_steps
        reason = 2 if self.interrupted else int(late)
        if args.world_size > 1:  # what one of them wants, all do
            highest = torch.tensor(reason, device=args.device)
            distributed.all_reduce(highest, distributed.ReduceOp.MAX)
            reason = int(highest)
        self.reason = self.REASONS[reason]


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
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Run one phase in the subfolder ``work/<phase>`` of ``folder``; ``hat`` holds the trained parameters afterwards.

    Args:
        blocks: rows of `training_text`.
        phase: "routers" or "exit".
        thresholds: see `Objective`.
        resume: go on from the newest sound checkpoint of this phase, if there is one.
        max_minutes: stop, saved, at the first step past this many minutes.
        max_steps: fewer steps than the epochs give; -1 for all.
        callbacks: more of Trainer's, such as `hat_lib.plotting.training.Live`.

    Raises `HatError` at the first loss or gradient that is not finite. At Ctrl-C the step is finished and saved.
    """
    work = folder / "work" / phase
    last = sound_checkpoint(work) if resume else None
    if last:
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        if state.global_step >= state.max_steps:  # stopped after its last step; Trainer would take one more
            hat.load_adapter(read_checkpoint(last), last)
            return Outcome(phase, state.global_step, state.max_steps, 0.0)
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
        # The token router of layer 0 is never asked, and waiting for its gradient would be an error.
        ddp_find_unused_parameters=phase == "routers" and hat.config.granularity == "token",
        dataloader_pin_memory=device == "cuda",
        report_to=["tensorboard"],
        disable_tqdm=not progress,
    )
    # Without torchrun one GPU: DataParallel would copy a model whose layers call into the original.
    args._n_gpu = min(1, args.n_gpu)
    # It doubts the file system's clock whenever two checkpoints are less than a second apart.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    objective = Objective(hat, recipe, phase, thresholds)
    stops = _Stops(max_minutes)
    trainer = HatTrainer(
        model=objective,
        args=args,
        train_dataset=blocks,
        data_collator=collate,
        callbacks=[stops, *callbacks],
        record=CsvLog(folder / "log.csv", phase, hat),
    )
    start = time.monotonic()
    if last and args.should_save:  # what is newer is half-written, and would count as the newest when old ones go
        for newer in work.glob("checkpoint-*"):
            if _step(newer) > _step(last):
                shutil.rmtree(newer)
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, stops.interrupt)
    try:
        trainer.train(resume_from_checkpoint=last and str(last))
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
        end_training(hat)
    state = trainer.state
    return Outcome(phase, state.global_step, state.max_steps, time.monotonic() - start, stops.reason)


def end_training(hat: HierarchicalTransformer) -> None:
    """Put ``hat`` in order for use, after an `Objective` had it."""
    hat.eval()
    for p in hat.hat_parameters().values():
        p.requires_grad_(True)


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
    for folder in sorted(work.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            state = json.loads((folder / "trainer_state.json").read_text())
            read_checkpoint(folder)
            with safe_globals():  # numpy's random state
                for file in {folder / "optimizer.pt", folder / "scheduler.pt", *folder.glob("*.pth")}:
                    torch.load(file, weights_only=True, map_location="cpu")
            if state["global_step"] == _step(folder):
                return folder
        except (HatError, OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError):
            continue
    return None


def _step(folder: Path) -> int:
    """The step that a checkpoint folder is named after."""
    number = folder.name.rsplit("-", 1)[1]
    return int(number) if number.isdecimal() else -1


@torch.no_grad()
def first_bad_layer(hat: HierarchicalTransformer, inputs: dict) -> str:
    """Where a value that is not finite first appears: a parameter, a layer of the dense base, or what comes after."""
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
    return bad[0] if bad else "no layer of the base: a router, a gate, the head or the loss"
