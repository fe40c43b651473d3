"""Columns that many files of results have: the machine, and a perplexity beside its base's."""

from __future__ import annotations

from dataclasses import fields

import torch

from hat_lib.backbone.base import Base
from hat_lib.config import DATA
from hat_lib.evaluation.perplexity import Comparison

CHECKPOINTS = DATA / "checkpoints"
TEXTS = ("addresses", "docstrings")


def machine(base: Base) -> dict:
    """What ran, and where."""
    cuda = base.device.type == "cuda"
    return {
        "base": base.name,
        "device": torch.cuda.get_device_name(base.device) if cuda else base.device.type,
        "dtype": str(base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def perplexity(paired: Comparison) -> dict:
    return {
        "base_ppl": paired.base_ppl,
        "ppl": paired.ppl,
        "increase": paired.increase,
        "increase_low": paired.low,
        "increase_high": paired.high,
        "tokens": paired.tokens,
        "blocks": paired.n_blocks,
    }


def rounded(row_type: type, **values):
    """A row with its floats to five significant digits; what ``row_type`` has no column for is left out."""
    names = [f.name for f in fields(row_type) if f.name in values]
    return row_type(**{n: float(f"{values[n]:.5g}") if isinstance(values[n], float) else values[n] for n in names})
