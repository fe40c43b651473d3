"""One phase of training: data, loss, backward, AdamW along a cosine, and checkpoints to resume from. A time limit,
Ctrl-C, SIGTERM (what a cluster sends before it kills) and a number that is not finite stop it without losing work.

The order of the blocks, and all that is random, is a function of (seed, step). So a checkpoint is the routers and
gates, the optimizer's state and the number of the step, and processes under `torchrun` share the micro-batches that one
process would take with gradient accumulation.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from hat_lib.backbone.base import first_line
from hat_lib.config import HatError
from hat_lib.model.checkpoint import read_checkpoint
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.training.budget_split import FILE as SPLIT_FILE
from hat_lib.training.budget_split import Thresholds
from hat_lib.training.log import Log
from hat_lib.training.objective import Objective
from hat_lib.training.recipe import Recipe
from hat_lib.training.validation import extend_curve

STATE_FILE = "state.pt"
"""step and optimizer, in the folder of a training state; read with ``weights_only=True``"""


@dataclass(frozen=True)
class Outcome:
    """How a phase ended."""

    phase: str
    step: int
    steps: int
    seconds: float
    stopped: str = ""
    """"time", "interrupt", "terminate", or empty if it ran to the end"""
    thresholds: Thresholds | None = field(default=None, repr=False)
    """those that the routers were trained at in the end, their learned split included"""

    @property
    def done(self) -> bool:
        return not self.stopped


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
    validation: Dataset | None = None,
    watch: Callable[[bool], None] | None = None,
) -> Outcome:
    """Train ``hat`` in one phase; its capacity, exit rate and calibration stay, all its parameters require a gradient
    afterwards.

    Args:
        blocks: rows of `training_text`.
        phase, thresholds: as for `Objective`.
        resume: continue from the last checkpoint of this phase, if there is one.
        max_minutes: save and stop at the first step past this many minutes.
        max_steps: in place of the recipe's epochs, unless it is -1.
        validation: rows of `load_text` for a learning curve, in phase "routers" only.
        watch: called in the main process with False before each step, with True at the end.

    Raises `HatError` at the first loss or gradient that is not finite. On Ctrl-C or SIGTERM the step is finished
    and saved; SIGTERM is then raised again, for whoever handled it before.
    """
    processes, began = PartialState(cpu=not torch.cuda.is_available()), time.monotonic()
    main, work = processes.is_main_process, folder / "work" / phase
    objective = Objective(hat, recipe, phase, thresholds).train()
    per_step = recipe.accumulate * processes.num_processes
    epochs = recipe.router_epochs if phase == "routers" else recipe.exit_epochs
    steps = max_steps if max_steps > 0 else math.ceil(epochs * steps_per_epoch(len(blocks), recipe, per_step))
    optimizer = _optimizer(objective)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps * recipe.warmup), steps)

    last = last_checkpoint(work) if resume else None
    start = _load(last, objective, optimizer, schedule) if last else 0
    processes.wait_for_everyone()
    if main and not last:
        shutil.rmtree(work, ignore_errors=True)
    model = objective
    if processes.num_processes > 1:
        # A router that is never asked, as where layer 0 always runs, gets no gradient to wait for.
        unused = phase == "routers" and any(hat.grain.always_runs(0, site) for site in hat.grain.sites)
        model = DistributedDataParallel(objective, find_unused_parameters=unused)
    log = Log(folder / "log.csv", work, phase, hat, start, steps, processes.num_processes) if main else None

    def measure(step: int) -> None:
        if main and validation is not None and phase == "routers":
            tokens = step * recipe.batch_size * per_step * recipe.block_size
            extend_curve(folder / "validation.csv", hat, validation, objective.thresholds, step, tokens)

    stops, step = Stops(max_minutes), start
    bar = tqdm(total=steps, initial=start, desc=phase, unit="step", disable=not progress)
    try:
        if not start:
            measure(0)
        with stops.caught():
            while step < steps and not stops.reason:
                if watch and main:
                    watch(False)
                step_began = time.monotonic()
                micro_batches = step_rows(len(blocks), recipe, per_step, step)
                micro_batches = micro_batches[processes.process_index :: processes.num_processes]
                for number, rows in enumerate(micro_batches, start=1):
                    batch = collate([blocks[i] for i in rows], hat.base.device)
                    waits = model is not objective and number < len(micro_batches)
                    with model.no_sync() if waits else nullcontext():
                        out = _backward(model, batch, step, steps, len(micro_batches), hat.base.dtype)
                    if log:
                        log.add(out, int(batch["attention_mask"].sum()))
                norm, used_rate = _clip(objective, step), schedule.get_last_lr()[0]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                if log and (step == 1 or step % recipe.log_steps == 0):
                    bar.set_description(f"{phase}, loss {log.write(step, norm, used_rate):.4g}")
                stops.check(processes, step == steps)
                if main and (stops.reason or step % recipe.save_steps == 0 or step == steps):
                    _save(work, step, objective, optimizer, schedule)
                    measure(step)
                bar.update()
                if progress and step == start + 2 and step < steps:  # the first step allocates
                    each = time.monotonic() - step_began
                    minutes = (steps - step) * each / 60
                    tqdm.write(f"{phase}: {steps} steps of about {each:.2g} s, about {minutes:.0f} minutes", sys.stderr)
            stops.check(processes, True)  # a Ctrl-C while the last step was being saved
    finally:
        bar.close()
        if log:
            log.close()
        end_training(hat)
    if watch and main:
        watch(True)
    return Outcome(phase, step, steps, time.monotonic() - began, stops.reason, objective.thresholds)


class Stops:
    """Stop cleanly, all processes after the same step: at the time limit, on Ctrl-C, on SIGTERM."""

    REASONS = ("", "time", "interrupt", "terminate")
    SIGNALS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate"}

    def __init__(self, max_minutes: float | None):
        self.limit = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.asked, self.since, self.reason = "", 0.0, ""

    def receive(self, number: int, frame=None) -> None:
        """The first signal ends training after the current step; a later Ctrl-C ends it now."""
        if not self.asked:
            self.asked, self.since = self.SIGNALS[number], time.monotonic()
        # Within a second, it is torchrun passing on what the terminal has already sent.
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt

    @contextmanager
    def caught(self):
        """Handle signals here. SIGTERM is then raised again for its previous handler: by default the process ends."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return
        before = {number: signal.signal(number, self.receive) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if "terminate" in (self.asked, self.reason):
                signal.raise_signal(signal.SIGTERM)

    def check(self, processes: PartialState, finished: bool) -> None:
        """Set ``reason``, the same in all processes; a time limit does not matter to a phase that is finished."""
        late = time.monotonic() > self.limit and not finished
        reason = self.REASONS.index(self.asked or ("time" if late else self.reason))
        if processes.num_processes > 1:
            highest = torch.tensor(reason, device=processes.device)
            distributed.all_reduce(highest, distributed.ReduceOp.MAX)
            reason = int(highest)
        self.reason = self.REASONS[reason]


def _backward(model, batch: dict, step: int, steps: int, parts: int, dtype: torch.dtype) -> dict:
    """Add the gradient of one of a step's ``parts``; returns its loss and metrics."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(**batch, step=step, steps=steps)
    if not torch.isfinite(out["loss"]):
        raise HatError(f"training stopped in step {step + 1}: the loss is {out['loss'].item()}")
    (out["loss"] / parts).backward()
    return out


def steps_per_epoch(n_rows: int, recipe: Recipe, per_step: int) -> int:
    """Steps of ``per_step`` micro-batches that an epoch takes."""
    return math.ceil(math.ceil(n_rows / recipe.batch_size) / per_step)


def step_rows(n_rows: int, recipe: Recipe, per_step: int, step: int) -> list[list[int]]:
    """The rows of each of the ``per_step`` micro-batches of a step, over all processes. Each epoch has an order of its
    own; its last step is filled up from its beginning."""
    epoch, position = divmod(step, steps_per_epoch(n_rows, recipe, per_step))
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(recipe.seed + epoch))
    batches = order.split(recipe.batch_size)
    return [batches[(position * per_step + i) % len(batches)].tolist() for i in range(per_step)]


def collate(rows: list[dict], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Blocks to ``input_ids, attention_mask [B, T]``, right-padded, and ``index [B]`` of the samples; all int64."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    index = torch.tensor([row["index"] for row in rows])
    batch = {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask, "index": index}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _optimizer(objective: Objective) -> torch.optim.Optimizer:
    recipe = objective.recipe
    rate = recipe.router_lr if objective.phase == "routers" else recipe.exit_lr
    own = {"split": recipe.split_lr, "corrections": recipe.correction_lr}
    groups: dict[float, list] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            part = name.removeprefix("hat.").split(".")[0]
            groups.setdefault(own.get(part, rate), []).append(parameter)
    return torch.optim.AdamW([{"params": p, "lr": r} for r, p in groups.items()], weight_decay=0.0, fused=True)


def _clip(objective: Objective, step: int) -> float:
    """Scale the gradients down to the recipe's largest global norm; returns what it was."""
    norm = float(clip_grad_norm_(objective.parameters(), objective.recipe.max_grad_norm))
    if not math.isfinite(norm):
        raise HatError(f"training stopped in step {step + 1}: the gradient is not finite; try a lower learning rate")
    return norm


def last_checkpoint(work: Path) -> Path | None:
    """The newest of the folders ``checkpoint-N``; each was moved there when it was complete."""
    return max(work.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)


def _save(work: Path, step: int, objective: Objective, optimizer, schedule) -> None:
    """Write ``checkpoint-N``, then remove the older ones."""
    work.mkdir(parents=True, exist_ok=True)
    older = list(work.glob("checkpoint-*"))
    try:
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            new = Path(scratch) / "new"
            objective.hat.save_pretrained(new)
            if objective.split:
                save_file(objective.split.state_dict(), new / SPLIT_FILE)
            state = {"step": step, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state, new / STATE_FILE)
            new.rename(work / f"checkpoint-{step}")
    except (OSError, RuntimeError, SafetensorError) as error:  # which is how a full disk is reported
        raise HatError(f"cannot write a checkpoint to {work}: {first_line(error)}") from error
    for folder in older:
        shutil.rmtree(folder)


def _load(folder: Path, objective: Objective, optimizer, schedule) -> int:
    """Continue from a checkpoint; returns its step."""
    objective.hat.load_adapter(read_checkpoint(folder), folder)
    if objective.split:
        objective.split.load_state_dict(load_file(folder / SPLIT_FILE))
    state = torch.load(folder / STATE_FILE, weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


def end_training(hat: HierarchicalTransformer) -> None:
    """Make ``hat`` ready for use again after an `Objective` has trained it."""
    hat.eval()
    for p in hat.hat_parameters().values():
        p.requires_grad_(True)
