"""What a run trains on: equal shares of whole blocks, in one fixed order, and never what is held out."""

import json

import numpy as np
import pytest

from hat_lib.config import HatError
from hat_lib.text.blocks import load_text
from hat_lib.text.mixture import sources, training_text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    """60 documents of 100 bytes, each of its own two letters and digits."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:02d}" * 50}) for i in range(60)))
    return path


def build(base, text, tokens=640, **options):
    return training_text(base, str(text), tokens, **{"block_size": 32, "progress": False, **options})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("addresses", ["addresses"]),
        ("addresses+self", ["addresses", "self"]),
        (" a.txt + self ", ["a.txt", "self"]),
        ("bundled", ["addresses", "self"]),
    ],
)
def test_sources(text, expected):
    assert sources(text) == expected


@pytest.mark.parametrize("text", ["", "+", "self+", "self+self", "self+ self"])
def test_bad_sources(text):
    with pytest.raises(HatError, match="distinct sources joined by"):
        sources(text)


def test_sources_share_the_tokens_evenly_in_whole_blocks(tiny_base, corpus):
    found = build(tiny_base, f"{corpus}+self")
    ours = [row["doc"].startswith("self-0:") for row in found]
    assert len(found) == 20 and sum(ours) == 10
    assert {len(ids) for ids in found["input_ids"]} == {32}
    assert found["index"][:] == list(range(20))
    assert set(found.column_names) == {"input_ids", "doc", "n_context", "index"}
    assert ours != sorted(ours) and ours != sorted(ours, reverse=True)  # mixed


def test_the_order_is_fixed_by_the_seed(tiny_base, corpus):
    first, again, other = (list(build(tiny_base, corpus, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    key = lambda row: (row["doc"], row["input_ids"])  # noqa: E731
    assert sorted(map(key, first)) == sorted(map(key, other))  # of a corpus the same blocks, in another order
    drawn = [set(map(tuple, build(tiny_base, "self", seed=seed)["input_ids"])) for seed in (0, 1)]
    assert not drawn[0] & drawn[1]


def test_blocks_come_from_all_of_the_train_split_and_from_nothing_else(tiny_base, corpus):
    train = load_text(corpus, tiny_base.tokenizer, split="train", block_size=32)
    held = {tuple(ids) for split in ("validation", "test")
            for ids in load_text(corpus, tiny_base.tokenizer, split=split, block_size=32)["input_ids"]}  # fmt: skip
    whole = [tuple(row["input_ids"]) for row in train if len(row["input_ids"]) == 32]
    found = [tuple(ids) for ids in build(tiny_base, corpus)["input_ids"]]
    assert len(found) == 20 and set(found) <= set(whole) and not set(found) & held
    assert np.diff(sorted(map(whole.index, found))).max() <= 2 * len(whole) / 20  # at even distances
    assert min(map(whole.index, found)) == 0


def test_a_short_source_gives_what_it_has_short_blocks_included(tiny_base, corpus):
    everything = load_text(corpus, tiny_base.tokenizer, split="train", block_size=32)
    found = build(tiny_base, corpus, tokens=10**6)
    assert len(found) == len(everything) and sum(map(len, found["input_ids"])) == sum(map(len, everything["input_ids"]))


def test_domain_b_and_unknown_sources_are_refused(tiny_base):
    with pytest.raises(HatError, match="never trained or calibrated on"):
        build(tiny_base, "docstrings")
    with pytest.raises(HatError, match="unknown corpus 'poems'"):
        build(tiny_base, "self+poems")
