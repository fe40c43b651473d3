"""What a run trains on: sources mixed evenly, including text that the frozen base wrote itself.

Thresholds trained on one kind of text got better there and worse elsewhere, so the default mixes addresses with
``self``, which favours no corpus. LLM-QAT (Liu et al. 2023, arXiv:2305.17888) distils on generations of the pretrained
model in this way; here nothing is greedy. There are two sources of such text:

self      every token is drawn from the base's whole distribution at temperature 1. The first is BOS if the tokenizer
          begins a text with it; otherwise it is drawn uniformly from the vocabulary without its special tokens.
openings  each block continues an opening of one of many kinds of text (`hat_lib.text.openings`), every token drawn
          from the nucleus: the most likely tokens that together have `TOP_P` of the probability, at most `TOP_K` of
          them (Holtzman et al. 2020, arXiv:1904.09751).

EOS is a token like any other: a block goes on after it, so that every block is full.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from hat_lib.backbone.base import Base
from hat_lib.config import HatError, cache_dir, check_count
from hat_lib.text import openings as openings_module
from hat_lib.text.blocks import at_even_distances, load_text
from hat_lib.text.openings import openings

SELF, OPENINGS = "self", "openings"
OWN = (SELF, OPENINGS)
"""text that the base writes itself"""
TOP_P, TOP_K = 0.95, 1000


def sources(text: str) -> list[str]:
    """``"addresses+self"`` as a list; ``bundled`` stands for it. Raises `HatError` for an empty or repeated source."""
    if text == "bundled":
        text = f"addresses+{SELF}"
    found = [part.strip() for part in text.split("+")]
    if not all(found) or len(set(found)) < len(found):
        raise HatError(f"training text must be distinct sources joined by +, got {text!r}")
    return found


def training_text(
    base: Base, text: str, tokens: int, *, block_size: int = 512, seed: int = 0, progress: bool = True
) -> Dataset:
    """About ``tokens`` tokens in blocks, in equal shares from each source, in one fixed shuffled order.

    Args:
        base: plain, without a `HierarchicalTransformer` on it; ``self`` is sampled from it.
        text: sources joined by +: ``self``, ``openings``, or those of `load_text`, whose train split is taken.

    Returns rows as in `load_text`, with ``index``, the number of the row. A short source gives what it has.
    """
    names, rows = sources(text), []
    each = max(2, tokens // len(names))
    for name in names:
        if name in OWN:
            rows += self_text(base, each, source=name, block_size=block_size, seed=seed, progress=progress)
            continue
        found = load_text(name, base.tokenizer, split="train", block_size=block_size)
        whole = np.flatnonzero([len(ids) == block_size for ids in found["input_ids"]])
        if len(whole) * block_size >= each:
            found = found.select(whole)
        rows += at_even_distances(found, round(each / block_size))
    order = np.random.default_rng(seed).permutation(len(rows))
    return Dataset.from_list([{**rows[at], "index": number} for number, at in enumerate(order)])


def self_text(
    base: Base,
    tokens: int,
    *,
    source: str = SELF,
    block_size: int = 512,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """Blocks of text sampled from ``base``.

    Each batch of blocks has a random stream of its own, seeded by ``(seed, batch)``: more ``tokens`` later continue
    the same text, and an interrupted run resumes at the batch in which it stopped. A batch is always sampled whole.
    Sampled again, the text is the same on the same device with the same number of threads; elsewhere the logits round
    differently, and a block takes another course where a draw falls close to a boundary.

    Args:
        base: a plain base, or one that `HierarchicalTransformer.unload` has given back.
        tokens: at least this many, in whole blocks.
        source: one of `OWN`.
        block_size: tokens in every block, from 2 to the base's context.
        batch_size: blocks sampled at once. Changing it changes the text.
        seed: at least 0.

    Batches are kept under ``cache_dir()/SOURCE_text``, keyed by all that changes them; damaged ones are made again.
    Returns rows as in `load_text`, whose ``doc`` is "SOURCE-SEED:ROW". Raises `HatError` for a bad size, a base that
    carries a HierarchicalTransformer, or a cache that cannot be written.
    """
    for name, value, least in (("tokens", tokens, 2), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_count(name, value, least)
    check_count("block_size", block_size, 2)
    context, vocab_size = base.model.config.max_position_embeddings, base.model.config.vocab_size
    if block_size > context:
        raise HatError(f"block_size must be at most {context}, the context of {base.name}, got {block_size}")
    if any("forward" in vars(layer) for layer in base.model.model.layers):
        raise HatError(f"{base.name} carries a HierarchicalTransformer: call its unload() first")
    shape, dtype = (batch_size, block_size), str(base.dtype).removeprefix("torch.")
    name = f"{base.fingerprint[:16]}-{dtype}-{batch_size}x{block_size}-seed{seed}"
    name += f"-p{TOP_P}-k{TOP_K}-{_hash()}" if source == OPENINGS else ""
    folder = cache_dir() / f"{source}_text" / name
    n_rows = -(-tokens // block_size)
    files = [folder / f"{batch:05d}.npz" for batch in range(-(-n_rows // batch_size))]

    batches = [_read(file, shape, vocab_size) for file in files]
    missing = [batch for batch, ids in enumerate(batches) if ids is None]
    total = len(missing) * batch_size * block_size
    with tqdm(total=total, desc=f"{source} text", unit="token", disable=not progress or not missing) as bar:
        for batch in missing:
            batches[batch] = _write(files[batch], partial(_sample, base, shape, [seed, batch], source, bar))
    docs = [f"{source}-{seed}:{row}" for row in range(n_rows)]
    ids = np.concatenate(batches)[:n_rows].tolist()
    return Dataset.from_dict({"input_ids": ids, "doc": docs, "n_context": [0] * n_rows})


@torch.inference_mode()
def _sample(base: Base, shape: tuple[int, int], seed: list[int], source: str, bar: tqdm) -> np.ndarray:
    """Token ids, int32 ``[rows, tokens]``."""
    rows, length = shape
    rng = np.random.default_rng(seed)
    given = torch.full(shape, -1)  # a token, or -1 where one is drawn
    if source == OPENINGS:
        for row, (_, text) in enumerate(openings(rows, rng)):
            begun = base.tokenizer(text).input_ids[:length]
            given[row, : len(begun)] = torch.tensor(begun)
    else:
        given[:, 0] = torch.from_numpy(_first_tokens(base, rows, rng))
    given = given.to(base.device)
    ids = torch.empty_like(given)
    ids[:, 0] = given[:, 0]
    bar.update(rows)
    # In (0, 1], so that the search below ends at a token, and at one with nonzero probability.
    draws = torch.from_numpy(1 - rng.random((length, rows, 1))).to(base.device)
    cache = DynamicCache(config=base.model.config)
    for t in range(1, length):
        logits = base.model(ids[:, t - 1 : t], cache=cache, use_cache=True).logits[:, -1]
        drawn = _nucleus(logits, draws[t]) if source == OPENINGS else _draw(logits, draws[t])
        ids[:, t : t + 1] = torch.where(given[:, t : t + 1] < 0, drawn, given[:, t : t + 1])
        bar.update(rows)
    return ids.to("cpu", torch.int32).numpy()


def _draw(logits: Tensor, draws: Tensor) -> Tensor:
    """A token for each row of logits from a number in (0, 1], int64 ``[rows, 1]``, by inverting the cumulative
    distribution. The same draws on every device, in half the time of torch.multinomial, which draws one per entry of
    the vocabulary."""
    reached = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(reached, draws * reached[:, -1:])


def _nucleus(logits: Tensor, draws: Tensor) -> Tensor:
    """Like `_draw`, from the nucleus only."""
    best, which = logits.float().topk(min(TOP_K, logits.shape[-1]))
    chances = best.sub(logits.float().logsumexp(-1, keepdim=True)).exp()
    before = chances.cumsum(-1) - chances  # the first always counts
    return which.gather(-1, _draw(best.masked_fill(before >= TOP_P, -torch.inf), draws))


@cache
def _hash() -> str:
    """Hash of the openings, eight hex digits."""
    return hashlib.sha256(inspect.getsource(openings_module).encode()).hexdigest()[:8]


def _first_tokens(base: Base, rows: int, rng: np.random.Generator) -> np.ndarray:
    tokenizer = base.tokenizer
    start = tokenizer("").input_ids[:1]
    if start and start[0] == tokenizer.bos_token_id:
        return np.full(rows, start[0])
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return rng.choice(sorted(set(tokenizer.get_vocab().values()) - special), rows)


def _read(path: Path, shape: tuple[int, int], vocab_size: int) -> np.ndarray | None:
    """The ids in a file, or None if it is missing or damaged; a zip file carries a checksum."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            ids = file["input_ids"]
        sound = ids.shape == shape and ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < vocab_size
    except Exception:  # whatever a damaged file raises, inside two libraries
        sound = False
    if not sound:
        print(f"{path} is damaged, making it again", file=sys.stderr)
    return ids if sound else None


def _write(path: Path, make: partial[np.ndarray]) -> np.ndarray:
    """``make()``, kept at ``path``; the file is opened first, so that a full or read-only cache is reported at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            with open(Path(folder) / path.name, "wb") as file:
                ids = make()
                np.savez(file, input_ids=ids)
            os.replace(file.name, path)
    except OSError as error:
        raise HatError(f"cannot write the cache ({error}); set HAT_CACHE to a folder with room") from error
    return ids
