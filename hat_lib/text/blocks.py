"""Text -> blocks of tokens, the same rows whatever the source.

A block never spans two documents. With a ``stride`` below ``block_size`` the blocks of a document overlap, and
``n_context`` leading tokens of a block are only context: each token is scored once, where it is new (the strided
perplexity of transformers' documentation). The tokenizer's own special tokens are kept, such as a leading BOS.

Sources:

- bundled, addresses, docstrings, encyclopedia, news, reserve: see `hat_lib.text.corpora`
- a .txt or .md file (one document), a .jsonl (field "text") or .parquet (column "text")
- a Hub dataset, ``owner/name`` or ``owner/name:config``, streamed; field "text"

A file is split by document, 90 / 5 / 5 % in the order of the SHA-256 of the text, so equal texts stay together. With
fewer than three distinct documents, each is split by position: 90 % of its characters are train, the next 5 %
validation, the last 5 % test. Split "all" is the whole of a source, in its own order.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
from datasets import Dataset, concatenate_datasets, get_dataset_split_names, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hat_lib.base.load import HUB_ID, first_line, one_error
from hat_lib.config import HatError, check_count
from hat_lib.text.corpora import ALL, CORPORA, SPLITS, Document, documents

HUB_MAX_TOKENS = 200_000  # tokens taken from a Hub stream when no max_tokens is given
# Most UTF-8 bytes tokenised at once: a byte of prose takes 130 bytes of memory, one of base64 250, so 4 GB at most.
WHOLE_BYTES = 16_000_000
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
REST_OF_WORD = re.compile(r"\S{0,10000}\s*")


def load_text(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, *, split: str = "test", block_size: int = 512,
    stride: int | None = None, max_tokens: int | None = None,
) -> Dataset:  # fmt: skip
    """Blocks of tokens from a source.

    Args:
        source: see the module's docstring. Only a Hub id touches the network.
        split: "train", "validation", "test" or "all".
        block_size: most tokens in a block, at least 2.
        stride: tokens that each further block of a document adds; None is ``block_size``, no overlap.
        max_tokens: stop after this many tokens, context not counted; the last block may be cut short.

    Returns rows ``input_ids`` (list of 2 to block_size ints), ``doc`` (document id) and ``n_context`` (int). Raises
    `HatError` for an unknown source or split, an unreadable file, a document too long to tokenise at once, fewer than
    two tokens in all, a bad size, or a Hub that cannot be reached.

    >>> rows = load_text("docstrings", base.tokenizer, block_size=128, max_tokens=1000)
    >>> [len(ids) for ids in rows["input_ids"]]
    [128, 128, 128, 128, 128, 128, 128, 104]
    """
    stride = block_size if stride is None else stride
    check_count("block_size", block_size, 2)
    check_count("stride", stride, 1, block_size)  # beyond that, tokens would be lost
    if max_tokens is not None:
        check_count("max_tokens", max_tokens, 2)
    source = os.fspath(source)
    stream, on_hub = _open(source, split)
    rows, left = [], max_tokens or (HUB_MAX_TOKENS if on_hub else sys.maxsize)
    for doc, text in stream:
        ids = first_ids(tokenizer, text, left, f"{doc}, split {split}")
        for start in range(0, max(0, len(ids) - block_size) + stride, stride):
            n_context = block_size - stride if start else 0
            block = ids[start : start + block_size][: n_context + left]
            if len(block) >= 2 and left >= 2:
                rows.append({"input_ids": block, "doc": doc, "n_context": n_context})
                left -= len(block) - n_context
        if left < 2:
            break
    if not rows:
        raise HatError(f"{source}: fewer than two tokens in split {split!r}")
    return Dataset.from_list(rows)


def held_out(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, tokens: int, block_size: int = 512,
    splits: Sequence[str] = ("train", "validation"),
) -> Dataset:  # fmt: skip
    """About ``tokens`` tokens that no test sees: evenly spaced blocks, in equal parts from ``splits``, or what these
    have. After training, only validation is held out. Rows and errors as in `load_text`."""
    parts = []
    for split in splits:
        rows = load_text(source, tokenizer, split=split, block_size=block_size)
        usual = np.median([len(ids) for ids in rows["input_ids"]])  # documents may all be shorter than a block
        parts.append(evenly(rows, round(tokens / len(splits) / usual)))
    return concatenate_datasets(parts)


def first_ids(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int | None, name: str = "the text") -> list[int]:
    """The first ``tokens`` ids of a text, None for all: of a beginning, then of one at least twice as long, until they
    stay the same. Raises `HatError` if this takes more than `WHOLE_BYTES`, and for fewer than two ``tokens``."""
    end = len(text) if tokens is None else 1000 + 6 * check_count("max_tokens", tokens, 2)  # most text has < 6 a token
    before: list[int] = []
    while True:
        if end < len(text):
            end = REST_OF_WORD.match(text, end).end()  # how a run of spaces or digits is cut up depends on its end
        beginning = text[:end]
        if len(beginning.encode()) > WHOLE_BYTES:
            raise HatError(f'{name} is too long to tokenise at once: split it into documents (a .jsonl, field "text")')
        ids = tokenizer(beginning, verbose=False).input_ids[:tokens]
        if end >= len(text) or (len(ids) == tokens and ids == before):
            return ids
        end, before = 2 * end, ids


def evenly(rows: Dataset | Sequence, count: int) -> Dataset | list:
    """``count`` of ``rows``, at least one and at most all, evenly spaced; of a dataset, a dataset."""
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), max(1, count))).round().astype(int)
    return rows.select(chosen) if isinstance(rows, Dataset) else [rows[i] for i in chosen]


def spread(blocks: Dataset | Sequence, tokens: int) -> Dataset | list:
    """About ``tokens`` tokens in whole blocks, evenly spaced, of a dataset of `load_text` or of tensors of ids."""
    return evenly(blocks, round(tokens * len(blocks) / count_tokens(blocks)))


def count_tokens(blocks: Dataset | Sequence) -> int:
    """How many there are in all ``blocks``, which are as for `spread`."""
    ids = blocks["input_ids"] if isinstance(blocks, Dataset) else blocks
    return sum(block.numel() if isinstance(block, Tensor) else len(block) for block in ids)


def source_bytes(source: str | Path, split: str) -> int | None:
    """Bytes of a split in UTF-8; None for a Hub dataset, which is never read to its end."""
    stream, on_hub = _open(os.fspath(source), split)
    return None if on_hub else sum(len(text.encode()) for _, text in stream)


def check_text(source: str, *splits: str | None) -> None:
    """Raise as `load_text` would for each of ``splits``, before a base is loaded: a stand-in tokenizer reads the text.
    Without a split (None), a file is checked as a whole and any other text by its test split."""

    def two_tokens(text: str, **_):
        return SimpleNamespace(input_ids=list(text.encode()[:2]))

    for split in splits:
        load_text(source, two_tokens, split=split or ("all" if names_file(source) else "test"), max_tokens=2)


def text_hash(dataset: Dataset) -> str:
    """SHA-256 (hex) of the document ids and tokens in order."""
    digest = hashlib.sha256()
    for row in dataset:
        ids = np.asarray(row["input_ids"], dtype="<i8")
        digest.update(json.dumps([row["doc"], len(ids)]).encode() + ids.tobytes())
    return digest.hexdigest()


def names_file(source: str | Path) -> bool:
    """Whether a source is read as a file, whether or not it exists."""
    path = Path(os.path.expanduser(source))
    return str(source) not in CORPORA and (path.suffix.lower() in SUFFIXES or os.path.exists(path))


def default_split(source: str | Path, hat) -> str:
    """The split to measure ``hat`` on: all of a file, unless ``hat`` was made with one of that name; else test."""
    # The recipe is that of the last phase; another phase's text is known by its own summary, or by the calibration.
    parts = [part for part in (hat.training_summary or {}).values() if isinstance(part, dict)]
    calibrated_on = re.split(", (?:train and|validation split)", hat.calibration.text)[0] if hat.calibration else ""
    names = "+".join([calibrated_on, *(str(part.get("text", "")) for part in parts)]).split("+")
    used = {Path(name.strip()).name for name in names}
    return "all" if names_file(source) and Path(source).name not in used else "test"


def _open(source: str, split: str) -> tuple[Iterator[Document], bool]:
    """The documents of a split, and whether they come from the Hub."""
    if split not in (*SPLITS, ALL):
        raise HatError(f"split must be one of {', '.join((*SPLITS, ALL))}, got {split!r}")
    if source in CORPORA:
        return documents(source, split), False
    if names_file(source):
        return iter(_split(_read(Path(os.path.expanduser(source))), split)), False
    hub_id, _, config = source.partition(":")
    if HUB_ID.fullmatch(hub_id):
        return _stream(hub_id, config or None, split), True
    known = f"{', '.join(CORPORA)}, a {'/'.join(SUFFIXES)} file or a Hub id (owner/name)"
    raise HatError(f"unknown corpus {source[:80]!r}: expected {known}")


def _read(path: Path) -> list[Document]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise HatError(f"{path}: expected a {'/'.join(SUFFIXES)} file")
    with one_error(f"cannot read {path}"):
        if suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
            if "text" not in table.column_names:
                raise HatError(f'it has no column "text"; its columns are {", ".join(table.column_names)}')
            texts = table.column("text").drop_null().cast("string").to_pylist()
            return [(f"{path.name}:{number}", text) for number, text in enumerate(texts)]
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    return list(_read_jsonl(path, text)) if suffix == ".jsonl" else [(path.name, text)]


def _read_jsonl(path: Path, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also cuts at U+2028 in a string
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
            document.encode()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise HatError(f'{path}, line {number}: expected an object with a string field "text"') from error
        yield f"{path.name}:{number}", document


def _split(docs: list[Document], split: str) -> list[Document]:
    if split == ALL:
        return docs
    keys = [hashlib.sha256(text.encode()).digest() for _, text in docs]
    order = sorted(set(keys))
    if len(order) < 3:
        return [(doc, _part(text, split)) for doc, text in docs]
    count = max(1, round(0.05 * len(order)))
    parts = {"test": order[:count], "validation": order[count : 2 * count], "train": order[2 * count :]}
    chosen = set(parts[split])
    return [document for key, document in zip(keys, docs, strict=True) if key in chosen]


def _part(text: str, split: str) -> str:
    """One split of a text by position, cut at the ends of words."""
    near = [round(share * len(text)) for share in (0.9, 0.95)]
    ends = [next((i for i in range(n, len(text)) if text[i].isspace()), n) for n in near]
    bounds, which = [0, *ends, len(text)], SPLITS.index(split)
    return text[bounds[which] : bounds[which + 1]].strip()


def _stream(hub_id: str, config: str | None, split: str) -> Iterator[Document]:
    try:
        splits = get_dataset_split_names(hub_id, config) if split == ALL else [split]
        rows = chain.from_iterable(load_dataset(hub_id, config, split=name, streaming=True) for name in splits)
        for number, row in enumerate(rows):
            yield f"{hub_id}:{number}", row["text"]
    except KeyError as error:
        raise HatError(f'{hub_id} has no field "text"') from error
    except Exception as error:  # whatever the Hub's client raises: offline, no such dataset, no such split
        hint = "offline, use bundled, docstrings or a file"
        raise HatError(f"cannot stream {hub_id} from the Hub: {first_line(error)}; {hint}") from error
