"""Sources give the same rows of tokens each time, blocks do not cross documents, and bad input gives one line."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hat_lib.base.shapes import byte_tokenizer
from hat_lib.config import DATA, HatError
from hat_lib.text import blocks
from hat_lib.text.blocks import WHOLE_BYTES, first_ids, held_out, load_text, source_bytes, text_hash
from hat_lib.text.corpora import ONE_SPLIT, SPLITS, documents

TOKENIZER = byte_tokenizer()


def load(source, **options):
    return load_text(source, TOKENIZER, **options)


def texts(dataset):
    return [TOKENIZER.decode(row["input_ids"]) for row in dataset]


@pytest.fixture
def letters(tmp_path):
    """A text of 200 bytes, 180 of them in its train split."""
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 20)
    return path


def write_docs(path, docs):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": docs}), path)
    else:
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in docs))
    return path


def test_blocks_stay_inside_a_document(tmp_path):
    docs = ["first document, of some length", "x", "the second one"]
    path = write_docs(tmp_path / "docs.jsonl", docs)
    joined = {}
    for row in load(path, split="all", block_size=8):
        assert 2 <= len(row["input_ids"]) <= 8 and row["n_context"] == 0
        joined.setdefault(row["doc"], []).extend(row["input_ids"])
    assert set(joined) == {"docs.jsonl:1", "docs.jsonl:3"}
    for doc, ids in joined.items():
        text = docs[int(doc.split(":")[1]) - 1]
        assert text.startswith(kept := TOKENIZER.decode(ids)) and len(text) - len(kept) <= 1  # a last token is dropped


@pytest.mark.parametrize("stride", [16, 15, 5, 1])
@pytest.mark.parametrize("limit", [2, 17, 33, 10_000])
def test_a_stride_gives_context_and_max_tokens_counts_new_tokens(letters, stride, limit):
    rows = load(letters, split="train", block_size=16, stride=stride, max_tokens=limit)
    assert [row["n_context"] for row in rows] == [0, *[16 - stride] * (len(rows) - 1)]
    new = [t for row in rows for t in row["input_ids"][row["n_context"] :]]
    assert min(limit, 180) - 1 <= len(new) <= limit
    assert TOKENIZER.decode(new) == ("abcdefghij" * 20)[: len(new)]


def test_held_out_is_of_its_splits(tmp_path):
    path = write_docs(tmp_path / "short.jsonl", [f"document {i:03d} of a few words" for i in range(400)])
    of_split = {name: {row["doc"] for row in load(path, split=name)} for name in SPLITS}
    for splits in (["validation"], ["train"], ["train", "validation"]):
        found = held_out(path, TOKENIZER, 500, splits=splits)
        parts = [sum(len(row["input_ids"]) for row in found if row["doc"] in of_split[name]) for name in splits]
        assert sum(parts) == sum(map(len, found["input_ids"])) == pytest.approx(500, rel=0.1)
        assert all(part == pytest.approx(500 / len(splits), rel=0.1) for part in parts)


# Long documents

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""how it finds words, inside which it then looks for tokens"""
MERGES = [("Ċ", "Ġ"), ("a", "b"), ("Ã", "©"), ("'", "t"), *((c * 2**i, c * 2**i) for i in range(6) for c in "Ġa=")]


def llama_3():
    """A tokenizer of bytes and of runs of up to 64 equal ones."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return PreTrainedTokenizerFast(tokenizer_object=core)


LONG_TOKENIZER = llama_3()
RUNS = (*" \na7éΩ日=😀'", " \n", "ab", "xyz", "e\u0301", "👩‍👧", "don't ", "!\n", "word ", "<s>")
LONG = st.lists(st.tuples(st.sampled_from(RUNS), st.sampled_from([1, 2, 3, 50, 700, 4000])), min_size=1, max_size=8)


@given(LONG, st.integers(2, 1500))
@example([("a", 40_000)], 190)  # the first beginning ends in the last id that is wanted
@example([("\n", 1), (" ", 4000), ("\n", 1)], 10)  # two words, until the second line end is seen
@settings(max_examples=40, deadline=None, derandomize=True)
def test_first_ids_are_those_of_the_whole_text(runs, tokens):
    text = "".join(run * times for run, times in runs)
    assert first_ids(LONG_TOKENIZER, text, tokens) == LONG_TOKENIZER(text).input_ids[:tokens]


def test_a_long_document_is_tokenised_in_part(tmp_path):
    lengths = []

    def watched(text, **options):
        lengths.append(len(text))
        return TOKENIZER(text, **options)

    (tmp_path / "long.txt").write_text("some words " * 100_000)
    rows = load_text(tmp_path / "long.txt", watched, split="all", max_tokens=1000)
    assert sum(map(len, rows["input_ids"])) == 1000 and max(lengths) < 50_000
    (tmp_path / "long.txt").write_text("some words " * (WHOLE_BYTES // 11 + 1))
    with pytest.raises(HatError, match="long.txt"):
        load_text(tmp_path / "long.txt", watched, split="all")
    assert max(lengths) < 50_000


# Files


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_split_is_by_document(tmp_path, suffix):
    docs = [f"document number {i} of forty" for i in range(40)]
    there, back = write_docs(tmp_path / f"a{suffix}", docs), write_docs(tmp_path / f"b{suffix}", docs[::-1])
    parts = {split: texts(load(there, split=split)) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 36, "validation": 2, "test": 2}
    assert sorted(sum(parts.values(), [])) == sorted(docs)
    for split, part in parts.items():
        assert texts(load(back, split=split)) == part[::-1]
    assert texts(load(there, split="all")) == docs
    assert source_bytes(there, "all") == sum(map(len, docs))
    write_docs(there, [f"document number {i % 10}" for i in range(100)])
    equal = [set(texts(load(there, split=s))) for s in SPLITS]
    assert [len(p) for p in equal] == [8, 1, 1] and len(set.union(*equal)) == 10, "equal texts stay together"


@pytest.mark.parametrize("name", ["one.txt", "one.md"])
def test_one_document_is_split_by_position(tmp_path, name):
    words = [f"word{i}" for i in range(200)]
    path = tmp_path / name
    path.write_text(" ".join(words))
    parts = [" ".join(texts(load(path, split=s, block_size=4096))) for s in SPLITS]
    assert " ".join(parts).split() == words
    assert [round(len(p.split()) / 10) for p in parts] == [18, 1, 1]
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo three four")
    assert texts(load(path, split="train"))[0].startswith("one\ntwo"), "neither byte order mark nor Windows line ends"


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", None),
        ("a.txt", b"a"),
        ("a.txt", b"abc caf\xe9 def"),
        ("a.jsonl", b'{"text": "ok fine"}\n{"txt": "no"}\n'),
        ("a.jsonl", b'{"text": 3}\n'),
        ("a.jsonl", b'{"text": \n'),
        ("a.parquet", b"PAR1 not really"),
        ("a.csv", b"text\nhello\n"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HatError, match=name):
        load(path)


@pytest.mark.parametrize(
    "source, options, words",
    [
        ("The text itself. " * 400, {}, "addresses"),
        ("~nobody-of-this-name/text", {}, "addresses"),
        ("nobody/no-such-dataset:config", {}, "offline"),
        ("addresses", {"split": "dev"}, "split"),
        ("addresses", {"block_size": 1}, "block_size"),
        ("addresses", {"block_size": 8, "stride": 9}, "stride"),
        ("addresses", {"max_tokens": 1}, "max_tokens"),
    ],
)
def test_what_load_text_refuses(source, options, words):
    with pytest.raises(HatError, match=words):
        load(source, **options)


# The Hub


def test_hub_stream_is_read_lazily(monkeypatch):
    asked, served = [], []

    def stream(*args, **options):
        asked.append((args, options))
        for i in range(10**9):
            served.append(i)
            yield {"text": f"row {i} " + "abcd " * 1000, "url": ""}

    monkeypatch.setattr(blocks, "load_dataset", stream)
    rows = load("owner/name:config", split="train")
    assert asked == [(("owner/name", "config"), {"split": "train", "streaming": True})]
    assert 0 <= blocks.HUB_MAX_TOKENS - sum(map(len, rows["input_ids"])) <= 1 and len(served) < 50
    assert rows[0]["doc"] == "owner/name:0" and source_bytes("owner/name", "all") is None
    monkeypatch.setattr(blocks, "load_dataset", lambda *_, split, **__: [{"text": f"of {split}"}])
    monkeypatch.setattr(blocks, "get_dataset_split_names", lambda *_: ["train", "more"])
    assert texts(load("owner/name", split="all")) == ["of train", "of more"]
    monkeypatch.setattr(blocks, "load_dataset", lambda *_, **__: [{"body": "x"}])
    with pytest.raises(HatError, match='no field "text"'):
        load("owner/name")


# The bundled corpora

TABLE = re.findall(r"^\| `(\w+)` \| (\w+) \| \d+ .*?\| ([\d,]+) \| `(\w+)` \|", (DATA / "README.md").read_text(), re.M)


def test_addresses_are_split():
    parts = [doc for split in SPLITS for doc in documents("bundled", split)]
    assert len(parts) == 93 and sorted(parts) == sorted(documents("addresses", "all"))


@pytest.mark.parametrize("name", ONE_SPLIT)
def test_other_corpora_have_no_split_to_train_on(name):
    assert list(documents(name, "all")) == list(documents(name, ONE_SPLIT[name]))
    with pytest.raises(HatError, match=name):
        documents(name, "train")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "split", "tokens", "beginning"), TABLE, ids=[f"{n}-{s}" for n, s, *_ in TABLE])
def test_corpora_are_those_of_the_data_readme(bundled, name, split, tokens, beginning):
    dataset = load_text(name, bundled.tokenizer, split=split)
    assert f"{sum(map(len, dataset['input_ids'])):,}" == tokens and text_hash(dataset).startswith(beginning)
