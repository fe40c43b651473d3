"""Where the time of a token goes: ``data/results/token_time.csv``.

A token is decoded by plain transformers, by our dense path, and by the engine at a capacity, in turns. A part's time is
how much shorter a step is without it, in the same round:

    qkv, o, gate_up, down   products of the layers; one is replaced by zeros, or none of its channels is kept. Other
                            products then keep other channels, so for each round the time per share that is kept is
                            solved for, from the steps without each of them
    head                    the logits; replaced by zeros, or compared with a copy of the base with a tiny vocabulary
    decisions               deciding about every channel, and keeping it
    rest                    the rest of a step: embedding, norms, attention, and what no difference shows
    loop                    what transformers' generate adds to a step
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hat_lib.base.families import LINEARS
from hat_lib.base.load import load_base
from hat_lib.config import HatConfig, HatError, check_capacity
from hat_lib.contexts import combined
from hat_lib.decoding.speed import Variant, now, take_turns
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.trace import Trace
from hat_lib.text.blocks import load_text
from studies.common import CHECKPOINTS, Machine, machine, markdown, rounded, saved, spread
from studies.plotting import speed
from studies.timing import CONTEXT, decode_ms, plain_copy, plain_part

ABOUT = "what a part of a decode step takes, in plain transformers, our dense path and at a capacity"
MINUTES = 4
KEY = ("way", "part")
WAYS = {"hf": "plain transformers", "dense": "our own dense path", "adaptive": "adaptive"}
PARTS = (*LINEARS, "head", "decisions", "rest", "loop")
WORDS = 64  # of the copy with next to no head


@dataclass(frozen=True)
class Row(Machine):
    way: str  # one of `WAYS`
    part: str  # one of `PARTS`
    capacity: float
    realised: float
    ms: float
    """per token, median over rounds; a difference within the noise may be below 0, and its spread includes 0"""
    low: float
    high: float
    steps: int
    rounds: int


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    capacity: float = 0.55,
    rounds: int = 15,
    steps: int = 24,
    dtype: str = "bf16",
) -> Iterator[Row]:
    """Rows for every way and part; ``checkpoint`` must have the channel grain."""
    capacity = check_capacity(capacity)
    if all((way, part) in done for way in WAYS for part in PARTS if part != "decisions" or way == "adaptive"):
        return
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    if hat.config.granularity != "channel":
        raise HatError(f"{checkpoint} has the {hat.config.granularity} grain, expected channel")
    blocks = load_text("docstrings", hat.base.tokenizer, max_tokens=2 * (CONTEXT + steps))
    ids = torch.tensor([sum(blocks["input_ids"], [])])[:, : CONTEXT + steps].to(hat.base.device)
    timed = list(_variants(hat, ids, capacity))
    once = {v.name: measure for v, measure in timed}
    take_turns([v for v, _ in timed], lambda v: once[v.name](v.model), rounds)
    ms = {v.name: v.times for v, _ in timed}
    with hat.at(capacity, 0.0), hat.collect() as states:
        decode_ms(hat, ids, steps)
    realised = {"hf": 1.0, "dense": 1.0, "adaptive": Trace.cat(states[2:]).capacity}
    kept = {v.name: _kept(hat, ids, steps, v.around) for v, _ in timed if v.model is hat and " without " in v.name}
    for way in WAYS:
        columns = machine(hat.base) | {"way": way, "realised": realised[way], "steps": steps, "rounds": rounds}
        columns["capacity"] = capacity if way == "adaptive" else 1.0
        for part, times in _parts(way, ms, kept).items():
            if (way, part) not in done:
                yield rounded(Row, **columns | spread(times), part=part)


def _variants(
    hat: HierarchicalTransformer, ids: Tensor, capacity: float
) -> Iterator[tuple[Variant, Callable[[LlamaForCausalLM], float]]]:
    """What is timed, each with a function that gives milliseconds per token of its ``lm``."""
    plain, steps = plain_copy(hat), ids.shape[1] - CONTEXT
    base = load_base(hat.base.name, dtype=hat.base.dtype, device=hat.base.device)
    base.model.resize_token_embeddings(WORDS, mean_resizing=False)
    base.model.requires_grad_(False)
    small = HierarchicalTransformer(base, HatConfig.default(base, exit_layers=()))
    at = partial(hat.at, capacity, 0.0)
    step, generated = partial(decode_ms, ids=ids, steps=steps), partial(_generated_ms, ids=ids)
    yield Variant("hf", plain, torch.inference_mode), step
    yield Variant("hf generate", plain, torch.inference_mode), generated
    for part, names in {**LINEARS, "head": ("lm_head",)}.items():
        yield Variant(f"hf without {part}", plain, partial(_zeros, plain, names)), step
    for way, around in ("dense", hat.dense), ("adaptive", at):
        yield Variant(way, hat, around), step
        yield Variant(f"{way} generate", hat, around), generated
        cuts = hat.calibration.thresholds_at(capacity if way == "adaptive" else 1.0)
        for part in ("nothing", *LINEARS):
            without = hat.threshold_policy({k: math.inf if k[1] == part else cut for k, cut in cuts.items()})
            yield Variant(f"{way} without {part}", hat, partial(combined, around, partial(hat.using, without))), step
    yield Variant("few words", small, small.dense), partial(decode_ms, ids=ids % WORDS, steps=steps)
    yield Variant("adaptive, whole head", hat, partial(combined, at, partial(hat.changed, shortlist=None))), step
    every = hat.threshold_policy(dict.fromkeys(hat.calibration.thresholds_at(capacity), 0.0))
    yield Variant("deciding", hat, partial(combined, hat.dense, partial(hat.using, every))), step


def _kept(hat: HierarchicalTransformer, ids: Tensor, steps: int, around: Callable) -> np.ndarray:
    """Shares kept in a variant, mean over layers and tokens: of each product, and of the head."""
    with around(), hat.collect() as states:
        decode_ms(hat, ids, steps)
    trace = Trace.cat(states[2:])
    return np.array([*trace.site_share.mean((0, 2, 3)).tolist(), trace.head_share])


def _parts(way: str, ms: dict[str, list[float]], kept: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Milliseconds of each part, one number per round."""

    def less(a: str, b: str) -> list[float]:
        return [x - y for x, y in zip(ms[a], ms[b], strict=True)]

    if way == "hf":
        found = {part: less("hf", f"hf without {part}") for part in (*LINEARS, "head")}
    else:
        whole, head = f"{way} without nothing", less("dense", "few words")
        times = np.array([less(whole, f"{way} without {part}") for part in LINEARS])
        gone = np.array([kept[whole] - kept[f"{way} without {part}"] for part in LINEARS])
        per_share = np.linalg.solve(gone[:, :-1], times - np.outer(gone[:, -1], head))
        found = dict(zip(LINEARS, (per_share * kept[whole][:-1, None]).tolist(), strict=True)) | {"head": head}
    if way == "adaptive":
        saved_there = less("adaptive, whole head", "adaptive")
        found["head"] = [a - b for a, b in zip(found["head"], saved_there, strict=True)]
        found["decisions"] = less("deciding", "dense")
    found["rest"] = [whole - sum(parts) for whole, *parts in zip(ms[way], *found.values(), strict=True)]
    found["loop"] = less(f"{way} generate", way)
    return {part: found[part] for part in PARTS if part in found}


@torch.inference_mode()
def _generated_ms(model, ids: Tensor) -> float:
    """Milliseconds that generate takes per token, without the prompt's pass. No token ends the text, which is cheaper
    than to forbid one at each step."""
    lm, steps, seconds = plain_part(model), ids.shape[1] - CONTEXT, []
    for count in (1, 1 + steps):
        began = now(model)
        lm.generate(ids[:, :CONTEXT], max_new_tokens=count, eos_token_id=-1, do_sample=False, pad_token_id=0)
        seconds.append(now(model) - began)
    return 1e3 * (seconds[1] - seconds[0]) / steps


@contextmanager
def _zeros(lm: LlamaForCausalLM, names: tuple[str, ...]):
    """Zeros in place of the products with these names."""
    with ExitStack() as stack:
        for name, module in lm.named_modules():
            if name.endswith(names):
                module.forward = lambda x, n=module.out_features: x.new_zeros(*x.shape[:-1], n)
                stack.callback(vars(module).pop, "forward")
        yield


def figures(results: Path | None = None) -> dict:
    return {"05_token_time": speed.token_time(saved("token_time", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    table = saved("token_time", results)
    lines = []
    for way, part in table.groupby("way", sort=False):
        ms = {r.part: f"{r.ms:.2f} ({r.low:.1f} to {r.high:.1f})" for r in part.itertuples()}
        at = "" if way != "adaptive" else f", {part['realised'].iloc[0]:.2f} realised"
        total = f"{part['ms'].sum():.1f}"
        lines.append([WAYS[way] + at, *(ms.get(p) for p in PARTS), total])
    header = ["ms a token: median (lowest to highest round)", *(p.replace("_", ", ") for p in PARTS), "sum of medians"]
    return {"token_time": markdown(header, lines)}
