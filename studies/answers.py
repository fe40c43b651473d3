"""A question answered: time to the first token and to the last, ``data/results/answers.csv``.

After prompts of several lengths, for one sequence or several, `ANSWER` tokens are decoded greedily and streamed: by
plain transformers, by the engine with nothing skipped and at a capacity, with the prompt in full or spending by
capacity, too, and with weights in four bits. The same beside other processes that each occupy a core.
"""

import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from hat_lib.contexts import combined
from hat_lib.decoding.speed import Variant, now, take_turns
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.trace import Trace
from hat_lib.text.blocks import load_text
from studies.common import CHECKPOINTS, Machine, machine, markdown, over_dense, rounded, saved, spread
from studies.timing import plain_copy, plain_part

ABOUT = "time to the first and to the last token of an answer, by prompt, sequences and busy processes"
MINUTES = 12
KEY = ("base", "prompt", "sequences", "busy", "way")
POINTS = ((64, 1, 0), (512, 1, 0), (2048, 1, 0), (64, 2, 0), (64, 4, 0), (64, 8, 0), (512, 1, 2))
"""tokens of a prompt, sequences, busy processes"""
ANSWER = 32


@dataclass(frozen=True)
class Row(Machine):
    way: str
    prompt: int  # tokens of each sequence
    sequences: int
    busy: int  # other processes, each of which occupies a core
    capacity: float  # requested, of new tokens
    realised: float
    first_ms: float  # until the first token
    ms: float  # until the last: the median, the fastest and the slowest round
    low: float
    high: float
    token_ms: float  # of a token after the first, over all sequences
    over_dense: float | None  # of those, over our own dense path in the same format, paired by round: median,
    over_dense_low: float | None  # lowest and highest
    over_dense_high: float | None
    rounds: int


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    capacity: float = 0.6,
    rounds: int = 5,
    dtype: str = "fp32",
) -> Iterator[Row]:
    """Rows for each way at each of `POINTS`."""
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    plain, at, four = plain_copy(hat), partial(hat.at, capacity, 0.0), partial(hat.changed, weight_format="q4")
    blocks = load_text("docstrings", hat.base.tokenizer, max_tokens=max(n * prompt for prompt, n, _ in POINTS))
    text = torch.tensor(sum(blocks["input_ids"], [])).to(hat.base.device)
    end, gated = f"at {capacity:g}", {"gate_prompt": True}
    ways = {"plain transformers": (plain, nullcontext, {}), "dense": (hat, hat.dense, {}), end: (hat, at, {})}
    ways |= {
        "dense, q4": (hat, partial(combined, hat.dense, four), {}),
        f"{end}, q4": (hat, partial(combined, at, four), {}),
    }
    ways[f"{end}, prompt too"] = hat, at, gated

    def generate(way: str, ids: Tensor, streamer=None) -> None:
        model, _, more = ways[way]
        lm, how = plain_part(model), {"do_sample": False, "pad_token_id": 0, "eos_token_id": -1}  # no token ends it
        lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, streamer=streamer, **how, **more)

    for prompt, sequences, busy in POINTS:
        if all((hat.base.name, prompt, sequences, busy, way) in done for way in ways):
            continue
        ids = text[: sequences * prompt].view(sequences, prompt)
        turns, firsts = [Variant(way, model, around) for way, (model, around, _) in ways.items()], defaultdict(list)

        def once(v: Variant, ids=ids, firsts=firsts) -> float:
            came, began = [], now(v.model)
            generate(v.name, ids, SimpleNamespace(put=lambda _: came.append(now(v.model)), end=lambda: None))
            firsts[v.name].append(1e3 * (came[1] - began))  # the prompt is streamed before
            return 1e3 * (came[-1] - began)

        with processes(busy):
            take_turns(turns, once, rounds)
        first = {way: found[1:] for way, found in firsts.items()}  # without the round to warm up
        after = {v.name: [t - f for t, f in zip(v.times, first[v.name], strict=True)] for v in turns}
        for v in turns:
            asked = realised = 1.0
            if v.model is hat:
                with v.around(), hat.collect() as states:
                    asked = hat.capacity
                    generate(v.name, ids)
                realised = Trace.cat(states[1:]).capacity
            dense = "dense, q4" if v.name.endswith("q4") else "dense"
            columns = machine(hat.base) | spread(v.times) | {"way": v.name}
            columns |= {"first_ms": statistics.median(first[v.name])} | over_dense(after[dense], after[v.name])
            if v.model is not hat:
                columns |= dict.fromkeys(over_dense([1], [1]))
            columns |= {"capacity": asked, "realised": realised, "rounds": rounds}
            columns |= {"prompt": prompt, "sequences": sequences, "busy": busy}
            yield rounded(Row, **columns, token_ms=statistics.median(after[v.name]) / (ANSWER - 1) / sequences)


@contextmanager
def processes(count: int):
    """So many processes beside, each of which occupies a core."""
    started = [multiprocessing.get_context("spawn").Process(target=_work, daemon=True) for _ in range(count)]
    for process in started:
        process.start()
    time.sleep(2 if count else 0)  # until they have started
    try:
        yield
    finally:
        for process in started:
            process.terminate()
            process.join()


def _work() -> None:
    while True:
        pass


def tables(results: Path | None = None) -> dict[str, str]:
    """A line for each point, of each way the time to the first token and of every other."""
    table, lines = saved("answers", results), []
    for point, rows in table.groupby(["busy", "sequences", "prompt"]):
        cells = {r.way: f"{r.first_ms:.0f}, {r.token_ms:.1f}" for r in rows.itertuples()}
        lines.append([*point[::-1], *map(cells.get, table["way"].unique())])
    return {"answers": markdown(["prompt", "sequences", "busy processes", *table["way"].unique()], lines)}
