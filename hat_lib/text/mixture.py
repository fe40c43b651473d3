"""What a run trains on: sources mixed evenly, including text that the frozen base wrote itself.

Thresholds trained on one kind of text got better there and worse elsewhere, so recipes mix addresses with the base's
own text, as LLM-QAT does (Liu et al. 2023, arXiv:2305.17888). Of that there are two kinds, in full blocks: EOS is a
token like any other.

- ``self``: every token is drawn from the base's whole distribution. The first is BOS if the tokenizer begins a text
  with it, else drawn uniformly from the vocabulary without special tokens.
- ``openings``: each block continues the first words of one of nineteen kinds of text (data/text/openings.json), drawn
  from the nucleus: the most likely tokens that together have `TOP_P` of the probability, at most `TOP_K` of them
  (Holtzman et al. 2020, arXiv:1904.09751).
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from hat_lib.base.dispatch import overridden
from hat_lib.base.load import Base
from hat_lib.config import HatError, cache_dir, check_count
from hat_lib.text.blocks import check_text, evenly, load_text
from hat_lib.text.corpora import FOLDER

SELF, OPENINGS = "self", "openings"
OWN = (SELF, OPENINGS)  # texts that the base writes itself
TOP_P, TOP_K = 0.95, 1000
OPENINGS_FILE = FOLDER / "openings.json"


def sources(text: str) -> list[str]:
    """``"addresses+self"`` as a list; ``bundled`` stands for it. Raises `HatError` for an empty or repeated source."""
    if text == "bundled":
        text = f"addresses+{SELF}"
    names = [part.strip() for part in text.split("+")]
    if not all(names) or len(set(names)) < len(names):
        raise HatError(f"training text must be distinct sources joined by +, got {text!r}")
    return names


def check_training_texts(text: str, validation: str) -> None:
    """`check_text` for the sources of a `Recipe` and, unless it is empty, the text of its learning curve."""
    for source in {*sources(text)} - {*OWN}:
        check_text(source, "train", "validation")
    if validation:
        check_text(validation, "validation")


def training_text(
    base: Base, text: str, tokens: int, *, block_size: int = 512, seed: int = 0, progress: bool = True,
    check: Callable[[str, Dataset], None] = lambda source, rows: None,
) -> Dataset:  # fmt: skip
    """About ``tokens`` tokens in blocks, in equal shares from each source of ``text``, or what it has, in one fixed
    shuffled order. Of a source of `load_text`, the train split is taken. Rows as there, with ``index``, their number.

    ``check`` is called with each source and its rows, before the base writes its own text, which can take long.
    """
    names, found = sources(text), {}
    each = max(2, tokens // len(names))
    for name in sorted(names, key=OWN.__contains__):
        if name in OWN:
            rows = self_text(base, each, source=name, block_size=block_size, seed=seed, progress=progress)
        else:
            rows = load_text(name, base.tokenizer, split="train", block_size=block_size)
            whole = np.flatnonzero([len(ids) == block_size for ids in rows["input_ids"]])
            rows = rows.select(whole) if len(whole) * block_size >= each else rows
            rows = evenly(rows, round(each / block_size))
        check(name, rows)
        found[name] = rows
    rows = [row for name in names for row in found[name]]
    order = np.random.default_rng(seed).permutation(len(rows))
    return Dataset.from_list([{**rows[at], "index": number} for number, at in enumerate(order)])


def self_text(
    base: Base, tokens: int, *, source=SELF, block_size: int = 512, batch_size: int = 64, seed: int = 0, progress=True
) -> Dataset:
    """At least ``tokens`` tokens of text sampled from ``base``, in whole blocks of one ``source`` of `OWN`; rows as in
    `load_text`, whose ``doc`` is "SOURCE-SEED:ROW".

    Each batch of ``batch_size`` blocks has a random stream of its own, seeded by ``(seed, batch)``: more ``tokens``
    later continue the same text, which is that of the device and number of threads. Batches are kept under
    ``cache_dir()/SOURCE_text``, so an interrupted call resumes at its batch. Raises `HatError` for a bad size, a base
    that carries a HierarchicalTransformer (`unload` it first), or a cache that cannot be written.
    """
    check_count("tokens", tokens, 2)
    check_count("block_size", block_size, 2, base.model.config.max_position_embeddings)
    if any(map(overridden, base.model.model.layers)):
        raise HatError(f"{base.name} carries a HierarchicalTransformer: call its unload() first")
    dtype = str(base.dtype).removeprefix("torch.")
    name = f"{base.fingerprint[:16]}-{dtype}-{batch_size}x{block_size}-seed{seed}"
    if source == OPENINGS:
        name += f"-p{TOP_P}-k{TOP_K}-{hashlib.sha256(OPENINGS_FILE.read_bytes()).hexdigest()[:8]}"
    folder = cache_dir() / f"{source}_text" / name
    n_rows = math.ceil(tokens / block_size)
    files = [folder / f"{batch:05d}.npz" for batch in range(math.ceil(n_rows / batch_size))]
    missing = [batch for batch, file in enumerate(files) if not file.exists()]
    total = len(missing) * batch_size * block_size
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=total, desc=f"{source} text", unit="token", disable=not progress or not missing) as bar:
            for batch in missing:
                with tempfile.TemporaryDirectory(dir=folder) as scratch:  # a file appears when it is whole
                    ids = _sample(base, (batch_size, block_size), [seed, batch], source, bar)
                    np.savez(Path(scratch, "ids.npz"), input_ids=ids)
                    os.replace(Path(scratch, "ids.npz"), files[batch])
    except OSError as error:
        raise HatError(f"cannot write the cache ({error}); set HAT_CACHE to another folder") from error
    docs = [f"{source}-{seed}:{row}" for row in range(n_rows)]
    ids = np.concatenate([np.load(file)["input_ids"] for file in files])[:n_rows].tolist()
    return Dataset.from_dict({"input_ids": ids, "doc": docs, "n_context": [0] * n_rows})


def openings(count: int, rng: np.random.Generator) -> list[str]:
    """Beginnings of texts, drawn evenly over kinds, then over a kind's patterns, whose blanks are filled at random."""
    known = json.loads(OPENINGS_FILE.read_text(encoding="utf-8"))
    kinds = list(known["patterns"].values())

    def draw(kind: str) -> str:
        words = known["words"][kind]
        return words[rng.integers(len(words))]

    def opening(patterns: list[str]) -> str:
        # The order of the draws is part of the text.
        pattern = patterns[rng.integers(len(patterns))]
        subject, other_subject, place = draw("subject"), draw("subject"), draw("place")
        first, other, month, weekday, word = draw("first"), draw("first"), draw("month"), draw("weekday"), draw("word")
        return pattern.format(
            s=subject, t=other_subject, S=subject[0].upper() + subject[1:], place=place, PLACE=place.upper(),
            first=first, other=other, month=month, weekday=weekday, word=word, Word=word.capitalize(),
            name=f"{first} {draw('last')}", n=draw("view"), year=rng.integers(1750, 2024), day=rng.integers(1, 29),
            number=rng.integers(2, 100), digit=rng.integers(1, 10),
        )  # fmt: skip

    return [opening(kinds[i]) for i in rng.integers(len(kinds), size=count)]


@torch.inference_mode()
def _sample(base: Base, shape: tuple[int, int], seed: list[int], source: str, bar: tqdm) -> np.ndarray:
    """Token ids, int32 ``[rows, tokens]``."""
    (rows, length), rng = shape, np.random.default_rng(seed)
    given = torch.full(shape, -1)  # a token, or -1 where one is drawn
    if source == OPENINGS:
        for row, text in enumerate(openings(rows, rng)):
            begun = base.tokenizer(text).input_ids[:length]
            given[row, : len(begun)] = torch.tensor(begun)
    else:
        given[:, 0] = torch.from_numpy(_first_tokens(base, rows, rng))
    given = given.to(base.device)
    ids = given.clone()
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
    """A token for each row of logits from a number in (0, 1], int64 ``[rows, 1]``: the same on every device, in half
    the time of torch.multinomial."""
    reached = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(reached, draws * reached[:, -1:])


def _nucleus(logits: Tensor, draws: Tensor) -> Tensor:
    """Like `_draw`, from the nucleus only."""
    best, which = logits.float().topk(min(TOP_K, logits.shape[-1]))
    chances = best.sub(logits.float().logsumexp(-1, keepdim=True)).exp()
    before = chances.cumsum(-1) - chances  # the first always counts
    return which.gather(-1, _draw(best.masked_fill(before >= TOP_P, -torch.inf), draws))


def _first_tokens(base: Base, rows: int, rng: np.random.Generator) -> np.ndarray:
    tokenizer = base.tokenizer
    start = tokenizer("").input_ids[:1]
    if start and start[0] == tokenizer.bos_token_id:
        return np.full(rows, start[0])
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return rng.choice(sorted(set(tokenizer.get_vocab().values()) - special), rows)
