"""Prompts in full or spending by capacity: ``data/results/prompts_in_full.csv``.

Perplexity of what follows the first `PROMPT` tokens of a block, over the base's on the same tokens, at the capacities
of a trained checkpoint: with the prompt's tokens untouched, as in ``generate``, and with all of them spending by
capacity, as in every other measurement.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from hat_lib.evaluation.perplexity import Score, compare
from hat_lib.hat import HierarchicalTransformer
from studies.common import CHECKPOINTS, TEXTS, Machine, machine, markdown, rounded, saved
from studies.speed_targets import whole_blocks

ABOUT = "perplexity of what follows a prompt that runs in full, or spends by capacity"
MINUTES = 5
KEY = ("text", "capacity", "prompt")
PROMPT = 128


@dataclass(frozen=True)
class Row(Machine):
    text: str
    capacity: float
    prompt: str  # full, or gated
    increase: float  # perplexity over the base's, and the ends of its 95 % interval
    low: float
    high: float
    tokens: int
    blocks: int


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    texts: Sequence[str] = TEXTS,
    capacities: Sequence[float] = (0.7, 0.55, 0.4),
    tokens: int = 6144,
    dtype: str = "fp32",
) -> Iterator[Row]:
    """Rows for each text, capacity and kind of prompt; about ``tokens`` tokens of each text, prompts included."""
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    for text in texts:
        wanted = [(c, prompt) for c in capacities for prompt in ("full", "gated") if (text, c, prompt) not in done]
        if not wanted:
            continue
        blocks = whole_blocks(text, hat.base.tokenizer, tokens)
        base = _score(hat, blocks, 1.0, "full")
        for capacity, prompt in wanted:
            found = compare(base, _score(hat, blocks, capacity, prompt))
            columns = machine(hat.base) | {"text": text, "capacity": capacity, "prompt": prompt}
            yield rounded(Row, **columns | vars(found), blocks=found.n_blocks)


@torch.inference_mode()
def _score(hat: HierarchicalTransformer, blocks, capacity: float, prompt: str) -> Score:
    nll = []
    for ids in blocks["input_ids"]:
        ids, cache = torch.tensor([ids], device=hat.base.device), DynamicCache(config=hat.lm.config)
        with hat.at(capacity, 0.0):
            with hat.dense() if prompt == "full" else nullcontext():
                hat.lm(input_ids=ids[:, :PROMPT], cache=cache, use_cache=True, logits_to_keep=1)
            nll.append(_nll(hat.lm(input_ids=ids[:, PROMPT:], cache=cache, use_cache=True).logits[0], ids[0, PROMPT:]))
    tokens = np.array([len(ids) - PROMPT - 1 for ids in blocks["input_ids"]])
    return Score(np.array(nll), tokens, blocks["doc"])


def _nll(logits: Tensor, ids: Tensor) -> float:
    return float(F.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum"))


def tables(results: Path | None = None) -> dict[str, str]:
    table, lines = saved("prompts_in_full", results), []
    for (capacity, text), part in table.groupby(["capacity", "text"], sort=False):
        cells = {r.prompt: f"{r.increase:+.1%} ({r.low:+.1%} to {r.high:+.1%})" for r in part.itertuples()}
        lines.append([f"{capacity:.2f}", text, cells.get("full"), cells.get("gated")])
    return {"prompts_in_full": markdown(["capacity", "text", "prompt in full", "prompt spends, too"], lines)}
