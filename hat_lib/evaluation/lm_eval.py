"""Tasks of lm-evaluation-harness on the adaptive model, beside its base (Biderman et al. 2024, arXiv:2405.14782).

The harness (package `lm_eval`, the extra ``eval``) runs unchanged on ``hat.lm``; this module adds the work that scores
cost. Within rounding, nothing depends on the batch: neither pads count, nor what a sequence runs after its end.
"""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import datasets

from hat_lib.base.load import first_line
from hat_lib.config import DATA, HatError
from hat_lib.decoding.speculation import stop_tokens
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import WorkTally
from hat_lib.method.trace import Trace

TASKS = DATA / "tasks"  # those that come with the repository; see data/README.md


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task; standard errors are the harness's, or None if it has none."""

    task: str
    metric: str  #: the harness's name, with its filter if there is one, such as acc or exact_match (strict-match)
    base: float
    base_stderr: float | None
    value: float
    stderr: float | None
    samples: int
    data_hash: str  #: beginning of the SHA-256 of all samples, prompts and targets


def load_tasks(names: Sequence[str], folder: str | Path = TASKS) -> dict:
    """Tasks and groups from a folder of YAML files, as the harness's `TaskManager` returns them, data included.

    Paths of data files are relative to ``folder``; Python functions that a task names are run. Raises `HatError` if
    `lm_eval` is not installed, or a folder or task is missing or cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HatError('tasks need lm-evaluation-harness: pip install -e ".[eval]"') from error
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise HatError(f"no folder of tasks at {folder}")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if unknown := [name for name in names if name not in manager.task_index]:
        raise HatError(f"unknown task {unknown[0]!r}: {folder} has {', '.join(manager.all_tasks[:10]) or 'none'}")
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise even reading a local file is reported to a server
    try:
        with chdir(folder):
            found = manager.load(list(names))
    except Exception as error:  # whatever YAML, datasets, the Hub or a task's own code may raise
        what = f"{type(error).__name__}: {first_line(error)}"
        raise HatError(f"cannot load {', '.join(names)} from {folder}: {what}") from error
    for task in found["tasks"].values():  # as `lm_eval.simple_evaluate` does
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(1234)
    return found


def run_tasks(hat: HierarchicalTransformer, tasks: dict, *, batch_size: int = 1) -> tuple[list[TaskRow], WorkTally]:
    """A row for each metric of each task and group that `load_tasks` returned, of the base (``hat.dense()``) and of
    ``hat`` as it is set, and the work of ``hat``. Raises `HatError` if no task has a metric that the harness knows."""
    from lm_eval import evaluate

    ours, rows = counting_lm(hat, batch_size), []
    with hat.dense():
        base = evaluate(counting_lm(hat, batch_size), tasks)
    adaptive = evaluate(ours, tasks)
    for task, metrics in adaptive["results"].items():
        theirs, samples = base["results"][task], adaptive["samples"].get(task, ())
        parts = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
        data_hash = hashlib.sha256(parts.encode()).hexdigest()[:16] if samples else ""
        for key in metrics:
            name, _, kind = key.partition(",")
            if kind and not name.endswith("_stderr"):
                pairs = ((found[key], found.get(f"{name}_stderr,{kind}")) for found in (theirs, metrics))
                # The harness writes "N/A" where it has no standard error.
                values = [float(v) if isinstance(v, int | float) else None for pair in pairs for v in pair]
                metric = name if kind == "none" else f"{name} ({kind})"
                rows.append(TaskRow(task, metric, *values, int(metrics["sample_len"]), data_hash))
    if not rows:
        raise HatError(f"{', '.join(adaptive['results'])}: lm_eval knows none of the metrics asked for")
    return rows, ours.spent


def counting_lm(hat: HierarchicalTransformer, batch_size: int):
    """The harness's `HFLM` on ``hat.lm``, which adds up the work of its forwards in ``spent``."""
    from lm_eval.models.huggingface import HFLM

    ends = set(stop_tokens(hat.lm.generation_config))

    class CountingLM(HFLM):
        def _model_call(self, inps, *args, **options):
            self._rows_seen = 0
            return super()._model_call(inps, *args, **options)

        def _select_cont_toks(self, logits, contlen=None, inplen=None):
            """Called once for each row of a log-likelihood batch, in order; ``inplen`` is its length without pads."""
            hat.trace.real[self._rows_seen, inplen:] = False
            self._rows_seen += 1
            if self._rows_seen == hat.trace.batch:
                self.spent.add(hat.trace)
            return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

        def _model_generate(self, context, max_length, stop, **options):
            with hat.collect() as states:
                out = super()._model_generate(context, max_length, stop, **options)
            if {trace.batch for trace in states} == {len(out)}:  # else there are beams, and all of them count
                states, length = [Trace.cat(states)], context.shape[1]
                for real, ids in zip(states[0].real, out[:, length:].tolist(), strict=True):
                    real[length + self._end(ids, stop) :] = False
            for trace in states:
                self.spent.add(trace)
            return out

        def _end(self, ids, stop):
            """The place of the token that ends a text, which needs no step of its own; else the number of tokens."""
            for last, token in enumerate(ids):
                text = self.tokenizer.decode(ids[: last + 1])
                if token in ends or any(sequence in text for sequence in stop):
                    return last
            return len(ids)

    logging.disable(logging.WARNING)  # it warns each time that it was given a model and not a name
    try:
        lm = CountingLM(pretrained=hat.lm, tokenizer=hat.base.tokenizer, batch_size=batch_size)
    finally:
        logging.disable(logging.NOTSET)
    lm.spent = WorkTally(hat)
    return lm
