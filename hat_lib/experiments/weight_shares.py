"""Which part of the weights that a token reads is FFN, attention, LM head: ``data/results/weight_shares.csv``.

What only FFNs or only attention can save is bounded by these shares. They are counted from the shapes alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from hat_lib.backbone.base import load_base
from hat_lib.backbone.shapes import random_config
from hat_lib.experiments.columns import rounded
from hat_lib.experiments.tables import markdown, saved
from hat_lib.model.granularity import linear_work
from hat_lib.plotting import style

ABOUT = "a base: what share of its weights is FFN, attention, LM head"
MINUTES = 1
KEY = ("base",)


@dataclass(frozen=True)
class Row:
    base: str
    ffn: float
    attention: float
    head: float
    """shares, sum 1"""


def rows(done: Collection = (), *, base: str = "bundled") -> Iterator[Row]:
    """The base, and TinyLlama's shape beside it."""
    for name, shape in ((base, None), ("TinyLlama-1.1B", "random:tinyllama")):
        if (name,) not in done:
            config = random_config(shape) if shape else load_base(name).model.config
            weights = matrices(config)
            yield rounded(Row, base=name, **{part: count / sum(weights.values()) for part, count in weights.items()})


def matrices(config) -> dict[str, int]:
    """Weights that one token is multiplied with, by part: a Llama without its norms; the head counts if tied, too."""
    work, layers = linear_work(config), config.num_hidden_layers
    return {
        "ffn": layers * (work["gate_up"] + work["down"]),
        "attention": layers * (work["qkv"] + work["o"]),
        "head": config.vocab_size * config.hidden_size,
    }


def figures(results: Path | None = None) -> dict[str, Figure]:
    return {"01_weight_shares": style.weight_shares(saved("weight_shares", results))}


def tables(results: Path | None = None) -> dict[str, str]:
    lines = [[r.base, *(f"{share:.0%}" for share in r[2:])] for r in saved("weight_shares", results).itertuples()]
    return {"weight_shares": markdown(["base", "FFN", "attention", "LM head"], lines)}
