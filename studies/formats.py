"""What fewer bits cost, beside what skipping costs: ``data/results/formats.csv``.

The engine reads the same texts token by token, with its weights in each format, dense and at some capacities. In four
bits the bundled base has its own file's weights, so at capacity 1 only the rounding of inputs is left.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from transformers import DynamicCache

from hat_lib.config import check_capacity
from hat_lib.decoding.generate import WEIGHT_FORMATS
from hat_lib.evaluation.perplexity import Score, compare
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import WorkTally
from hat_lib.text.blocks import load_text, spread
from studies.common import CHECKPOINTS, Machine, machine, markdown, rounded, saved
from studies.plotting.findings import increase_text

ABOUT = "perplexity and KL of the engine's formats, at the same capacities"
MINUTES = 6
KEY = ("text", "weights", "capacity")
BLOCK, AT_A_TIME = 256, 8  # tokens


@dataclass(frozen=True)
class Row(Machine):
    text: str
    weights: str  # of `WEIGHT_FORMATS`
    capacity: float  # requested
    realised: float
    kl: float  # KL(base || engine), nats per token
    perplexity: float
    increase: float  # over the base's on the same tokens, with its 95 % paired interval
    increase_low: float
    increase_high: float
    tokens: int


def rows(
    done: Collection = (),
    *,
    checkpoint: Path = CHECKPOINTS / "default",
    texts: Sequence[str] = ("docstrings", "encyclopedia"),
    capacities: Sequence[float] = (1.0, 0.75, 0.6, 0.5),
    tokens: int = 2048,
    dtype: str = "fp32",
) -> Iterator[Row]:
    """Rows for about ``tokens`` of each text's test split."""
    asked = [check_capacity(c) for c in capacities]
    hat = HierarchicalTransformer.from_pretrained(checkpoint, dtype=dtype)
    for text in texts:
        blocks = load_text(text, hat.base.tokenizer, split="test", block_size=BLOCK)
        blocks = spread(blocks.select([i for i, ids in enumerate(blocks["input_ids"]) if len(ids) == BLOCK]), tokens)
        with hat.reference(), hat.dense():
            expected = list(_read(hat, blocks, WorkTally(hat)))
        base = _score(blocks, expected)
        for form, capacity in [(form, c) for form in WEIGHT_FORMATS for c in asked if (text, form, c) not in done]:
            spent, around = WorkTally(hat), hat.dense() if capacity == 1 else hat.at(capacity, 0.0)
            with hat.engine(), hat.changed(weight_format=form), around:
                found = list(_read(hat, blocks, spent))
            score, pairs = _score(blocks, found), zip(found, expected, strict=True)
            total, paired = sum(_kl(*pair) for pair in pairs), compare(base, score)
            columns = {"text": text, "weights": form, "capacity": capacity, "realised": spent.shares[0]}
            columns |= {"kl": total / sum(map(len, found)), "perplexity": score.perplexity, "tokens": paired.tokens}
            yield rounded(Row, **machine(hat.base) | columns | paired.ends())


@torch.inference_mode()
def _read(hat: HierarchicalTransformer, blocks: Dataset, spent: WorkTally) -> Iterator[Tensor]:
    """Log-probabilities of what follows each token of a block, fp32 ``[T, V]``, read in steps."""
    for ids in torch.tensor(blocks["input_ids"]):
        cache, parts = DynamicCache(config=hat.lm.config), []
        for part in ids[None].split(AT_A_TIME, 1):
            parts.append(hat.lm(input_ids=part, cache=cache, use_cache=True).logits[0].float().log_softmax(-1))
            spent.add(hat.trace)
        yield torch.cat(parts)


def _kl(found: Tensor, expected: Tensor) -> float:
    return float(kl_div(found, expected, reduction="sum", log_target=True))


def _score(blocks: Dataset, predicted: Sequence[Tensor]) -> Score:
    texts = zip(predicted, torch.tensor(blocks["input_ids"]), strict=True)
    nll = [float(nll_loss(p[:-1].double(), ids[1:], reduction="sum")) for p, ids in texts]
    return Score(np.array(nll), np.full(len(nll), BLOCK - 1), blocks["doc"])


def tables(results: Path | None = None) -> dict[str, str]:
    """By text and capacity, what each format costs."""
    table, lines = saved("formats", results), []
    for (text, capacity), part in table.groupby(["text", "capacity"], sort=False):
        part = part.set_index("weights").loc[list(WEIGHT_FORMATS)]
        cells = (f"{r.kl:.4f}, {increase_text(r._asdict())}" for r in part.itertuples())
        lines.append([text, f"{capacity:.2f}", f"{part['realised'].mean():.3f}", *cells])
    return {"formats": markdown(["text", "capacity", "realised", *WEIGHT_FORMATS], lines)}
