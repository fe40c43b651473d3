"""Why channels and not whole FFNs: three ways to do less, on one axis, ``data/results/grain_frontier.csv``.

Work is the executed share of all linear layers of the blocks, attention included, so that the two grains can be
compared: a whole-FFN router leaves attention as it is. Nothing here is trained.

    whole FFN, random tokens   each token skips FFNs at random, which any token router must beat
    whole FFN, best layers     the cheapest layers of ``ffn_skip_by_layer.csv``, chosen on this very text, which
                               flatters it
    channels, calibrated       the checkpoint, whose thresholds come from other text
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from hat_lib.config import HatConfig
from hat_lib.evaluation.perplexity import score
from hat_lib.experiments.columns import CHECKPOINTS, rounded
from hat_lib.experiments.ffn_skip_by_layer import BLOCK, price, setting, skip
from hat_lib.experiments.tables import markdown, saved
from hat_lib.model.granularity import linear_work
from hat_lib.model.policies import Random
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting import style
from hat_lib.plotting.findings import said
from hat_lib.text.blocks import load_text

ABOUT = "a way to do less: perplexity over the base's at a share of the work"
MINUTES = 1
READS = ("ffn_skip_by_layer",)
KEY = ("method", "work")
TOKENS, LAYERS, CHANNELS = "whole FFN, random tokens", "whole FFN, best layers", "channels, calibrated"


@dataclass(frozen=True)
class Row:
    method: str
    work: float
    """executed share of the work of all linear layers of the blocks"""
    increase: float
    """perplexity / base perplexity - 1, and its 95 % paired interval"""
    low: float
    high: float
    text: str
    tokens: int
    dtype: str
    seed: int
    """of the draws and of the bootstrap"""


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "calibrated",
    results: Path | None = None,
    max_tokens: int = 448,
    seed: int = 0,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Three shares of each method, on docstrings.

    Args:
        results: folder of ``ffn_skip_by_layer.csv``; data/results unless told.
    """
    cheapest = saved("ffn_skip_by_layer", results).sort_values("ratio")["layer"].tolist()
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    base = hat.base
    blocks = load_text("docstrings", base.tokenizer, block_size=BLOCK, max_tokens=max_tokens)
    with hat.dense():
        dense = score(hat, blocks, batch_size=8, progress=False)
    made = partial(rounded, Row, **setting(base, max_tokens, seed))
    found = []
    for capacity in (0.62, 0.75, 0.9):
        work, cost = price(hat, hat.at(capacity, 0.0), blocks, dense, seed)
        found.append(made(method=CHANNELS, work=work, **cost))
    hat.unload()

    size = linear_work(base.model.config)
    ffn = (size["gate_up"] + size["down"]) / sum(size.values())
    hat = HierarchicalTransformer(base, HatConfig.default(base, granularity="token"))
    policies = [(LAYERS, skip(*cheapest[:n])) for n in (12, 8, 3)]
    policies += [(TOKENS, Random(share, seed)) for share in (0.6, 0.75, 0.9)]
    for method, policy in policies:
        capacity, cost = price(hat, hat.using(policy), blocks, dense, seed)
        found.append(made(method=method, work=1 - ffn * (1 - capacity), **cost))
    hat.unload()
    yield from (row for row in found if (row.method, row.work) not in done)


def figures(results: Path | None = None) -> dict[str, Figure]:
    return {"02_grain_frontier": style.grain_frontier(saved("grain_frontier", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    lines = [
        [r.method, f"{r.work:.0%}", said({"increase": r.increase, "increase_low": r.low, "increase_high": r.high})]
        for r in saved("grain_frontier", results).itertuples()
    ]
    return {"grain_frontier": markdown(["method", "share of the work", "perplexity increase (95 % interval)"], lines)}
