"""Sources always give the same rows of tokens, blocks do not cross documents, and bad input gives one line."""

import errno
import itertools
import json
import re
import socket
from pathlib import Path
from unittest.mock import Mock

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hat_lib.backbone.shapes import byte_tokenizer
from hat_lib.config import DATA, HatError
from hat_lib.text.blocks import (
    HUB_MAX_TOKENS,
    WHOLE_BYTES,
    first_ids,
    held_out,
    load_text,
    source_bytes,
    text_hash,
    windows,
)
from hat_lib.text.corpora import SPLITS, docstring_prose, documents, module_prose

TOKENIZER = byte_tokenizer()


def load(source, **options):
    return load_text(source, TOKENIZER, **options)


def texts(dataset):
    return [TOKENIZER.decode(row["input_ids"]) for row in dataset]


# Blocks


@given(st.integers(0, 60), st.integers(2, 12), st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_token_is_new_in_exactly_one_window(length, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    scored = []
    for start, n_context in windows(length, block_size, stride):
        end = min(start + block_size, length)
        assert 0 <= n_context < end - start
        scored += range(start + n_context, end)
    assert scored == list(range(length))


def test_blocks_join_to_the_document_and_stay_inside_it(tmp_path):
    docs = ["first document, of some length", "x", "the second one"]
    path = tmp_path / "three docs.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in docs))
    joined = {}
    for row in load(path, split="all", block_size=8):
        assert 2 <= len(row["input_ids"]) <= 8 and row["n_context"] == 0
        joined.setdefault(row["doc"], []).extend(row["input_ids"])
    whole = {f"three docs.jsonl:{i}": t for i, t in enumerate(docs, start=1) if len(t) > 1}
    for doc, text in whole.items():
        kept = TOKENIZER.decode(joined[doc])
        assert kept == text[: len(kept)] and len(text) - len(kept) <= 1  # a last block of one token is dropped
    assert set(joined) == set(whole)


def test_stride_gives_context_and_scores_each_token_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 20)
    plain = load(path, split="train", block_size=16)
    strided = load(path, split="train", block_size=16, stride=4)
    new = [t for row in strided for t in row["input_ids"][row["n_context"] :]]
    assert TOKENIZER.decode(new) == "".join(texts(plain)) == ("abcdefghij" * 20)[:180]
    assert [row["n_context"] for row in strided][:3] == [0, 12, 12]
    assert list(load(path, split="train", block_size=16, stride=16)) == list(plain)


@pytest.mark.parametrize("stride", [None, 5])
def test_max_tokens_counts_new_tokens(tmp_path, stride):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 20)
    whole = "".join(texts(load(path, split="train", block_size=16)))
    for limit in (2, 3, 16, 17, 33, 10_000):
        rows = load(path, split="train", block_size=16, stride=stride, max_tokens=limit)
        total = sum(len(row["input_ids"]) - row["n_context"] for row in rows)
        assert min(limit, 180) - 1 <= total <= limit
        assert TOKENIZER.decode([t for r in rows for t in r["input_ids"][r["n_context"] :]]) == whole[:total]


def test_held_out_text_is_of_the_splits_asked_for_and_as_long_whatever_its_documents(tmp_path):
    docs = [json.dumps({"text": f"document {i:03d} of a few words"}) for i in range(400)]
    (tmp_path / "short.jsonl").write_text("\n".join(docs))
    of_split = {name: {row["doc"] for row in load(tmp_path / "short.jsonl", split=name)} for name in SPLITS}
    for splits in (["validation"], ["train"], ["train", "validation"]):
        found = held_out(tmp_path / "short.jsonl", TOKENIZER, 500, splits=splits)
        parts = [sum(len(row["input_ids"]) for row in found if row["doc"] in of_split[name]) for name in splits]
        assert sum(parts) == sum(map(len, found["input_ids"])) == pytest.approx(500, rel=0.1)
        assert all(part == pytest.approx(500 / len(splits), rel=0.1) for part in parts)


def test_hash_names_the_text(tmp_path):
    path, found = tmp_path / "a.txt", []
    for content in ("abcdefghij" * 20, "abcdefghij" * 20, "abcdefghiJ" + "abcdefghij" * 19):
        path.write_text(content)
        found.append(text_hash(load(path, split="train", block_size=16)))
    renamed = path.rename(tmp_path / "b.txt")
    renamed.write_text("abcdefghij" * 20)
    found.append(text_hash(load(renamed, split="train", block_size=16)))
    assert re.fullmatch("[0-9a-f]{64}", found[0]) and found[0] == found[1] and len(set(found)) == 3


def test_special_tokens_of_the_tokenizer_are_kept(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 20)

    class WithBos:
        def __call__(self, text, verbose):
            ids = TOKENIZER(text, verbose=verbose)
            ids["input_ids"] = [TOKENIZER.bos_token_id, *ids["input_ids"]]
            return ids

    rows = load_text(path, WithBos(), split="train", block_size=64)
    assert [row["input_ids"][0] == TOKENIZER.bos_token_id for row in rows] == [True, False, False]


# Long documents

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""how it finds words, inside which it then looks for tokens"""
MERGES = [("Ċ", "Ġ"), ("a", "b"), ("Ã", "©"), ("'", "t"), *((c * 2**i, c * 2**i) for i in range(6) for c in "Ġa=")]


def bpe(**parts):
    """A tokenizer of bytes and of runs of up to 64 equal ones, with its own way to find words."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    for name, part in parts.items():
        setattr(core, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=core)


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TOKENIZERS = {
    "bytes": TOKENIZER,
    "as GPT-2": bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "as Llama 3": bpe(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), LEVEL])),
    "one word, BOS and EOS": bpe(
        pre_tokenizer=LEVEL,
        normalizer=normalizers.NFKC(),
        post_processor=processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]),
    ),
}
RUNS = (*" \na7éΩ日=😀'", " \n", "ab", "xyz", "e\u0301", "👩‍👧", "don't ", "!\n", "word ", "<s>")
LONG = st.lists(st.tuples(st.sampled_from(RUNS), st.sampled_from([1, 2, 3, 50, 700, 4000])), min_size=1, max_size=8)


def check_first_ids(tokenizer, runs, tokens):
    text = "".join(run * times for run, times in runs)
    assert first_ids(tokenizer, text, tokens) == tokenizer(text).input_ids[:tokens]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(LONG, st.integers(2, 1500))
@example([("a", 40_000)], 190)  # the cut of the first beginning falls in the last id that is wanted
@example([("\n", 1), (" ", 4000), ("\n", 1)], 10)  # two words for Llama 3, until the second line end is seen
@settings(max_examples=60, deadline=None, derandomize=True)
def test_first_ids_are_those_of_the_whole_text(name, runs, tokens):
    check_first_ids(TOKENIZERS[name], runs, tokens)


@pytest.mark.slow
@given(LONG, st.integers(2, 1500))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_first_ids_of_the_bundled_tokenizer(bundled, runs, tokens):
    check_first_ids(bundled.tokenizer, runs, tokens)


class Watched:
    """The byte tokenizer, and the longest text that it was given."""

    longest = 0

    def __call__(self, text, **options):
        self.longest = max(self.longest, len(text))
        return TOKENIZER(text, **options)


@pytest.mark.parametrize("text", ["abcdefghij" * 100_000, "some words " * 100_000])
def test_of_a_long_document_no_more_is_tokenised_than_is_wanted(tmp_path, text):
    path, watched = tmp_path / "long.txt", Watched()
    path.write_text(text)
    rows = load_text(path, watched, split="all", block_size=16, stride=5, max_tokens=333)
    assert watched.longest < 40_000
    assert sum(len(row["input_ids"]) - row["n_context"] for row in rows) == 333
    path.write_text(text[:3000])
    assert list(rows)[:-1] == list(load(path, split="all", block_size=16, stride=5))[: len(rows) - 1]


@pytest.mark.parametrize("max_tokens", [None, WHOLE_BYTES])
def test_more_of_a_document_than_memory_holds_is_refused_before_it_is_tokenised(tmp_path, max_tokens):
    path = tmp_path / "long.txt"
    path.write_text("é" * 9_000_000)
    with pytest.raises(HatError, match=r"^long.txt, split all: one text of 18.0 MB, .* over 16 MB .* \.jsonl"):
        load(path, split="all", max_tokens=max_tokens)
    assert sum(map(len, load(path, split="all", max_tokens=300)["input_ids"])) == 300


# Files


def write_docs(path, docs):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t, "more": 1}) + "\n" for t in docs))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": docs, "more": [1] * len(docs)}), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_split_is_by_document_whatever_the_order(tmp_path, suffix):
    docs = [f"document number {i} \u2028 of forty" for i in range(40)]
    there, back = tmp_path / f"there{suffix}", tmp_path / f"back [1]{suffix}"
    write_docs(there, docs)
    write_docs(back, docs[::-1])
    parts = {s: texts(load(there, split=s)) for s in ("train", "validation", "test")}
    assert [len(p) for p in parts.values()] == [36, 2, 2]
    assert sorted(sum(parts.values(), [])) == sorted(docs)
    for split, part in parts.items():
        assert texts(load(back, split=split)) == part[::-1]
    write_docs(there, [f"document number {i % 10}" for i in range(100)])
    equal = [set(texts(load(there, split=s))) for s in ("train", "validation", "test")]
    assert [len(p) for p in equal] == [8, 1, 1] and len(set.union(*equal)) == 10, "equal texts stay together"


def test_one_document_is_split_by_position_between_words(tmp_path):
    words = [f"word{i}" for i in range(200)]
    path = tmp_path / "one.txt"
    path.write_text(" ".join(words))
    parts = [" ".join(texts(load(path, split=s, block_size=4096))) for s in ("train", "validation", "test")]
    assert " ".join(parts).split() == words
    assert [round(len(p.split()) / 10) for p in parts] == [18, 1, 1]
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo three four")
    assert texts(load(path, split="train"))[0].startswith("one\ntwo"), "neither byte order mark nor Windows line ends"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", None, "no such file"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"abc\0def", "NUL at byte 3"),
        ("a.txt", b"abc caf\xe9 def", "not UTF-8: byte 7 is 0xe9"),
        ("a.txt", b"a", "fewer than two tokens"),
        ("a.jsonl", b'{"text": "ok fine"}\n{"txt": "no"}\n', 'line 2: expected .* "text"'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1: expected .* "text"'),
        ("a.jsonl", b"[1]\n", "line 1: expected an object"),
        ("a.jsonl", b'{"text": "a b"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "half \\ud83e"}\n', r'line 1: "text" has half a character, \\ud83e, at 5'),
        ("a.jsonl", b"[" * 100_000, "line 1: brackets nested too deep"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1: not JSON"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("a.csv", b"text\nhello\n", "expected a .txt/.jsonl/.parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HatError, match=message) as caught:
        load(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_without_permission(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some words")
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(HatError, match="cannot read .*a.txt: Permission denied"):
        load(tmp_path / "a.txt")


@pytest.mark.parametrize("source", ["The text itself. " * 400, "~nobody-of-this-name/text", "addreses"])
def test_what_cannot_be_a_file_is_an_unknown_corpus(source):
    with pytest.raises(HatError, match="unknown corpus") as caught:
        load(source)
    said = str(caught.value)
    assert len(said) < 250 and "expected bundled, addresses, docstrings, encyclopedia, news, reserve, a .txt" in said


def test_the_whole_of_a_source(tmp_path):
    """Split "all" is every document once, in source order, so the bytes of the splits add up to its bytes."""
    few, many = tmp_path / "few.txt", tmp_path / "many.jsonl"
    few.write_text("  abc déf" * 50)
    docs = [f"document number {i} of forty" for i in range(40)]
    write_docs(many, docs)
    assert texts(load(many, split="all")) == docs
    assert texts(load(few, split="all", block_size=4096)) == [few.read_text()]
    assert source_bytes(few, "all") == 500
    assert source_bytes(many, "all") == sum(map(len, docs)) == sum(source_bytes(many, split) for split in SPLITS)
    assert sum(1 for _ in documents("addresses", "all")) == 93
    assert list(documents("docstrings", "all")) == list(documents("docstrings", "test"))


def test_parquet_without_text(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one"], "n": [1]}), path)
    with pytest.raises(HatError, match='no column "text"; its columns are body, n'):
        load(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(HatError, match="row 1"):
        load(path)
    invalid = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), path)
    with pytest.raises(HatError, match="not a readable parquet file"):
        load(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "dev"}, "split must be one of train, validation, test, all"),
        ({"block_size": 1}, "block_size must be a whole number of at least 2"),
        ({"stride": 0}, "stride must be"),
        ({"block_size": 8, "stride": 9}, "stride must be a whole number of at least 1, at most 8, got 9"),
        ({"max_tokens": 1}, "max_tokens must be"),
        ({"tokenizer": None}, "load_text needs a tokenizer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(HatError, match=message):
        load_text("addresses", **{"tokenizer": TOKENIZER, **options})


# The Hub


@pytest.mark.parametrize("source", ["nobody/no-such-dataset", "nobody/no-such-dataset:config"])
def test_hub_offline_is_one_line_with_an_alternative(source):
    with pytest.raises(HatError, match="cannot stream nobody/no-such-dataset .*offline, use bundled") as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_hub_stream_is_read_lazily_and_capped(monkeypatch):
    import hat_lib.text.blocks

    asked, served = [], []

    def stream(*args, **options):
        asked.append((args, options))
        for i in range(10**9):
            served.append(i)
            yield {"text": f"row {i} " + "abcd " * 1000, "url": ""}

    monkeypatch.setattr(hat_lib.text.blocks, "load_dataset", stream)
    rows = load("owner/name:config", split="train")
    assert asked == [(("owner/name", "config"), {"split": "train", "streaming": True})]
    total = sum(len(ids) for ids in rows["input_ids"])
    assert HUB_MAX_TOKENS - 1 <= total <= HUB_MAX_TOKENS and len(served) < 50
    assert rows[0]["doc"] == "owner/name:0"
    assert sum(len(ids) for ids in load("owner/name", max_tokens=100)["input_ids"]) == 100
    monkeypatch.setattr(hat_lib.text.blocks, "load_dataset", lambda *_, split, **__: [{"text": f"of {split}"}])
    monkeypatch.setattr(hat_lib.text.blocks, "get_dataset_split_names", lambda *_: ["train", "more"])
    assert texts(load("owner/name", split="all")) == ["of train", "of more"]
    assert source_bytes("owner/name", "all") is None
    monkeypatch.setattr(hat_lib.text.blocks, "load_dataset", lambda *_, **__: [{"body": "x", "n": 1}])
    with pytest.raises(HatError, match='no text in its field "text"; its fields are body, n'):
        load("owner/name")


# The bundled corpora


def test_addresses_split_by_year():
    years = {s: [int(doc[:4]) for doc, _ in documents("addresses", s)] for s in ("train", "validation", "test")}
    assert years["validation"] == [2022, 2023] and years["test"] == [2026, 2024]
    assert (years["train"][0], years["train"][-1], len(years["train"])) == (1934, 2020, 89)
    assert load("bundled")["doc"][0] == "2026-Trump-1"
    assert text_hash(load("bundled", max_tokens=600)) == text_hash(load("addresses", max_tokens=600))


def test_docstrings_have_no_split_to_train_on_and_modules_are_parsed_and_never_run():
    for name, split in itertools.product(("docstrings", "reserve"), ("train", "validation")):
        with pytest.raises(HatError, match="never trained or calibrated on"):
            load(name, split=split)
    source = '"""This module must never be run, only read by the parser."""\nraise SystemExit("run")\n'
    source += 'def f():\n    r"""Every function of the module is read as well, of course."""\n    "\\d"\n'
    assert list(module_prose(source)) == [
        "This module must never be run, only read by the parser.",
        "Every function of the module is read as well, of course.",
    ]


@pytest.mark.parametrize(
    "docstring, prose",
    [
        ("Return the `frob` of **every** node of\nthe graph, as :class:`~lib.core.Frob` objects; see [1]_ and $n$.",
         ["Return the frob of every node of the graph, as Frob objects; see [1] and n."]),
        ("    This is an indented block of words that would otherwise look like prose.", []),
        (".. note:: This is a directive with enough plain words in it to be prose.", []),
        ("The bound is :math:`\\sum_i x_i` for all of the nodes that are in the graph.", []),
        ("Short one.", []),
        ("Parameters\n----------\nG : graph\n    The graph whose nodes are taken, given as any of the classes.", []),
        ("Notes\n-----\nNotes are prose, so that they are kept although they stand under a heading.",
         ["Notes are prose, so that they are kept although they stand under a heading."]),
    ],
)  # fmt: skip
def test_prose_of_a_docstring(docstring, prose):
    assert list(docstring_prose(docstring)) == prose


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, split, tokens, beginning",
    [
        ("addresses", "train", 736_077, "dcf3592e02ec2f6c"),
        ("addresses", "validation", 22_847, "27553aaa9b29552f"),
        ("addresses", "test", 26_511, "7ac4f8ed4cbf74a2"),
        ("docstrings", "test", 66_785, "5c985c90f50d81ff"),
        ("encyclopedia", "test", 517_884, "6edf80bfedfaa32d"),
        ("news", "validation", 75_082, "e15d091d703803c8"),
        ("reserve", "test", 19_169, "43403cc57e85b93f"),
    ],
)
def test_bundled_corpora_are_the_ones_in_the_data_readme(bundled, name, split, tokens, beginning):
    dataset = load_text(name, bundled.tokenizer, split=split)
    assert sum(len(ids) for ids in dataset["input_ids"]) == tokens
    assert text_hash(dataset).startswith(beginning)
    readme = (DATA / "README.md").read_text()
    assert f"{tokens:,} | `{beginning}`" in readme


def test_no_socket_is_opened_once_the_wheels_are_there(monkeypatch):
    list(documents("addresses", "test"))

    def refuse(*args, **_):
        raise AssertionError(f"opened a socket: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    assert len(load("bundled", max_tokens=1000)) == 2
    assert len(load("docstrings", max_tokens=1000)) >= 2
