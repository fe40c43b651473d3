"""Quality: perplexity with a confidence interval, and agreement with the base.

Perplexity is exp of the mean negative log-likelihood per scored token, over the strided windows of
`hat_lib.text.blocks`: a block's ``n_context`` leading tokens are looked at and not scored, nor is the first token of
a block without context.

`compare` is paired: base and adaptive model score the same tokens, and blocks are resampled together
(expanded percentile bootstrap, Hesterberg 2015, arXiv:1411.5279), so that what is hard for both cancels.
The unit is the block and not the document, because a test split may be a handful of long documents.
Blocks of one document are alike and windows may overlap, so the interval speaks of text like this text, and
is too narrow for other documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import norm
from scipy.stats import t as student_t
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

from hat_lib.config import HatError
from hat_lib.model.cost import WorkTally
from hat_lib.model.transformer import HierarchicalTransformer

# Rows of logits held at once in fp32: 25 MB for a vocabulary of 49,152.
SLICE = 128


@dataclass(frozen=True)
class Agreement:
    """How close an adaptive model stays to its own dense pass, over the scored tokens."""

    top1: float
    """share of tokens for which both hold the same next token most likely"""
    kl: float
    """KL(base || adaptive), nats per token"""
    tokens: int


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text, and what it spent: realised, over all real tokens that it ran."""

    nll: np.ndarray
    """negative log-likelihood of each block, nats, fp64 ``[n_blocks]`` in the order of the dataset"""
    tokens: np.ndarray
    """scored tokens of each block, int64 ``[n_blocks]``"""
    capacity: float = 1.0
    exit_rate: float = 0.0
    model_share: float = 1.0
    exits: np.ndarray | None = None
    """real tokens by the layers that they ran, int64 ``[L + 1]``; None for a plain model"""
    agreement: Agreement | None = None
    """with the base, where the same tokens were run through it"""

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.sum() / self.tokens.sum()))

    @property
    def depth(self) -> float:
        """Layers that a token ran, mean over real tokens."""
        return float(np.arange(len(self.exits)) @ self.exits / self.exits.sum())


@dataclass(frozen=True)
class Comparison:
    """Perplexity of an adaptive model against its base, on the same tokens."""

    increase: float
    """``ppl / base_ppl - 1``; negative where the adaptive model is the better one"""
    low: float
    high: float
    """95 % confidence interval of the increase"""
    base_ppl: float
    ppl: float
    tokens: int
    n_blocks: int


@torch.no_grad()
def score(
    model: HierarchicalTransformer | LlamaForCausalLM,
    dataset: Sequence[Mapping],
    *,
    batch_size: int = 1,
    against: Sequence[Tensor] | None = None,
    progress: bool = True,
) -> Score:
    """Negative log-likelihood of each block; the same for any batch size, within rounding.

    Args:
        model: a `HierarchicalTransformer`, run as it is set (under ``hat.dense()`` it is its base), or a
            plain Llama.
        dataset: rows of `load_text`: ``input_ids`` and ``n_context``.
        batch_size: blocks per forward, right-padded.
        against: what `states` gave for the same dataset and batch size, to agree with.

    Raises `HatError` for a text without a scored token, a bad batch size, and ``hat.lm`` in place of ``hat``.
    """
    lm, hat = _unwrap(model)
    tally = _Tally(lm, hat, len(dataset))
    for number, batch in enumerate(_batches(dataset, batch_size, lm.device, progress, "perplexity")):
        tally.add(batch, batch.run(lm), None if against is None else against[number])
    return tally.score()


@torch.no_grad()
def score_each(
    hat: HierarchicalTransformer,
    dataset: Sequence[Mapping],
    settings: Sequence[Callable[[], AbstractContextManager]],
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> tuple[Score, list[Score]]:
    """`score` of the base and of ``hat`` in each of several settings, with its agreement; the base is run once for all.

    Args:
        settings: each makes the context to run ``hat`` in, such as ``partial(hat.at, 0.5)``.

    Other arguments and errors as in `score`; the base is ``hat.dense()``.
    """
    lm, hat = _unwrap(hat)
    if hat is None:
        raise HatError("agreement needs a HierarchicalTransformer: a plain model has nothing to be compared with")
    base, *adaptive = (_Tally(lm, hat, len(dataset)) for _ in range(1 + len(settings)))
    for batch in _batches(dataset, batch_size, lm.device, progress, "perplexity"):
        with hat.dense():
            dense = batch.run(lm)
            base.add(batch, dense)
        for tally, setting in zip(adaptive, settings, strict=True):
            with setting():
                tally.add(batch, batch.run(lm), dense)
    return base.score(), [tally.score() for tally in adaptive]


def score_pair(
    hat: HierarchicalTransformer, dataset: Sequence[Mapping], *, batch_size: int = 1, progress: bool = True
) -> tuple[Score, Score]:
    """`score_each` in the one setting that ``hat`` is in: base and adaptive, two forwards a batch."""
    base, (adaptive,) = score_each(hat, dataset, [nullcontext], batch_size=batch_size, progress=progress)
    return base, adaptive


@torch.no_grad()
def states(model, dataset: Sequence[Mapping], *, batch_size: int = 1, progress: bool = True) -> list[Tensor]:
    """Final hidden states of each batch, ``[B, T, D]``, for `score` to compare with; arguments as there."""
    lm, _ = _unwrap(model)
    return [batch.run(lm) for batch in _batches(dataset, batch_size, lm.device, progress, "base")]


def compare(base: Score, adaptive: Score, *, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Relative increase in perplexity with a paired bootstrap interval; one seed, one result.

    An interval needs 8 blocks: of 100 texts drawn from measured blocks it then holds the truth in 93 to 95; with 4
    blocks in 87, with 3 in 75, with 2 in 50.

    Raises `HatError` if the two were not scored on the same blocks, or on fewer than two.
    """
    if not np.array_equal(base.tokens, adaptive.tokens):
        raise HatError(f"both must be scored on the same blocks, got {_size(base)} and {_size(adaptive)}")
    n = len(base.tokens)
    if n < 2:
        raise HatError(f"an interval needs at least 2 blocks, got {n}: use more text or shorter blocks")
    added = adaptive.nll - base.nll
    # How often each block is drawn, which is all that a resampled sum needs.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    drawn = np.expm1(counts @ added / (counts @ base.tokens))
    low, high = np.quantile(drawn, tails(n))
    return Comparison(
        increase=float(np.expm1(added.sum() / base.tokens.sum())),
        low=float(low),
        high=float(high),
        base_ppl=base.perplexity,
        ppl=adaptive.perplexity,
        tokens=int(base.tokens.sum()),
        n_blocks=n,
    )


def tails(n: int) -> tuple[float, float]:
    """Quantiles of a 95 % bootstrap interval from ``n`` >= 2 units. The plain 0.025 and 0.975 are too narrow for few;
    widened as Student's t is against the normal."""
    tail = float(norm.cdf(np.sqrt(n / (n - 1)) * student_t.ppf(0.025, n - 1)))
    return tail, 1 - tail


def agreement(
    hat: HierarchicalTransformer, dataset: Sequence[Mapping], *, batch_size: int = 1, progress: bool = True
) -> Agreement:
    """Top-1 agreement and KL of ``hat`` with its own dense pass; arguments and errors as in `score_pair`."""
    return score_pair(hat, dataset, batch_size=batch_size, progress=progress)[1].agreement


class _Tally:
    """What the batches of one pass add up to."""

    def __init__(self, lm: LlamaForCausalLM, hat: HierarchicalTransformer | None, n_blocks: int):
        self.head, self.spent = lm.lm_head, None if hat is None else WorkTally(hat)
        self.nll, self.tokens = np.zeros(n_blocks), np.zeros(n_blocks, dtype=np.int64)
        self.agreed, self.same, self.divergence = 0, 0, 0.0

    def add(self, batch: _Batch, hidden: Tensor, base: Tensor | None = None) -> None:
        """Right after the forward that gave ``hidden [B, T, D]``; ``base`` has the states to agree with."""
        for rows, targets, *both in batch.slices(hidden, *(() if base is None else (base,))):
            logits, *theirs = (self.head(h).float() for h in both)
            losses = F.cross_entropy(logits, targets, reduction="none")
            np.add.at(self.nll, batch.blocks[rows], losses.double().cpu().numpy())
            np.add.at(self.tokens, batch.blocks[rows], 1)
            for other in theirs:
                p, q = F.log_softmax(other, dim=-1), F.log_softmax(logits, dim=-1)
                self.same += int((other.argmax(-1) == logits.argmax(-1)).sum())
                self.divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
                self.agreed += len(other)
        if self.spent is not None:
            self.spent.add(self.spent.hat.trace)

    def score(self) -> Score:
        n = self.agreed
        found = Agreement(self.same / n, self.divergence / n, n) if n else None
        if self.spent is None:
            return Score(self.nll, self.tokens, agreement=found)
        return Score(self.nll, self.tokens, *self.spent.shares, self.spent.exits, found)


@dataclass(frozen=True)
class _Batch:
    blocks: np.ndarray  # numbers of the blocks in the dataset, [B]
    ids: Tensor  # [B, T]
    real: Tensor  # int64 [B, T], 0 at padding
    scored: Tensor  # bool [B, T]

    def run(self, lm: LlamaForCausalLM) -> Tensor:
        """Final hidden states ``[B, T, D]``; the head comes later, for scored tokens alone."""
        return lm.model(input_ids=self.ids, attention_mask=self.real, use_cache=False).last_hidden_state

    def slices(self, *hidden: Tensor) -> Iterator[tuple]:
        """``(rows, targets, states...)``: batch row, token id and what predicts it, `SLICE` tokens at a time."""
        rows, columns = self.scored.nonzero(as_tuple=True)
        for row, column in zip(rows.split(SLICE), columns.split(SLICE), strict=True):
            yield row.cpu().numpy(), self.ids[row, column], *(h[row, column - 1] for h in hidden)


def first_scored(row: Mapping) -> int:
    """Where the scored tokens of a block begin: nothing precedes its very first one."""
    return max(1, row["n_context"])


def _batches(dataset, batch_size: int, device, progress: bool, label: str) -> Iterator[_Batch]:
    lengths = [len(row["input_ids"]) for row in dataset]
    first = [first_scored(row) for row in dataset]
    if not any(n > start for n, start in zip(lengths, first, strict=True)):
        raise HatError(f"nothing to score: {len(lengths)} blocks without a token that follows another")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise HatError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    order = np.argsort(lengths, kind="stable")[::-1]  # blocks of like length pad each other least
    for start in tqdm(range(0, len(order), batch_size), desc=label, disable=not progress):
        blocks = order[start : start + batch_size]
        shape = len(blocks), max(lengths[b] for b in blocks)
        ids, real = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        scored = torch.zeros(shape, dtype=torch.bool)
        for i, block in enumerate(blocks.tolist()):
            ids[i, : lengths[block]] = torch.as_tensor(dataset[block]["input_ids"])
            real[i, : lengths[block]] = 1
            scored[i, first[block] : lengths[block]] = True
        yield _Batch(blocks, ids.to(device), real.to(device), scored.to(device))


def _unwrap(model) -> tuple[LlamaForCausalLM, HierarchicalTransformer | None]:
    if isinstance(model, HierarchicalTransformer):
        return model.lm, model
    if any("forward" in vars(layer) for layer in model.model.layers):
        raise HatError("this model carries a HierarchicalTransformer: pass that, so that its work is counted")
    return model, None


def _size(score: Score) -> str:
    return f"{len(score.tokens)} blocks of {int(score.tokens.sum())} tokens"
