"""Held-out text for calibration, and the dense model's scores on it, as a threshold for each share to keep."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hat_lib.config import HatError
from hat_lib.hat import HierarchicalTransformer
from hat_lib.text.blocks import count_tokens, spread

LEAST_TOKENS = 256  # fewest tokens to calibrate or match a control on
CHECK_TOKENS = 4096  # on which a setting is run to see what it realises: a mean over all sites and tokens
BATCH_TOKENS = 1024  # most of these in one forward: the overhead of a short block costs as much as its work
QUANTILES = 65
SAMPLES = 200_000  # scores kept per site, drawn at random from all tokens and channels

SiteThresholds = dict[tuple[int, str], float]  # by (layer, site); at (layer, "token"), the strength of sensitivity


def held_out_parts(hat, blocks: Iterable[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Text to measure scores and prices on, in blocks ``[1, T]``, and other text to see what they realise, in batches
    ``[B, T]``: every fourth block or, where that is less than an eighth of the tokens, the last quarter of each."""
    blocks = block_tensors(hat, blocks)
    fit, check = [b for i, b in enumerate(blocks) if i % 4 != 3], blocks[3::4]
    if 8 * count_tokens(check) < count_tokens(blocks):
        fit, check = zip(*(b.tensor_split([3 * b.shape[1] // 4], 1) for b in blocks), strict=True)
    return list(fit), check_batches(check)


def block_tensors(hat, blocks: Iterable[Sequence[int] | Mapping]) -> list[Tensor]:
    """Blocks, as token ids or rows of `load_text`, as int64 ``[1, T]`` on the model's device; those of a single token
    are left out. `HatError` below `LEAST_TOKENS` tokens."""
    ids = [block["input_ids"] if isinstance(block, Mapping) else block for block in blocks]
    tensors = [torch.tensor([block], device=hat.base.device) for block in ids if len(block) > 1]
    if (found := count_tokens(tensors)) < LEAST_TOKENS:
        raise HatError(f"at least {LEAST_TOKENS} tokens of text are needed, got {found}")
    return tensors


def check_batches(blocks: Sequence[Tensor]) -> list[Tensor]:
    """About `CHECK_TOKENS` tokens, blocks of the same length as batches of at most `BATCH_TOKENS`."""
    batches, length = [], Tensor.numel
    for size, alike in groupby(sorted(spread(blocks, CHECK_TOKENS), key=length), length):
        batches += torch.cat(list(alike)).split(max(1, BATCH_TOKENS // size))
    return batches


def forwards(hat, blocks: Iterable[Tensor], label: str = "", progress: bool = False, logits: int = 1) -> Iterator[int]:
    """Run each of ``blocks`` (``[B, T]``) and yield its number of tokens; ``logits`` is how many to keep, 0 for all."""
    for block in tqdm(blocks, desc=label, disable=not progress):
        hat.lm(block, use_cache=False, logits_to_keep=logits)
        yield block.numel()


class ScoreQuantiles(NamedTuple):
    """The dense model's scores, as a threshold for each share to keep."""

    tables: dict[tuple[int, str], np.ndarray]  #: scores at evenly spaced quantiles, by (layer, site)
    tokens: int
    scores: int  #: drawn at the site with most of them, from so many tokens

    def threshold(self, key: tuple[int, str], share: float) -> float:
        """The threshold that keeps ``share`` of a site's scores."""
        table = self.tables[key]
        return float(np.interp(1 - share, np.linspace(0, 1, len(table)), table))

    def thresholds(self, share: float) -> SiteThresholds:
        """Thresholds that keep the same share at every site."""
        return {key: self.threshold(key, share) for key in self.tables}


@torch.no_grad()
def score_quantiles(
    hat: HierarchicalTransformer, blocks: list[Tensor], progress: bool = True, seed: int = 0
) -> ScoreQuantiles:
    """Run the dense model over ``blocks`` (``[1, T]`` each), drawing up to `SAMPLES` scores per site at random.

    Both rows and channels are drawn from the whole text: on a wide base, a stride would take one token per block.
    Protected tokens are left out. Raises `HatError` if all scores are equal (token routers that were never fitted).
    """
    total, drawn, tokens = count_tokens(blocks), np.random.default_rng(seed), 0
    found: dict[tuple[int, str], list[Tensor]] = {}

    def collect(layer, site, x, rows, trace):
        score = hat.scores(layer, site, x)[~trace.protected.view(-1)].flatten()
        wanted = math.ceil(SAMPLES * x.shape[0] / total)
        if wanted < len(score):
            score = score[torch.from_numpy(drawn.integers(len(score), size=wanted)).to(score.device)]
        found.setdefault((layer, site), []).append(score)

    with hat.dense(), hat.using(collect):
        for _ in forwards(hat, blocks, "scores", progress):
            tokens += int((~hat.trace.protected).sum())
    kept = {key: torch.cat(scores).cpu().numpy() for key, scores in found.items()}
    tables = {key: np.quantile(scores, np.linspace(0, 1, QUANTILES)) for key, scores in kept.items()}
    if all(q[0] == q[-1] for q in tables.values()):
        raise HatError("every router score is equal, so no threshold can tell tokens apart: train or fit the routers")
    return ScoreQuantiles(tables, tokens, max(map(len, kept.values())))
