"""Quality: perplexity with a confidence interval, agreement with the base, bits per byte.

Perplexity is exp of the mean negative log-likelihood per scored token. A block's ``n_context`` leading tokens are read
but not scored, nor is the first token of a block without context. Intervals are paired: both models score the same
tokens, and their blocks are drawn together (`hat_lib.evaluation.intervals`). Bits per byte, nats / (ln 2 * UTF-8 bytes
of the scored text), are comparable across tokenizers (Gao et al. 2020, "The Pile", arXiv:2101.00027).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from hat_lib.base.dispatch import device_of, overridden
from hat_lib.config import HatError, check_count
from hat_lib.evaluation.intervals import interval, resample, units
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.cost import WorkTally

SLICE = 128  # rows of logits held at once in fp32: 25 MB for a vocabulary of 49,152


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text of ``n`` blocks, and what it spent: realised, over all real tokens it ran."""

    nll: np.ndarray  #: negative log-likelihood of each block, nats, fp64 ``[n]``
    tokens: np.ndarray  #: scored tokens of each block, int64 ``[n]``
    documents: Sequence | None = None  #: that each block belongs to; None if each is a document of its own
    capacity: float = 1.0
    exit_rate: float = 0.0
    model_share: float = 1.0
    layer_capacity: float = 1.0  #: `capacity` without the head
    exits: np.ndarray | None = None  #: real tokens by layers run, int64 ``[L + 1]``; None for a plain model
    top1: float | None = None  #: share of tokens with the base's most likely next token; None if the base did not run
    kl: float | None = None  #: KL(base || adaptive), nats per token

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.sum() / self.tokens.sum()))

    @property
    def depth(self) -> float:
        """Layers a token ran, mean over real tokens."""
        return float(np.arange(len(self.exits)) @ self.exits / self.exits.sum())


@dataclass(frozen=True)
class Comparison:
    """Perplexity of an adaptive model against its base, on the same tokens."""

    increase: float  #: ppl / base_ppl - 1
    low: float
    high: float  #: 95 % confidence interval of the increase; nan below six blocks
    base_ppl: float
    ppl: float
    tokens: int
    n_blocks: int

    def ends(self, name: str = "increase") -> dict[str, float]:
        """The increase and its interval as columns of a table: ``name``, ``name_low`` and ``name_high``."""
        return {name: self.increase, f"{name}_low": self.low, f"{name}_high": self.high}


@torch.no_grad()
def score(
    model: HierarchicalTransformer | LlamaForCausalLM,
    dataset: Sequence[Mapping],
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> Score:
    """Negative log-likelihood of each block of ``dataset``, rows of `load_text`, as ``model`` is set. Raises `HatError`
    for a text without a scored token, a bad batch size, or ``hat.lm`` instead of ``hat``."""
    hat = model if isinstance(model, HierarchicalTransformer) else None
    lm = hat.lm if hat else model
    if hat is None and any(map(overridden, lm.model.layers)):
        raise HatError("this model carries a HierarchicalTransformer: pass that, so that its work is counted")
    return _scores(lm, hat, dataset, [nullcontext], batch_size, progress)[0]


@torch.no_grad()
def score_each(
    hat: HierarchicalTransformer,
    dataset: Sequence[Mapping],
    settings: Sequence[Callable[[], AbstractContextManager]] = (nullcontext,),
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> tuple[Score, list[Score]]:
    """`score` of the base, and of ``hat`` in each setting, with its agreement with the base. A setting makes a context,
    such as ``partial(hat.at, 0.5)``; by default ``hat`` runs as it is set."""
    if not isinstance(hat, HierarchicalTransformer):
        raise HatError("agreement needs a HierarchicalTransformer: a plain model has nothing to be compared with")
    base, *adaptive = _scores(hat.lm, hat, dataset, [hat.dense, *settings], batch_size, progress)
    return base, adaptive


def _scores(lm, hat, dataset, settings: Sequence[Callable], batch_size: int, progress: bool) -> list[Score]:
    """Of ``lm``, or of ``hat`` if it is not None, in each setting; all but the first are compared with the first."""
    head, totals = hat.logits if hat else lm.lm_head, [WorkTally(hat) for _ in settings if hat]
    nll, tokens = np.zeros((len(settings), len(dataset))), np.zeros(len(dataset), dtype=np.int64)
    agreement = np.zeros((len(settings), 2))
    for blocks, ids, real, scored in _batches(dataset, batch_size, device_of(lm.get_input_embeddings()), progress):
        rows, columns = scored.nonzero(as_tuple=True)
        tokens[blocks] = scored.sum(1).cpu()
        base = None
        for number, setting in enumerate(settings):
            with setting():
                states = lm.model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
                states = states[rows, columns - 1]  # the head is applied to scored tokens only
                for part in torch.arange(len(rows), device=rows.device).split(SLICE):
                    logits = head(states[part]).float()
                    losses = F.cross_entropy(logits, ids[rows[part], columns[part]], reduction="none")
                    np.add.at(nll[number], blocks[rows[part].cpu().numpy()], losses.double().cpu().numpy())
                    if base is not None:
                        agreement[number] += _agreement(hat, base[part], logits)
                if hat:
                    totals[number].add(hat.trace)
            base = states if base is None else base
    work = [(*total.shares, total.layer_capacity, total.exits) for total in totals] or [()]
    agreed = [(), *(agreement[1:] / tokens.sum()).tolist()]
    documents = np.array([str(row.get("doc", number)) for number, row in enumerate(dataset)])
    return [Score(nll[i], tokens, documents, *work[i], *agreed[i]) for i in range(len(settings))]


def compare(base: Score, adaptive: Score, *, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Relative increase in perplexity with a paired bootstrap interval; `HatError` if the blocks are different ones."""
    if not np.array_equal(base.tokens, adaptive.tokens):
        sizes = (f"{len(s.tokens)} blocks of {int(s.tokens.sum())} tokens" for s in (base, adaptive))
        raise HatError(f"both must be scored on the same blocks, got {' and '.join(sizes)}")
    n, added, tokens = len(base.tokens), adaptive.nll - base.nll, int(base.tokens.sum())
    found = units(range(n) if adaptive.documents is None else adaptive.documents)
    counts = resample(found, n, resamples, seed)
    low, high = interval(np.expm1(counts @ added / (counts @ base.tokens)), n, found.drawn)
    increase = float(np.expm1(added.sum() / tokens))
    return Comparison(increase, low, high, base.perplexity, adaptive.perplexity, tokens, n)


def text_bytes(dataset: Sequence[Mapping], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes of the scored tokens of each block, int64 ``[n_blocks]``: those of the decoded block less those of
    the tokens before its first scored one. So a space that a tokenizer puts before a text cancels, and a character
    split by the edge of a block counts where it ends."""

    def size(ids: list[int]) -> int:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.strip("\ufffd").encode())  # U+FFFD is what a cut character decodes to

    sizes = [size(row["input_ids"]) - size(row["input_ids"][: max(1, row["n_context"])]) for row in dataset]
    return np.array(sizes, dtype=np.int64)


def bits_per_byte(nats: float, n_bytes: int) -> float | None:
    """Cross-entropy in bits per byte of text; None if there is no text."""
    return float(nats / (math.log(2) * n_bytes)) if n_bytes else None


def by_document(dataset: Sequence[Mapping], n_bytes: np.ndarray, base: Score, adaptive: Score) -> pd.DataFrame:
    """A row for each ``doc`` of ``dataset``, in their order: ``document``, ``blocks``, ``tokens`` (scored), ``bytes``
    (``n_bytes`` of its blocks), ``increase``, ``perplexity`` and ``bits_per_byte``, and ``base_`` with these two."""
    sums = {"blocks": 1, "tokens": base.tokens, "bytes": n_bytes, "base_nats": base.nll, "nats": adaptive.nll}
    table = pd.DataFrame({"document": [row["doc"] for row in dataset], **sums})
    table = table.groupby("document", sort=False, as_index=False).sum()
    for model in ("base_", ""):
        nats = table.pop(f"{model}nats")
        table[f"{model}perplexity"] = np.exp(nats / table["tokens"])
        table[f"{model}bits_per_byte"] = pd.Series(list(map(bits_per_byte, nats, table["bytes"])), dtype=object)
    return table.assign(increase=table["perplexity"] / table["base_perplexity"] - 1)


def _agreement(hat: HierarchicalTransformer, base: Tensor, logits: Tensor) -> tuple[int, float]:
    """How many tokens have the likeliest next one of the base's final states ``[n, D]``, and the sum of KL, nats."""
    with hat.dense():
        expected = hat.logits(base).float()
    same = (expected.argmax(-1) == logits.argmax(-1)).sum()
    kl = F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return int(same), float(kl.double().sum())


def _batches(dataset, batch_size: int, device, progress: bool) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
    """Numbers of the blocks ``[B]``; their ids, which are real (int64) and which are scored (bool), ``[B, T]``."""
    check_count("batch_size", batch_size, 1)
    ends = torch.tensor([len(row["input_ids"]) for row in dataset])
    starts = torch.tensor([max(1, row["n_context"]) for row in dataset])  # nothing precedes the very first token
    if not (starts < ends).any():
        raise HatError(f"nothing to score: {len(ends)} blocks without a token that follows another")
    order = ends.argsort(descending=True, stable=True)  # blocks of similar length need the least padding
    for blocks in tqdm(order.split(batch_size), desc="perplexity", disable=not progress):
        rows = [torch.as_tensor(dataset[block]["input_ids"]) for block in blocks.tolist()]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.arange(ids.shape[1]) < ends[blocks, None]
        scored = real & (torch.arange(ids.shape[1]) >= starts[blocks, None])
        yield blocks.numpy(), *(t.to(device) for t in (ids, real.long(), scored))


@dataclass(frozen=True)
class Perplexity:
    """On a text, relative to the base's; if ``base`` is "bundled", that is a dequantised 4-bit file."""

    text: str
    tokens: int
    base_ppl: float
    increase: float
    increase_low: float | None
    increase_high: float | None  #: 95 % paired interval; None below six blocks
    top1: float  #: share of tokens with the base's most likely next token
    kl: float  #: KL(base || variant), nats per token


def columns(base: Score, found: Score) -> dict:
    """The columns of a row of results: `Perplexity` without ``text``, and ``ppl``, ``blocks``, ``realised``,
    ``realised_exit`` and ``model_share``; nan where there is no interval."""
    paired = compare(base, found)
    work = {"realised": found.capacity, "realised_exit": found.exit_rate, "model_share": found.model_share}
    return vars(paired) | paired.ends() | work | {"blocks": paired.n_blocks, "top1": found.top1, "kl": found.kl}
