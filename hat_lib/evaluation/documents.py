"""Documents: bits per byte, and a score for each document, the base's beside the adaptive model's.

Bits per byte are nats / (ln 2 * UTF-8 bytes of the scored tokens' text), and compare across tokenizers, as perplexity
does not (Gao et al. 2020, "The Pile", arXiv:2101.00027). The bytes of a block are those of the decoded block less
those of the decoded tokens before its first scored one. So special tokens are no text, the space that some tokenizers
put before a text cancels, and a character that the edge of a block cuts counts where it ends. The windows of a
document add up to its text, but for its first token, which is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from hat_lib.evaluation.perplexity import Score, first_scored


@dataclass(frozen=True)
class DocumentRow:
    """One document's score; perplexities and bits over its scored tokens."""

    document: str
    blocks: int
    tokens: int
    bytes: int
    base_perplexity: float
    perplexity: float
    increase: float
    """perplexity over the base's, less 1"""
    base_bits_per_byte: float | None
    bits_per_byte: float | None
    """None where no character ends in the scored tokens"""


def text_bytes(dataset: Sequence[Mapping], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes of the scored tokens of each block, int64 ``[n_blocks]``; rows as in `load_text`."""

    def size(ids: list[int]) -> int:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.strip("\ufffd").encode())  # what a cut character decodes to

    blocks = [(row["input_ids"], first_scored(row)) for row in dataset]
    return np.array([size(ids) - size(ids[:first]) for ids, first in blocks], dtype=np.int64)


def bits_per_byte(nats: float, n_bytes: int) -> float | None:
    """Cross-entropy in bits per byte of text; None where there is no text."""
    return float(nats / (math.log(2) * n_bytes)) if n_bytes else None


def by_document(dataset: Sequence[Mapping], n_bytes: np.ndarray, base: Score, adaptive: Score) -> list[DocumentRow]:
    """A row for each document, in the order in which they come.

    Args:
        dataset: what both were scored on; the column ``doc`` tells documents apart.
        n_bytes: what `text_bytes` gave for it.
    """
    blocks_of: dict[str, list[int]] = {}
    for number, row in enumerate(dataset):
        blocks_of.setdefault(row["doc"], []).append(number)
    rows = []
    for document, blocks in blocks_of.items():
        tokens, size = int(base.tokens[blocks].sum()), int(n_bytes[blocks].sum())
        nats, base_nats = (float(score.nll[blocks].sum()) for score in (adaptive, base))
        perplexities = math.exp(base_nats / tokens), math.exp(nats / tokens), math.expm1((nats - base_nats) / tokens)
        bits = bits_per_byte(base_nats, size), bits_per_byte(nats, size)
        rows.append(DocumentRow(document, len(blocks), tokens, size, *perplexities, *bits))
    return rows
