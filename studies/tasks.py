"""Is a text still right? Tasks that are not perplexity, of a checkpoint and its base: ``data/results/tasks.csv``.

    copying     a list of words once more, word by word: what sparse models are known to lose first
    arithmetic  sums of two numbers below 10, after four examples
    cloze       the last word of a sentence of an address, out of four, by lm-evaluation-harness (the extra ``eval``)
    agreement   how many of 64 greedy tokens come before the first that is not the base's

Of the first two, the share of the answers' tokens that are the likeliest after all before them; prompts spend by
capacity, too.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap

from hat_lib.decoding.inference import AdaptiveInference
from hat_lib.evaluation.lm_eval import TASKS, load_tasks, run_tasks
from hat_lib.hat import HierarchicalTransformer
from studies.common import CHECKPOINTS, Machine, machine, markdown, rounded, saved
from studies.prompts import prompts

ABOUT = "copying, sums, a cloze test and greedy agreement, of `default` and its base"
MINUTES = 9
KEY = ("task", "capacity")
WORDS = ("apple", "river", "stone", "cloud", "garden", "paper", "silver", "winter", "bridge", "candle", "forest",
         "market", "mirror", "orange", "pencil", "shadow", "spring", "table", "window", "yellow")  # fmt: skip
SHARED = 64  # greedy tokens


@dataclass(frozen=True)
class Row(Machine):
    task: str
    capacity: float  # requested
    dense: (
        float  # share that is right, of the base; of agreement, that of the tokens before the first unlike the base's
    )
    value: float  # at the capacity
    low: float | None  # with `high` the 95 % interval of value - dense, paired by item
    high: float | None
    items: int


def items(task: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts and answers of copying or arithmetic."""
    draws, found = np.random.default_rng([seed, len(task)]), []
    for _ in range(count):
        if task == "copying":
            words = " ".join(draws.choice(WORDS, 8, replace=False))
            found.append((f"Repeat the words.\n{words}\n{words.split()[0]}", words[len(words.split()[0]) :]))
        else:
            pairs = draws.integers(1, 10, (5, 2))
            *shown, asked = (f"{a} + {b} = {a + b}" for a, b in pairs)
            prompt, _, answer = asked.rpartition(" ")
            found.append(("\n".join([*shown, prompt]), f" {answer}"))
    return found


@torch.inference_mode()
def right(hat: HierarchicalTransformer, found: Sequence[tuple[str, str]]) -> np.ndarray:
    """For each item the share of the tokens of its answer that are the likeliest, as ``hat`` is set."""
    tokenizer, rights = hat.base.tokenizer, []
    for prompt, answer in found:
        before, ids = tokenizer(prompt).input_ids, tokenizer(prompt + answer, return_tensors="pt").input_ids
        first = len(commonprefix([before, ids[0].tolist()]))
        said = hat.lm(ids.to(hat.base.device)).logits[0, first - 1 : -1].argmax(-1).cpu()
        rights.append((said == ids[0, first:]).double().mean().item())
    return np.array(rights)


def shared(hat: HierarchicalTransformer, texts: Sequence[str], capacity: float) -> np.ndarray:
    """For each prompt the share of `SHARED` greedy tokens before the first that is not the base's."""
    infer, found = AdaptiveInference(hat), []
    for text in texts:
        made = [infer.generate(text, capacity=c, exit_rate=0.0, max_new_tokens=SHARED, measure=False)
                for c in (1.0, capacity)]  # fmt: skip
        dense, ours = (text.ids[0, text.prompt_length :].tolist() for text in made)
        found.append(len(commonprefix([dense, ours])) / len(dense))
    return np.array(found)


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    tasks: Sequence[str] = ("copying", "arithmetic", "agreement", "cloze"),
    capacities: Sequence[float] = (0.7, 0.55, 0.4),
    count: int = 200,
    dtype: str = "bf16",
) -> Iterator[Row]:
    """Rows of ``tasks`` at ``capacities``; copying and arithmetic have ``count`` items, agreement a quarter of it."""
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    hat.exit_rate = 0.0
    for task in tasks:
        missing = [c for c in capacities if (task, c) not in done]
        for capacity, columns in zip(missing, _measured(hat, task, missing, count), strict=True):
            yield rounded(Row, KEY, **machine(hat.base), task=task, capacity=capacity, **columns)


def _measured(hat: HierarchicalTransformer, task: str, capacities: Sequence[float], count: int) -> Iterator[dict]:
    """The other columns of a row at each capacity."""
    if task == "cloze":
        loaded = load_tasks(["address_cloze"], TASKS) if capacities else None
        for capacity in capacities:
            with hat.at(capacity):
                row = next(row for row in run_tasks(hat, loaded, batch_size=4)[0] if row.metric == "acc")
            yield {"dense": row.base, "value": row.value, "low": None, "high": None, "items": row.samples}
        return
    if task == "agreement":
        texts = [prompt.text for prompt in prompts(hat.base.tokenizer, max(2, count // 4))]
        dense = np.ones(len(texts))
    elif capacities:
        found = items(task, count)
        with hat.dense():
            dense = right(hat, found)
    for capacity in capacities:
        if task == "agreement":
            value = shared(hat, texts, capacity)
        else:
            with hat.at(capacity):
                value = right(hat, found)
        low, high = bootstrap((value - dense,), np.mean, method="percentile", rng=0).confidence_interval
        yield {"dense": dense.mean(), "value": value.mean(), "low": low, "high": high, "items": len(value)}


def tables(results: Path | None = None) -> dict[str, str]:
    table, lines = saved("tasks", results), []
    for task, part in table.groupby("task", sort=False):
        cells = [
            f"{r.value:.0%}" + ("" if np.isnan(r.low) else f" ({r.dense + r.low:.0%} to {r.dense + r.high:.0%})")
            for r in part.itertuples()
        ]
        lines.append([task, part["items"].iloc[0], f"{part['dense'].iloc[0]:.0%}", *cells])
    return {"tasks": markdown(["task", "items", "base", *(f"at {c:.2f}" for c in table["capacity"].unique())], lines)}
