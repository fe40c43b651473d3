"""What channels cost and gain without any training, on the real base: ``data/results/foundation.csv``.

For each capacity and text: perplexity over the dense base's with its paired interval, and batch-1 decode of
that same text against plain transformers and against our own dense path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hat_lib.backbone.base import load_base
from hat_lib.config import HatError, check_capacity
from hat_lib.evaluation.perplexity import compare, score
from hat_lib.experiments.benchmark import CONTEXT, Setting, measure
from hat_lib.experiments.columns import CHECKPOINTS, TEXTS, perplexity, rounded
from hat_lib.experiments.tables import markdown, saved, times
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting.findings import said
from hat_lib.text.blocks import load_text, text_hash

ABOUT = "the calibrated channel grain at a capacity: perplexity and decode speed"
MINUTES = 5
KEY = ("text", "capacity")


@dataclass(frozen=True)
class Row:
    """Perplexities are those of a 4-bit file, dequantised, when ``base`` is "bundled"."""

    base: str
    device: str
    dtype: str
    threads: int
    granularity: str
    text: str
    text_hash: str
    tokens: int
    blocks: int
    capacity: float
    """requested"""
    realised: float
    model_share: float
    base_ppl: float
    ppl: float
    increase: float
    increase_low: float
    increase_high: float
    """95 % paired interval"""
    ms_hf: float
    ms_dense: float
    ms_adaptive: float
    """milliseconds a token, batch-1 decode"""
    speedup_hf: float
    speedup_dense: float
    ideal: float
    realised_decode: float
    rounds: int


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "calibrated",
    texts: Sequence[str] = TEXTS,
    capacities: Sequence[float] = (0.75, 0.62),
    max_tokens: int = 20_000,
    rounds: int = 9,
    steps: int = 24,
    dtype: str | None = None,
) -> Iterator[Row]:
    """A row for each text and capacity.

    Args:
        max_tokens: test tokens per text.
        rounds, steps: interleaved rounds of the timing, and decode steps in each.
    """
    capacities = [check_capacity(c) for c in capacities]
    if rounds < 1 or steps < 1:
        raise HatError(f"rounds and steps must be at least 1, got {rounds} and {steps}")
    missing = {text: [c for c in capacities if (text, c) not in done] for text in texts}
    if not any(missing.values()):
        return
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    plain = load_base(hat.base.name, dtype=hat.base.dtype, device=hat.base.device).model
    for text, wanted in missing.items():
        blocks = load_text(text, hat.base.tokenizer, split="test", max_tokens=max_tokens)
        ids = torch.tensor([blocks[0]["input_ids"]], device=hat.base.device)
        if ids.shape[1] < CONTEXT + steps:
            raise HatError(f"{text}: decoding needs {CONTEXT + steps} tokens in the first block, got {ids.shape[1]}")
        settings = {Setting(c): partial(hat.at, c, 0.0) for c in wanted}
        timed = measure(hat, plain, settings, ids, phase="decode", rounds=rounds, steps=steps) if wanted else []
        with hat.dense():
            base = score(hat, blocks, progress=False)
        for decode in timed:
            with hat.at(decode.capacity, 0.0):
                adaptive = score(hat, blocks, progress=False)
            executed = {"realised": adaptive.capacity, "model_share": adaptive.model_share}
            yield rounded(
                Row,
                **vars(decode) | perplexity(compare(base, adaptive)) | executed,
                text=text,
                text_hash=text_hash(blocks)[:16],
                realised_decode=decode.realised,
            )


def figures(results: Path | None = None) -> dict:
    return {}


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["text", "capacity requested / realised", "perplexity increase (95 % interval)", "decode: ideal",
              "over our own dense path", "over plain transformers"]  # fmt: skip
    lines = [
        [r.text, f"{r.capacity:.2f} / {r.realised:.3f}", said(r._asdict()), times(r.ideal),
         times(r.speedup_dense, r.ideal), times(r.speedup_hf)]
        for r in saved("foundation", results).itertuples()
    ]  # fmt: skip
    return {"foundation": markdown(header, lines)}
