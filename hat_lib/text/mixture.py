"""What a run trains on: sources mixed evenly.

Thresholds trained on one kind of text got better there and worse elsewhere, so the default mixes addresses with
text that the frozen base wrote itself (``self``, see `hat_lib.text.sampled`), which favours no corpus. The
validation and test splits, and domain B, are never trained on.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from hat_lib.backbone.base import Base
from hat_lib.config import HatError
from hat_lib.text.blocks import load_text
from hat_lib.text.sampled import self_text

SELF = "self"


def sources(text: str) -> list[str]:
    """``"addresses+self"`` as a list; ``bundled`` stands for that. Raises `HatError` for an empty or repeated one."""
    if text == "bundled":
        text = f"addresses+{SELF}"
    found = [part.strip() for part in text.split("+")]
    if not all(found) or len(set(found)) < len(found):
        raise HatError(f"training text must be distinct sources joined by +, got {text!r}")
    return found


def training_text(
    base: Base, text: str, tokens: int, *, block_size: int = 512, seed: int = 0, progress: bool = True
) -> Dataset:
    """About ``tokens`` tokens in blocks, the sources' shares equal, in one fixed shuffled order.

    Args:
        base: plain, without a `HierarchicalTransformer` on it; ``self`` is sampled from it.
        text: sources joined by +: ``self``, or those of `load_text`, whose train split is taken.

    Returns:
        Rows of `load_text`, and ``index``, the number of the row. A short source gives what it has.
    """
    names = sources(text)
    each = max(2, tokens // len(names))
    parts = []
    for name in names:
        if name == SELF:
            rows = self_text(base, each, block_size=block_size, seed=seed, progress=progress)
        else:
            rows = load_text(name, base.tokenizer, split="train", block_size=block_size)
            whole = np.flatnonzero([len(ids) == block_size for ids in rows["input_ids"]])
            # Blocks at even distances, so that all of the source is seen; whole ones, if there are enough.
            whole = whole if len(whole) * block_size >= each else np.arange(len(rows))
            count = min(len(whole), max(1, round(each / block_size)))
            rows = rows.select(whole[np.linspace(0, len(whole) - 1, count).round().astype(int)])
        parts.append(rows)
    rows = [row for part in parts for row in part]
    order = np.random.default_rng(seed).permutation(len(rows))
    return Dataset.from_list([{**rows[at], "index": number} for number, at in enumerate(order)])
