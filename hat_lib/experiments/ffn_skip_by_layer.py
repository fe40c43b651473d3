"""What it costs to skip one layer's FFN for every token: ``data/results/ffn_skip_by_layer.csv``.

The bundled base loses little from most layers and everything from a few, which is why whole FFNs are a coarse unit.
Layer 0 is missing: in the adaptive model its FFN never skips, for without it the output is noise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from hat_lib.backbone.base import load_base
from hat_lib.config import HatConfig
from hat_lib.evaluation.perplexity import Score, compare, score
from hat_lib.experiments.columns import rounded
from hat_lib.experiments.tables import saved
from hat_lib.model.policies import Policy, Static
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.plotting import style
from hat_lib.text.blocks import load_text

ABOUT = "a layer whose FFN no token runs: perplexity over the base's"
MINUTES = 1
KEY = ("layer",)
BLOCK = 64  # tokens: short blocks, so that few tokens give an interval


@dataclass(frozen=True)
class Row:
    layer: int
    ratio: float
    """perplexity / base perplexity, and its 95 % paired interval"""
    low: float
    high: float
    text: str
    tokens: int
    dtype: str
    seed: int
    """of the bootstrap"""


def rows(
    done: Collection = (), *, base: str = "bundled", max_tokens: int = 448, seed: int = 0, dtype: str | None = None
) -> Iterator[Row]:
    """A row for each layer but the first, on docstrings."""
    loaded = load_base(base, dtype=dtype)
    blocks = load_text("docstrings", loaded.tokenizer, block_size=BLOCK, max_tokens=max_tokens)
    hat = HierarchicalTransformer(loaded, HatConfig.default(loaded, granularity="token"))
    with hat.dense():
        dense = score(hat, blocks, batch_size=8, progress=False)
    for layer in range(1, hat.config.n_layers):
        if (layer,) not in done:
            _, cost = price(hat, hat.using(skip(layer)), blocks, dense, seed)
            ratios = {"ratio": 1 + cost["increase"], "low": 1 + cost["low"], "high": 1 + cost["high"]}
            yield rounded(Row, layer=layer, **ratios, **setting(loaded, max_tokens, seed))
    hat.unload()


def skip(*layers: int) -> Policy:
    """These layers' FFNs for no token, every other for all."""
    return Static({(i, "ffn"): torch.tensor(False) for i in layers})


def price(hat: HierarchicalTransformer, around, blocks, dense: Score, seed: int) -> tuple[float, dict]:
    """The capacity that was realised within ``around``, and the increase in perplexity with its interval."""
    with around:
        adaptive = score(hat, blocks, batch_size=8, progress=False)
    paired = compare(dense, adaptive, seed=seed)
    return adaptive.capacity, {"increase": paired.increase, "low": paired.low, "high": paired.high}


def setting(base, max_tokens: int, seed: int) -> dict:
    return {"text": "docstrings", "tokens": max_tokens, "dtype": str(base.dtype), "seed": seed}


def figures(results: Path | None = None) -> dict[str, Figure]:
    return {"02_skipped_ffn": style.skipped_ffn(saved("ffn_skip_by_layer", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    return {}
