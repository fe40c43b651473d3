"""The foundation result: what the untrained, calibrated channel grain costs and gains on the real base.

For each capacity and text: perplexity over the dense base's with its paired interval, and batch-1 decode of
that same text against plain transformers and against our own dense path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hat_lib.backbone.base import Base, load_base
from hat_lib.config import HatError
from hat_lib.evaluation.perplexity import compare, score
from hat_lib.experiments.benchmark import CONTEXT, decode_rows
from hat_lib.experiments.tables import markdown, saved, times
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting.findings import said
from hat_lib.text.blocks import load_text, text_hash


@dataclass(frozen=True)
class FoundationRow:
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


def foundation(
    checkpoint,
    *,
    dtype=None,
    texts: Sequence[str] = ("addresses", "docstrings"),
    capacities: Sequence[float] = (0.75, 0.62),
    max_tokens: int = 20_000,
    rounds: int = 9,
    steps: int = 24,
    progress: bool = True,
) -> list[FoundationRow]:
    """Measure a checkpoint; rows for each text and capacity.

    Args:
        max_tokens: test tokens per text.
        rounds, steps: interleaved rounds of the timing, and decode steps in each.
    """
    if rounds < 1 or steps < 1:
        raise HatError(f"rounds and steps must be at least 1, got {rounds} and {steps}")
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    plain: Base = load_base(hat.base.name, dtype=hat.base.dtype)
    rows = []
    for text in texts:
        blocks = load_text(text, hat.base.tokenizer, split="test", max_tokens=max_tokens)
        ids = torch.tensor([blocks[0]["input_ids"]], device=hat.base.device)
        if ids.shape[1] < CONTEXT + steps:
            raise HatError(f"{text}: decoding needs {CONTEXT + steps} tokens in the first block, got {ids.shape[1]}")
        timed = {r.capacity: r for r in decode_rows(hat, plain, ids, capacities, rounds=rounds, steps=steps)}
        with hat.dense():
            base_score = score(hat, blocks, progress=progress)
        for capacity in capacities:
            hat.capacity = capacity
            adaptive = score(hat, blocks, progress=progress)
            paired, t = compare(base_score, adaptive), timed[capacity]
            rows.append(
                FoundationRow(
                    base=hat.base.name,
                    device=t.device,
                    dtype=t.dtype,
                    threads=t.threads,
                    granularity=hat.config.granularity,
                    text=text,
                    text_hash=text_hash(blocks)[:16],
                    tokens=paired.tokens,
                    blocks=paired.n_blocks,
                    capacity=capacity,
                    realised=round(adaptive.capacity, 4),
                    model_share=round(adaptive.model_share, 4),
                    base_ppl=round(paired.base_ppl, 4),
                    ppl=round(paired.ppl, 4),
                    increase=round(paired.increase, 5),
                    increase_low=round(paired.low, 5),
                    increase_high=round(paired.high, 5),
                    ms_hf=t.ms_hf,
                    ms_dense=t.ms_dense,
                    ms_adaptive=t.ms_adaptive,
                    speedup_hf=t.speedup_hf,
                    speedup_dense=t.speedup_dense,
                    ideal=t.ideal,
                    realised_decode=t.realised,
                    rounds=t.rounds,
                )
            )
    return rows


def tables(results: Path | None = None) -> dict[str, str]:
    header = ["text", "capacity requested / realised", "perplexity increase (95 % interval)", "decode: ideal",
              "over our own dense path", "over plain transformers"]  # fmt: skip
    lines = [
        [r.text, f"{r.capacity:.2f} / {r.realised:.3f}", said(r._asdict()), times(r.ideal),
         times(r.speedup_dense, r.ideal), times(r.speedup_hf)]
        for r in saved("foundation", results).itertuples()
    ]  # fmt: skip
    return {"foundation": markdown(header, lines)}
