"""One phase of training on `transformers.Trainer`.

Progress bars, tensorboard, gradient accumulation, resuming and `torchrun` come from Trainer. Ours are the objective,
what is saved (routers and gates, never the base), and four ways to stop without losing work: a time limit, Ctrl-C,
SIGTERM (what a cluster sends before it kills), and a number that is not finite. Trainer's resume files hold pickles:
they are read with ``weights_only=True``, and only from the run's own folder.
"""

from __future__ import annotations

import logging
import math
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import sort_checkpoints

from hat_lib.backbone.base import first_line
from hat_lib.config import HatError
from hat_lib.model.checkpoint import read_checkpoint
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.training.budget_split import FILE as SPLIT_FILE
from hat_lib.training.budget_split import Thresholds
from hat_lib.training.log import Bar, CsvLog
from hat_lib.training.objective import Objective
from hat_lib.training.recipe import Recipe
from hat_lib.training.validation import Validation


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


class HatTrainer(Trainer):
    """`Trainer` for an `Objective`: its loss, its adapter-only files, and a stop at the first NaN."""

    loss_is_scaled_for_ga = False  # ours is a mean over the micro-batch: Trainer divides by the accumulation

    def __init__(self, *args, record: CsvLog, stops: _Stops, **kwargs):
        super().__init__(*args, callbacks=[stops, *kwargs.pop("callbacks")], **kwargs)
        self.record, self.stops = record, stops
        self.add_callback(record)
        # A line for every logged step is what log.csv is for. A notebook's table is a different callback, and stays.
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(Bar(record.phase))

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            recipe, rates = self.model.recipe, {}
            for name, parameter in trained.items():
                own = {"split": recipe.split_lr, "corrections": recipe.correction_lr}
                part = name.removeprefix("hat.").split(".")[0]
                rates.setdefault(own.get(part, options["lr"]), []).append(parameter)
            self.optimizer = kind([{"params": ps, "lr": rate} for rate, ps in rates.items()], **options)
        return super().create_optimizer(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, step=self.state.global_step, steps=self.state.max_steps)
        if not torch.isfinite(out["loss"]):
            self._stop(f"the loss is {out['loss'].item()}, first in {_first_bad(self.model.hat, inputs)}")
        self.record.note(out, int(inputs["attention_mask"].sum()))
        return (out["loss"], out) if return_outputs else out["loss"]

    def log(self, logs, start_time=None):
        if "loss" in logs:  # one step's metrics, for tensorboard and the table in a notebook
            logs |= self.record.means()
        super().log(logs, start_time)

    def _clip_grad_norm(self, model):
        # Before clipping, which divides by the global norm and so would spread one NaN to every parameter.
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                self._stop(f"the gradient of {name.removeprefix('hat.')} is not finite")
        return super()._clip_grad_norm(model)

    def _stop(self, what: str) -> None:
        step, rate, last = self.state.global_step + 1, self._get_learning_rate(), sound_checkpoint(self.args.output_dir)
        kept = f"the checkpoint of step {_step(last)} is intact" if last else "nothing was saved before"
        raise HatError(f"training stopped in step {step}: {what}, lr {rate:.3g}; {kept}")

    def _save_checkpoint(self, model, trial):
        self.stops.saving = True
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:  # which is how a full disk is reported
            raise HatError(f"cannot write a checkpoint to {self.args.output_dir}: {first_line(error)}") from error
        finally:
            self.stops.saving = False

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:  # this is called in every process
            folder = Path(output_dir or self.args.output_dir)
            self.model.hat.save_pretrained(folder)
            if self.model.split:
                save_file(self.model.split.state_dict(), folder / SPLIT_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _load(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint):
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HatError(f"{checkpoint} is not of this run: move it away to go on without it ({error})") from error

    def _load_scaler(self, checkpoint):
        """Nothing here trains in fp16, so a ``scaler.pt`` would come from another program."""


class _Stops(TrainerCallback):
    """Stop cleanly, all processes after the same step: at the time limit, on Ctrl-C, on SIGTERM."""

    REASONS = ("", "time", "interrupt", "terminate")
    SIGNALS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate"}

    def __init__(self, max_minutes: float | None):
        self.limit = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.asked, self.since, self.saving = "", 0.0, False
        self.reason = ""

    def receive(self, number: int, frame=None) -> None:
        """The first signal ends training after the current step; a later Ctrl-C ends it now, unless it is saving."""
        now = time.monotonic()
        if not self.asked:
            self.asked, self.since = self.SIGNALS[number], now
        # Within a second, it is torchrun passing on what the terminal has already sent.
        elif number == signal.SIGINT and now - self.since > 1 and not self.saving:
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
                signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python
            if "terminate" in (self.asked, self.reason):
                signal.raise_signal(signal.SIGTERM)

    def on_step_end(self, args, state, control, **kwargs):
        late = self.limit is not None and time.monotonic() > self.limit and state.global_step < state.max_steps
        reason = self.REASONS.index(self.asked) or int(late)
        if args.world_size > 1:  # if one process stops, all do
            highest = torch.tensor(reason, device=args.device)
            distributed.all_reduce(highest, distributed.ReduceOp.MAX)
            reason = int(highest)
        self.reason = self.REASONS[reason]
        if self.reason:
            control.should_training_stop = control.should_save = True

    on_train_end = on_step_end  # for a Ctrl-C while the last step is being saved


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
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Run one phase in the subfolder ``work/<phase>`` of ``folder``; ``hat`` holds the trained parameters afterwards.

    Args:
        blocks: rows of `training_text`.
        phase, thresholds: as for `Objective`.
        resume: continue from the newest sound checkpoint of this phase, if there is one.
        max_minutes: save and stop at the first step past this many minutes.
        max_steps: overrides the epochs, to run fewer steps; -1 for all.
        validation: rows of `load_text` for a learning curve, in phase "routers" only.

    Raises `HatError` at the first loss or gradient that is not finite. On Ctrl-C or SIGTERM the step is finished
    and saved; SIGTERM is then raised again, for whoever handled it before.
    """
    work = folder / "work" / phase
    last = sound_checkpoint(work) if resume else None
    objective = Objective(hat, recipe, phase, thresholds)
    if last:
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        if state.global_step >= state.max_steps:  # it stopped after its last step; Trainer would take one more
            _load(objective, last)
            end_training(hat)
            return Outcome(phase, state.global_step, state.max_steps, 0.0, thresholds=objective.thresholds)
    own, device = "router" if phase == "routers" else "exit", hat.base.device.type
    args = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        num_train_epochs=getattr(recipe, f"{own}_epochs"),
        max_steps=max_steps,
        learning_rate=getattr(recipe, f"{own}_lr"),
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,  # below 1: a share of all steps
        max_grad_norm=recipe.max_grad_norm,
        logging_steps=recipe.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # which would hide a NaN behind the running mean
        save_steps=recipe.save_steps,
        save_total_limit=2,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=device == "cpu",
        bf16=hat.base.dtype == torch.bfloat16,
        remove_unused_columns=False,
        # A router that is never asked, as where layer 0 always runs, gets no gradient to wait for.
        ddp_find_unused_parameters=phase == "routers" and any(hat.grain.always_runs(0, s) for s in hat.grain.sites),
        dataloader_pin_memory=device == "cuda",
        report_to=["tensorboard"],
        disable_tqdm=not progress,
    )
    # One GPU without torchrun: DataParallel would copy a model whose layers call into the original.
    args._n_gpu = min(1, args.n_gpu)
    # It warns about the file system's clock whenever two checkpoints are less than a second apart.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    stops, start = _Stops(max_minutes), time.monotonic()
    if validation is not None and phase == "routers":
        step_tokens = recipe.batch_size * recipe.accumulate * args.world_size * recipe.block_size
        curve = Validation(folder / "validation.csv", hat, validation, objective.thresholds, step_tokens)
        callbacks = [*callbacks, curve]
    if last and args.should_save:  # newer ones are half-written, and would count as newest when old ones are deleted
        for newer in sort_checkpoints(str(work)):
            if _step(newer) > _step(last):
                shutil.rmtree(newer)
    try:
        trainer = HatTrainer(
            model=objective,
            args=args,
            train_dataset=blocks,
            data_collator=collate,
            callbacks=callbacks,
            stops=stops,
            record=CsvLog(folder / "log.csv", phase, hat),
        )
        if progress and not last:
            say_how_long(trainer, phase)
        with stops.caught(), _writers_closed(trainer):
            trainer.train(resume_from_checkpoint=last and str(last))
    finally:
        end_training(hat)
    state = trainer.state
    seconds = time.monotonic() - start
    return Outcome(phase, state.global_step, state.max_steps, seconds, stops.reason, objective.thresholds)


@contextmanager
def _writers_closed(trainer: Trainer):
    """Close tensorboard's files also after an error, where Trainer leaves them to a thread that goes on writing."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
                with suppress(OSError):  # of a full disk
                    callback.tb_writer.close()


def say_how_long(trainer: HatTrainer, phase: str) -> None:
    """Print how long the phase will take, before its first step, from a trial step that changes nothing."""
    loader, args = trainer.get_train_dataloader(), trainer.args
    epoch = len(loader) // args.gradient_accumulation_steps or 1
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    batch = collate([trainer.train_dataset[i] for i in range(min(args.train_batch_size, len(trainer.train_dataset)))])
    batch, seconds = {name: t.to(args.device) for name, t in batch.items()}, []
    for _ in range(2):  # the first allocates
        start = time.perf_counter()
        with trainer.compute_loss_context_manager():
            loss = trainer.model(**batch, step=0, steps=max(1, steps))["loss"]
        loss.backward()
        trainer.model.zero_grad()
        seconds.append(time.perf_counter() - start)
    each = seconds[-1] * args.gradient_accumulation_steps
    print(f"{phase}: {steps} steps of about {each:.2g} s, about {steps * each / 60:.0f} minutes", file=sys.stderr)


def _load(objective: Objective, state: Path) -> None:
    """The parameters of a training state."""
    objective.hat.load_adapter(read_checkpoint(state), state)
    if objective.split:
        try:
            objective.split.load_state_dict(load_file(state / SPLIT_FILE))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise HatError(f"{state} is not of this run: no split of its budget ({first_line(error)})") from error


def end_training(hat: HierarchicalTransformer) -> None:
    """Make ``hat`` ready for use again after an `Objective` has trained it."""
    hat.eval()
    for p in hat.hat_parameters().values():
        p.requires_grad_(True)


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Blocks to ``input_ids, attention_mask [B, T]``, right-padded, and ``index [B]`` of the samples; all int64."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    index = torch.tensor([row["index"] for row in rows])
    return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask, "index": index}


def sound_checkpoint(work: str | Path) -> Path | None:
    """The newest complete checkpoint of Trainer's; half-written ones are skipped.

    Trainer writes straight into ``checkpoint-N``, with ``trainer_state.json`` last.
    """
    for folder in map(Path, reversed(sort_checkpoints(str(work)))):
        try:
            state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            read_checkpoint(folder)
            for file in folder.glob(SPLIT_FILE):
                load_file(file)
            with safe_globals():  # numpy's random state
                for file in {folder / "optimizer.pt", folder / "scheduler.pt", *folder.glob("*.pth")}:
                    torch.load(file, weights_only=True, map_location="cpu")
            if state.global_step == _step(folder):
                return folder
        except (HatError, OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError,
                SafetensorError):  # fmt: skip
            continue
    return None


def _step(folder: str | Path) -> int:
    number = Path(folder).name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


@torch.no_grad()
def _first_bad(hat: HierarchicalTransformer, inputs: dict) -> str:
    """Where a non-finite value first appears: a parameter, a layer of the dense base, or what comes after."""
    for name, parameter in hat.named_parameters():
        if not torch.isfinite(parameter).all():
            return name
    bad: list[str] = []

    def watch(i):
        return lambda module, args, output: bad.append(f"layer {i}") if not torch.isfinite(output).all() else None

    with ExitStack() as hooks, hat.dense():
        for i, layer in enumerate(hat.lm.model.layers):
            hooks.callback(layer.register_forward_hook(watch(i)).remove)
        hat.lm.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    return bad[0] if bad else "no layer of the base: a router, a gate, the head or the loss"
