"""A training run from nothing to a checkpoint: text, routers, capacities, gates, exits.

A run owns a folder: the checkpoint, written when a phase is done, the files of `hat_lib.training.log`, ``run.json``,
and ``work`` with training states until the run is done. A run stopped by Ctrl-C, a time limit or a kill resumes from
the last state, unless a text, the base or the start is no longer what it began with. One process at a time, or one
torchrun group, may train in a folder: it holds a lock, which the system releases if the process dies.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Self

import torch
import transformers
from accelerate import PartialState

from hat_lib import __version__
from hat_lib.base.load import Base, load_base, parse_dtype
from hat_lib.calibration.capacity import calibrate, calibrate_learned
from hat_lib.calibration.exits import calibrate_exits
from hat_lib.calibration.quantiles import LEAST_TOKENS
from hat_lib.checkpoint import CONFIG_FILE, Checkpoint, find_checkpoint, read_checkpoint
from hat_lib.config import CAPACITY_MIN, HatConfig, HatError, lock, replaced
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.grain import GRAINS
from hat_lib.method.thresholds import EXIT_TABLES
from hat_lib.text.blocks import count_tokens, held_out, load_text, spread, text_hash
from hat_lib.text.mixture import OWN, sources, training_text
from hat_lib.training.log import seconds_so_far
from hat_lib.training.objective import nominal_thresholds
from hat_lib.training.recipe import PHASES, Recipe
from hat_lib.training.trainer import CURVE_FILE, LOG_FILE, STATE_FILE, WORK, Outcome, train_phase

RUN_FILE, LOCK = "run.json", ".lock"
CALIBRATION_TOKENS = 24_000
PATIENCE = timedelta(hours=12)  # in which the first process, for which the others wait, samples text and calibrates


@dataclass(frozen=True)
class Run:
    """What was asked for. `run.json` holds this, so that ``--resume`` asks for the same again, and the inputs that the
    run began with, by name: hashes of the base, of the start and of each text, and the number of processes."""

    phase: str
    granularity: str
    base: str
    recipe: Recipe
    dtype: str = "bf16"
    start: str | None = None  #: checkpoint to start from: calibrated and, for phase "exit", with trained routers
    translator_rank: int = HatConfig.translator_rank
    correction_rank: int | None = None  #: of corrections; None: those of ``start``, if it has any
    max_steps: int = -1
    command: str = ""

    def __post_init__(self):
        for name, known in {"phase": PHASES, "granularity": GRAINS}.items():
            if getattr(self, name) not in known:
                raise HatError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.phase == "exit" and self.start is None:
            raise HatError("phase exit needs trained routers: pass their --checkpoint, or train both with --phase full")
        # What is wrong raises now, not once text is ready.
        sources(self.recipe.text)
        parse_dtype(self.dtype)
        HatConfig(1, self.granularity, translator_rank=self.translator_rank, correction_rank=self.correction_rank)

    @property
    def phases(self) -> tuple[str, ...]:
        return ("routers", "exit") if self.phase == "full" else (self.phase,)

    def write(self, folder: Path, inputs: dict) -> None:
        versions = {"hat_lib": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        meta = {**asdict(self), "inputs": inputs, "versions": versions}
        with replaced(folder / RUN_FILE) as written:
            written.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises `HatError` if ``folder`` holds no run, or one that this version cannot read."""
        path = folder / RUN_FILE
        if not path.is_file():
            raise HatError(f"nothing to resume in {folder}: {RUN_FILE} is missing")
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            meta.pop("versions")
            meta.pop("inputs", None)
            return cls(**meta | {"recipe": Recipe(**meta["recipe"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # HatError is a ValueError
            raise HatError(f"{path} is not what `hat train` wrote: {error}") from error


def train(
    run: Run, folder: str | Path, *, resume: bool = False, max_minutes: float | None = None, progress: bool = True
) -> list[Outcome]:
    """Carry out ``run`` in ``folder``. Returns how each phase that ran ended, or nothing if the run was finished.

    If the run was stopped, the last `Outcome` is not ``done``; call again with ``resume=True`` to continue. Under
    torchrun every process calls this with the same arguments; only the first one writes.

    Raises `HatError` for a folder that holds another run, unavailable text or base, phase "exit" on a checkpoint
    without trained routers, and a resumed run of which anything but ``command`` differs from what it began with. Such a
    refusal leaves nothing behind. Also for a loss that is not finite, and a full disk; what was saved before stays.
    """
    folder, until = Path(folder), math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    run, inputs = _begun(run, folder, resume)
    _check_start(run)
    processes, outcomes = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE), []
    main = processes.is_main_process
    with _lock(folder) if main else nullcontext():
        processes.wait_for_everyone()
        try:
            if not _is_done(folder, run.phases[-1]):
                outcomes = _train(run, folder, processes, inputs, resume, until, progress and main)
        except OSError as error:
            raise HatError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    if main and (not outcomes or outcomes[-1].done):
        shutil.rmtree(folder / WORK, ignore_errors=True)
    return outcomes


def _train(
    run: Run, folder: Path, processes: PartialState, inputs: dict, resume: bool, until: float, progress: bool
) -> list[Outcome]:
    main, recipe, noted = processes.is_main_process, run.recipe, {}

    def check(name: str, value: int | str) -> None:
        """Note an input: a number, or a hash. The run does not go on with another than it began with."""
        noted[name] = value if isinstance(value, int) else f"SHA-256 {value[:16]}"
        if (before := inputs.get(name, noted[name])) != noted[name]:
            raise HatError(f"cannot resume {folder}: {name} was {before}, now {noted[name]}: restore it, or begin anew")

    check("processes", processes.num_processes)  # whose micro-batches make up a step
    base = load_base(run.base, dtype=run.dtype, device=processes.device if processes.num_processes > 1 else None)
    check("base", base.fingerprint)
    with processes.main_process_first():  # the others read what it stored
        # A short run does not take longer to calibrate than to train.
        wanted = CALIBRATION_TOKENS if recipe.tokens >= CALIBRATION_TOKENS else max(2048, recipe.tokens // 4)
        source = next((name for name in sources(recipe.text) if name not in OWN), "addresses")
        part = partial(held_out, source, base.tokenizer, wanted, recipe.block_size)
        held = part(splits=["validation"])
        if (found := count_tokens(held)) < LEAST_TOKENS:
            raise HatError(
                f"{source}: trained models are calibrated on the validation split, which has {found} tokens, expected "
                f"at least {LEAST_TOKENS}: bring at least {math.ceil(LEAST_TOKENS / found)} times as much text"
            )
        check(f"held-out {source}", text_hash(held))
        validation = None
        if recipe.validation:
            rows = load_text(recipe.validation, base.tokenizer, split="validation", block_size=512)
            validation = spread(rows, recipe.validation_tokens)
            check(f"validation {recipe.validation}", text_hash(validation))
        # A resumed run, and every process, must train at the very same thresholds.
        where = run.start or folder / WORK / "start"
        made = run.start is None and ((main and not resume) or not (where / CONFIG_FILE).exists())
        if not made:
            check("start", _content_hash(where))
        blocks = training_text(
            base, recipe.text, recipe.tokens, block_size=recipe.block_size, seed=recipe.seed, progress=progress,
            check=lambda name, rows: check(f"text {name}", text_hash(rows)),
        )  # fmt: skip
        if made:
            _make_start(run, base, part, where, progress)
            check("start", _content_hash(where))
        torch.manual_seed(recipe.seed)  # translators are initialised at random
        hat = start_from(read_checkpoint(where), base, where, run.correction_rank, run.translator_rank)
        if main and not resume:
            # Left by a run whose run.json and checkpoint were deleted; the gates would go on from its state.
            for left in (*folder.glob(f"{WORK}/*/{STATE_FILE}"), folder / LOG_FILE, folder / CURVE_FILE):
                left.unlink(missing_ok=True)
            run.write(folder, noted)

    outcomes, start = [], hat.calibration
    for phase in run.phases:
        if not _is_done(folder, phase):
            nominal = nominal_thresholds(hat) if phase == "routers" else hat.calibration.thresholds_at
            outcome = train_phase(
                hat, blocks, recipe, phase, nominal, folder, resume=resume, max_minutes=(until - time.monotonic()) / 60,
                max_steps=run.max_steps, progress=progress, validation=validation,
            )  # fmt: skip
            outcomes.append(outcome)
            if not outcome.done:
                break
            if main:
                summary = dict(hat.training_summary or {})
                if phase == "routers":
                    # The head is not trained.
                    head = lambda c: start and start.head_at(max(c, CAPACITY_MIN))  # noqa: E731
                    text = f"{source}, validation split, {found} tokens, SHA-256 {text_hash(held)[:16]}"
                    calibrate_learned(hat, held["input_ids"], outcome.thresholds, head, text=text, progress=progress)
                else:
                    _, agreement = calibrate_exits(hat, held["input_ids"], progress=progress)
                    summary["exit_agreement"] = [[round(a, 4) for a in row] for row in agreement]
                minutes = round(seconds_so_far(folder / LOG_FILE, phase) / 60, 1)
                summary[phase] = {"steps": outcome.steps, "minutes": minutes, "tokens": count_tokens(blocks)}
                summary[phase]["text"] = recipe.text
                of_run = {"recipe": asdict(recipe), "command": run.command, "inputs": inputs if resume else noted}
                hat.training_summary = summary | of_run
                hat.save_pretrained(folder)
            processes.wait_for_everyone()
        checkpoint = read_checkpoint(folder)
        hat.load_adapter(checkpoint, folder)
        hat.calibration, hat.training_summary = checkpoint.calibration, checkpoint.training
    return outcomes


def _begun(run: Run, folder: Path, resume: bool) -> tuple[Run, dict]:
    """The run to carry out, and the inputs that it began with. Of a resumed run, both are as ``folder`` has them; of an
    older version's, and of a new one, no inputs are known."""
    if not resume:
        if (folder / RUN_FILE).exists() or (folder / CONFIG_FILE).exists():
            raise HatError(f"{folder} already holds a run or a checkpoint: resume it, or choose another folder")
        return run, {}
    before = Run.read(folder)
    asked, known = ({**vars(one), **vars(one.recipe), "recipe": "", "command": ""} for one in (run, before))
    for name, value in known.items():
        if asked[name] != value:
            raise HatError(f"{folder} holds a run with {name} {value!r}, {asked[name]!r} was asked for")
    meta = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    inputs, recipe = meta.get("inputs", {}), meta["recipe"]
    if inputs and (folder / CONFIG_FILE).exists():
        training = read_checkpoint(folder).training or {}
        # A newer version may have added fields to the recipe.
        if training.get("inputs") != inputs or not recipe.items() <= training.get("recipe", {}).items():
            raise HatError(f"{folder / CONFIG_FILE} is not of the run in {RUN_FILE}: move one of them elsewhere")
    return before, inputs


@contextmanager
def _lock(folder: Path):
    """Hold ``folder`` exclusively; the lock file is removed with ``work`` when the run is done. A run that is refused
    takes the folders along that were made for it, if there is nothing else in them."""
    work = folder / WORK
    made = [path for path in (work, folder, *folder.parents) if not path.exists()]
    work.mkdir(parents=True, exist_ok=True)
    try:
        with (work / LOCK).open("a") as file:
            lock(file, f"another process is training in {folder}: wait for it, or choose another folder")
            yield
    except BaseException:
        with suppress(OSError):  # not empty
            for path in made:
                (work / LOCK).unlink(missing_ok=True)
                path.rmdir()
        raise


def _check_start(run: Run) -> None:
    """Check the checkpoint that a run starts from, as far as possible without its base."""
    if run.start is None:
        return
    checkpoint = read_checkpoint(run.start)
    if checkpoint.config.granularity != run.granularity:
        raise HatError(f"{run.start} has the {checkpoint.config.granularity} grain, {run.granularity} was asked for")
    if checkpoint.calibration is None:
        raise HatError(f"{run.start} has no calibration: start from what `hat calibrate` or `hat train` wrote")
    if run.phase == "exit" and not (checkpoint.training or {}).get("routers"):
        raise HatError(f"{run.start} has no trained routers: train them first, with --phase routers")
    kept = checkpoint.config.correction_rank
    if run.phase == "exit" and run.correction_rank not in (None, kept):
        raise HatError(f"phase exit keeps the corrections of {run.start}, of rank {kept}: leave out --correction-rank")


def _content_hash(name: str | Path) -> str:
    """SHA-256 (hex) of a checkpoint but for its prices; its JSON names the hash of its tensors."""
    meta = json.loads((find_checkpoint(name) / CONFIG_FILE).read_bytes())
    meta.pop("prices", None)
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _make_start(run: Run, base: Base, part: Callable, where: Path, progress: bool) -> None:
    """Write an untrained checkpoint, whose tables, if its grain needs any, are from the train split of ``part``."""
    torch.manual_seed(run.recipe.seed)
    ranks = {"translator_rank": run.translator_rank, "correction_rank": run.correction_rank}
    hat = HierarchicalTransformer(base, GRAINS[run.granularity].config(base, **ranks))
    if not hat.grain.logits:
        calibrate(hat, part(splits=["train"])["input_ids"], progress=progress)
    hat.save_pretrained(where)
    hat.unload()


def start_from(
    checkpoint: Checkpoint, base: Base, where: str, correction_rank: int | None = None, translator_rank: int = 1
) -> HierarchicalTransformer:
    """``base`` with the routers and tables of a checkpoint that was read from ``where``.

    Gates start afresh, without exit tables, and so do corrections if ``correction_rank`` differs from the checkpoint's
    (None keeps it).
    """
    checkpoint.check_base(base, where)
    kept = checkpoint.config.correction_rank
    rank = kept if correction_rank is None else correction_rank
    ranks = {"translator_rank": translator_rank, "correction_rank": rank}
    hat = HierarchicalTransformer(base, replace(checkpoint.config, exit_rate=0.0, **ranks))
    parts = ("routers.", "corrections.") if rank == kept else ("routers.",)
    tensors = {n: t for n, t in checkpoint.tensors.items() if n.startswith(parts)}
    hat.load_adapter(replace(checkpoint, tensors=hat.hat_parameters() | tensors), where)
    tables = checkpoint.calibration
    hat.calibration = tables and replace(tables, **dict.fromkeys(EXIT_TABLES))
    hat.training_summary = {k: v for k, v in (checkpoint.training or {}).items() if not k.startswith("exit")}
    return hat


def _is_done(folder: Path, phase: str) -> bool:
    return (folder / CONFIG_FILE).exists() and bool((read_checkpoint(folder).training or {}).get(phase))
