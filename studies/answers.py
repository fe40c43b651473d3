"""A question answered: time to the first token and to the last, ``data/results/answers.csv``.

After a prompt of 512 tokens, 64 more are decoded greedily: by plain transformers, by the engine with nothing skipped
and at a capacity, with the prompt in full or spending by capacity, too. The same beside other processes that each
occupy a core.
"""

import multiprocessing
import statistics
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hat_lib.decoding.speed import Variant, now, take_turns
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.trace import Trace
from hat_lib.text.blocks import load_text
from studies.common import CHECKPOINTS, Machine, machine, markdown, rounded, saved, spread
from studies.timing import plain_copy, plain_part

ABOUT = "time to the first and to the last token of an answer, alone and beside busy processes"
MINUTES = 12
KEY = ("base", "busy", "way")
PROMPT, ANSWER = 512, 64


@dataclass(frozen=True)
class Row(Machine):
    way: str
    busy: int  # other processes, each of which occupies a core
    capacity: float  # requested, of new tokens
    realised: float
    first_ms: float  # until the first token
    ms: float  # until the last: the median, the fastest and the slowest round
    low: float
    high: float
    token_ms: float  # between two tokens
    rounds: int


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    capacity: float = 0.6,
    busy: int = 2,
    rounds: int = 5,
    dtype: str = "fp32",
) -> Iterator[Row]:
    """Rows for each way, alone and beside up to ``busy`` processes."""
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    plain, at = plain_copy(hat), partial(hat.at, capacity, 0.0)
    blocks = load_text("docstrings", hat.base.tokenizer, max_tokens=PROMPT)
    ids = torch.tensor([sum(blocks["input_ids"], [])])[:, :PROMPT].to(hat.base.device)
    end, gated = f"at {capacity:g}", {"gate_prompt": True}
    ways = {"plain transformers": (plain, nullcontext, {}), "dense": (hat, hat.dense, {}), end: (hat, at, {})}
    ways[f"{end}, prompt too"] = hat, at, gated

    def generate(way: str, tokens: int) -> None:
        model, _, more = ways[way]
        lm, how = plain_part(model), {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **how, **more)

    def ms(tokens: int, v: Variant) -> float:
        began = now(v.model)
        generate(v.name, tokens)
        return 1e3 * (now(v.model) - began)

    for others in range(busy + 1):
        if all((hat.base.name, others, way) in done for way in ways):
            continue
        first, whole = ([Variant(way, model, around) for way, (model, around, _) in ways.items()] for _ in range(2))
        with processes(others):
            take_turns(whole, partial(ms, ANSWER), rounds)
            take_turns(first, partial(ms, 1), rounds)
        for one, all_of_it in zip(first, whole, strict=True):
            model, around, _ = ways[one.name]
            asked = realised = 1.0
            if model is hat:
                with around(), hat.collect() as states:
                    asked = hat.capacity
                    generate(one.name, ANSWER)
                realised = Trace.cat(states[1:]).capacity
            start = statistics.median(one.times)
            columns = machine(hat.base) | spread(all_of_it.times) | {"way": one.name, "busy": others, "first_ms": start}
            columns |= {"capacity": asked, "realised": realised, "rounds": rounds}
            yield rounded(Row, **columns, token_ms=(statistics.median(all_of_it.times) - start) / (ANSWER - 1))


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
    header = ["busy processes", "way", "realised", "first token, ms", "last token, ms", "ms a token"]
    lines = []
    for r in saved("answers", results).itertuples():
        whole = f"{r.ms:.0f} ({r.low:.0f} to {r.high:.0f})"
        lines.append([r.busy, r.way, f"{r.realised:.2f}", f"{r.first_ms:.0f}", whole, f"{r.token_ms:.1f}"])
    return {"answers": markdown(header, lines)}
