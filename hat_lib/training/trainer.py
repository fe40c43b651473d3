"""One phase of training: data, loss, backward, AdamW along a cosine, and checkpoints to resume from. A time limit,
Ctrl-C, SIGTERM (what a cluster sends before it kills) and a number that is not finite stop it without losing work.

The order of the blocks, and all that is random, is a function of (seed, step). So a run goes on from the trained
parameters, the optimizer's state and the number of the step, and processes under `torchrun` share the micro-batches
that one would take with gradient accumulation.
"""

import io
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from datasets import Dataset
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from hat_lib.config import HatError, replaced
from hat_lib.hat import HierarchicalTransformer
from hat_lib.training.log import Log, extend_curve
from hat_lib.training.objective import Objective, ThresholdsAt
from hat_lib.training.recipe import Recipe

LOG_FILE, CURVE_FILE, WORK = "log.csv", "validation.csv", "work"
STATE_FILE = "state.pt"  # step, trained parameters and optimizer, in the work folder of a phase


@dataclass(frozen=True)
class Outcome:
    """How a phase ended."""

    phase: str
    step: int
    steps: int
    seconds: float
    stopped: str  #: "time", "interrupt", "terminate", or empty if it ran to the end
    thresholds: ThresholdsAt = field(repr=False)  #: of the routers in the end, their learned split included

    @property
    def done(self) -> bool:
        return not self.stopped


def train_phase(
    hat: HierarchicalTransformer,
    blocks: Dataset,
    recipe: Recipe,
    phase: str,
    thresholds: ThresholdsAt,
    folder: Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    max_steps: int = -1,
    progress: bool = True,
    validation: Dataset | None = None,
) -> Outcome:
    """Train ``hat`` in one phase; its capacity, exit rate and calibration stay, all its parameters require a gradient
    afterwards.

    Args:
        blocks: rows of `training_text`.
        phase, thresholds: as for `Objective`.
        resume: continue from the last state of this phase, if there is one.
        max_minutes: save and stop at the first step past this many minutes.
        max_steps: in place of the recipe's epochs, unless it is -1.
        validation: rows of `load_text` for a learning curve, in phase "routers" only.

    Raises `HatError` at the first loss or gradient that is not finite. Ctrl-C and SIGTERM: see `Stops`.
    """
    processes, began = PartialState(cpu=not torch.cuda.is_available()), time.monotonic()
    main, state = processes.is_main_process, folder / WORK / phase / STATE_FILE
    objective, device = Objective(hat, recipe, phase, thresholds), hat.base.device
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=hat.base.dtype == torch.bfloat16)
    per_step = recipe.accumulate * processes.num_processes
    epochs = recipe.router_epochs if phase == "routers" else recipe.exit_epochs
    steps = max_steps if max_steps > 0 else math.ceil(epochs * steps_per_epoch(len(blocks), recipe, per_step))
    optimizer = _optimizer(objective)
    start = _load(state, objective, optimizer) if resume and state.exists() else 0
    warmup = math.ceil(steps * recipe.warmup)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps, last_epoch=start - 1)

    processes.wait_for_everyone()
    if main and not start:
        state.unlink(missing_ok=True)
    log, done, tokens = Log(folder / LOG_FILE, objective, start, steps) if main else None, [], 0

    lengths, curve = [len(ids) for ids in blocks["input_ids"]], validation is not None and phase == "routers"
    before = [step_rows(len(blocks), recipe, per_step, step) for step in range(start)] if curve else []
    trained_on = sum(lengths[i] for micro_batches in before for i in chain(*micro_batches))

    def measure(step: int) -> None:
        if main and curve:
            extend_curve(folder / CURVE_FILE, hat, validation, objective.thresholds, step, trained_on)

    stops, step = Stops(max_minutes), start
    bar = tqdm(total=steps, initial=start, desc=phase, unit="step", disable=not progress)
    try:
        if not start:
            measure(0)
        with stops.caught():
            while step < steps and not stops.reason:
                micro_batches = step_rows(len(blocks), recipe, per_step, step)
                trained_on += sum(lengths[i] for i in chain(*micro_batches))
                for rows in micro_batches[processes.process_index :: processes.num_processes]:
                    batch = collate([blocks[i] for i in rows], device)
                    with autocast():
                        out = objective(**batch, step=step, steps=steps)
                    if not torch.isfinite(out["loss"]):
                        raise HatError(f"training stopped in step {step + 1}: the loss is {out['loss'].item()}")
                    (out["loss"] / recipe.accumulate).backward()
                    done.append(out | {"loss": out["loss"].detach()})
                    tokens += int(batch["attention_mask"].sum())
                for parameter in objective.parameters():  # the same ones have a gradient in every process
                    if parameter.grad is not None:
                        parameter.grad = reduce(parameter.grad)
                norm, used_rate = _clip(objective, step), schedule.get_last_lr()[0]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                stops.check(step == steps)
                last = bool(stops.reason) or step == steps
                if step == 1 or step % recipe.log_steps == 0 or last:
                    if log:
                        loss = log.write(step, done, tokens, norm, used_rate)
                        bar.set_description(f"{phase}, loss {loss:.4g}")
                    done, tokens = [], 0
                if main and (step % recipe.save_steps == 0 or last):
                    _save(state, step, objective, optimizer)
                    measure(step)
                bar.update()
            stops.check(True)  # a Ctrl-C while the last step was being saved
    finally:
        bar.close()
        for parameter in hat.hat_parameters().values():
            parameter.requires_grad_(True)
    return Outcome(phase, step, steps, time.monotonic() - began, stops.reason, objective.thresholds)


class Stops:
    """Stop all processes after the same step, saved: at the time limit, on Ctrl-C, on SIGTERM."""

    REASONS = ("", "time", "interrupt", "terminate")
    SIGNALS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate"}

    def __init__(self, max_minutes: float | None):
        self.limit = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.asked, self.since, self.reason = "", 0.0, ""

    def receive(self, number: int, frame=None) -> None:
        """The first signal ends training after the current step; a later Ctrl-C ends it now."""
        if not self.asked:
            self.asked, self.since = self.SIGNALS[number], time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:  # before, torchrun may have passed it on
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

    def check(self, finished: bool) -> None:
        """Set ``reason``, the same in all processes; a time limit does not matter to a phase that is finished."""
        late = time.monotonic() > self.limit and not finished
        reason = self.asked or ("time" if late else self.reason)
        self.reason = max(gather_object([reason]), key=self.REASONS.index)


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
    ids = [torch.tensor(row["input_ids"], device=device) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "index": torch.tensor([row["index"] for row in rows], device=device),
    }


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


def _save(path: Path, step: int, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
    """Write what `_load` needs, in place of an older state once it is whole. Of the parameters, those that this phase
    trains, a learned split among them."""
    trained = {name: parameter.detach() for name, parameter in objective.named_parameters() if parameter.requires_grad}
    state = io.BytesIO()  # torch itself, writing to a full disk, does not say that it is full
    torch.save({"step": step, "trained": trained, "optimizer": optimizer.state_dict()}, state)
    try:
        with replaced(path) as written:
            written.write_bytes(state.getbuffer())
    except OSError as error:
        raise HatError(f"cannot write {path}: {error.strerror or error}") from error


def _load(path: Path, objective: Objective, optimizer: torch.optim.Optimizer) -> int:
    """Continue from a state; returns its step."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    objective.load_state_dict(state["trained"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
