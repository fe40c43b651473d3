"""What a run trains on: equal shares of whole blocks in one fixed order, never what is held out; and the base's own
text, sampled from its whole distribution, reproducible, and kept through interruptions."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from hat_lib.backbone.base import load_base
from hat_lib.config import HatConfig, HatError
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text import mixture
from hat_lib.text.blocks import load_text
from hat_lib.text.mixture import self_text, sources, training_text
from hat_lib.text.openings import openings

ROWS, LENGTH = 3, 8
BATCH = ROWS * LENGTH


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    """An empty cache; returns the function that lists the files in it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HAT_CACHE", str(folder))
    return lambda: sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def sampled(monkeypatch):
    """The batches that were actually sampled, in order."""
    batches, sample = [], mixture._sample

    def noted(base, shape, seed, *rest):
        batches.append(seed[1])
        return sample(base, shape, seed, *rest)

    monkeypatch.setattr(mixture, "_sample", noted)
    return batches


@pytest.fixture
def corpus(tmp_path):
    """60 documents of 100 bytes, each with its own two letters and digits."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:02d}" * 50}) for i in range(60)))
    return path


def text(base, tokens, anew=False, **options):
    if anew:
        shutil.rmtree(os.environ["HAT_CACHE"], ignore_errors=True)
    options = {"block_size": LENGTH, "batch_size": ROWS, "progress": False, **options}
    return self_text(base, tokens, **options)


def build(base, text, tokens=640, **options):
    return training_text(base, str(text), tokens, **{"block_size": 32, "progress": False, **options})


def test_sources():
    for text, expected in (
        ("addresses", ["addresses"]),
        ("addresses+self", ["addresses", "self"]),
        (" a.txt + self ", ["a.txt", "self"]),
        ("bundled", ["addresses", "self"]),
    ):
        assert sources(text) == expected
    for text in ("", "+", "self+", "self+self", "self+ self"):
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
    assert sorted(map(key, first)) == sorted(map(key, other))  # the same blocks of a corpus, in another order
    drawn = [set(map(tuple, build(tiny_base, "self", seed=seed)["input_ids"])) for seed in (0, 1)]
    assert not drawn[0] & drawn[1]


def test_blocks_come_from_all_of_the_train_split_and_from_nothing_else(tiny_base, corpus):
    train = load_text(corpus, tiny_base.tokenizer, split="train", block_size=32)
    whole = [tuple(row["input_ids"]) for row in train if len(row["input_ids"]) == 32]
    found = [whole.index(tuple(ids)) for ids in build(tiny_base, corpus)["input_ids"]]
    assert len(found) == 20 and min(found) == 0
    assert np.diff(sorted(found)).max() <= 2 * len(whole) / 20  # evenly spaced
    with pytest.raises(HatError, match="never trained or calibrated on"):
        build(tiny_base, "docstrings")


def test_a_short_source_gives_what_it_has_short_blocks_included(tiny_base, corpus):
    everything = load_text(corpus, tiny_base.tokenizer, split="train", block_size=32)
    found = build(tiny_base, corpus, tokens=10**6)
    assert len(found) == len(everything) and sum(map(len, found["input_ids"])) == sum(map(len, everything["input_ids"]))


# The base's own text


def test_blocks_are_full_and_just_enough_in_rows_of_load_text(tiny_base, corpus):
    for tokens, rows in ((2, 1), (8, 1), (9, 2), (24, 3), (25, 4), (60, 8)):
        found = text(tiny_base, tokens)
        assert [len(ids) for ids in found["input_ids"]] == [LENGTH] * rows
        assert found["n_context"] == [0] * rows
        assert found["doc"] == [f"self-0:{row}" for row in range(rows)]
    assert found.features == load_text(corpus, tiny_base.tokenizer).features


def test_tokens_come_from_the_whole_distribution_at_temperature_one(tiny_base):
    """Only then is the mean surprisal of the sampled tokens equal to the entropy."""
    ids = torch.tensor(text(tiny_base, 4096, block_size=64, batch_size=64)["input_ids"])
    with torch.no_grad():
        log_p = tiny_base.model(ids[:, :-1]).logits.log_softmax(-1)
    surprise = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    excess = surprise - entropy
    assert entropy.mean() > 2  # far from deterministic, otherwise the mean would say nothing
    assert abs(excess.mean()) < 3 * excess.std() / excess.numel() ** 0.5
    assert len(ids.unique()) == tiny_base.model.config.vocab_size


def test_first_tokens_are_spread_over_the_vocabulary_or_bos_where_the_tokenizer_puts_it(tiny_base):
    first = {ids[0] for ids in text(tiny_base, 4000, block_size=2, batch_size=2000)["input_ids"]}
    assert first == set(range(256))  # all bytes; BOS, EOS and PAD never

    class WithBos:
        bos_token_id = 256

        def __call__(self, text):
            return type("", (), {"input_ids": [256]})

    blocks = text(replace(tiny_base, tokenizer=WithBos()), 48, seed=1)["input_ids"]
    assert {ids[0] for ids in blocks} == {256} and len({ids[1] for ids in blocks}) > 1


def test_same_seed_same_text_and_another_seed_another(tiny_base):
    state = torch.get_rng_state()
    first, again, other = (list(text(tiny_base, 48, anew=True, seed=s)["input_ids"]) for s in (0, 0, 1))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert len({tuple(ids) for ids in first + other}) == 12  # nor does any batch repeat another


def test_more_tokens_continue_the_same_text_and_what_is_kept_needs_no_model(tiny_base, sampled, cached):
    short = list(text(tiny_base, 40))
    assert len(short) == 5 and list(text(tiny_base, 90))[:5] == short
    assert sampled == [0, 1, 2, 3] and len(cached()) == 4
    assert list(text(tiny_base, 90, anew=True))[:5] == short and sampled[4:] == [0, 1, 2, 3]


@pytest.mark.parametrize("change", ["seed", "block_size", "batch_size", "fingerprint", "dtype"])
def test_cache_keeps_different_texts_apart(tiny_base, sampled, change):
    text(tiny_base, BATCH)
    base, options = tiny_base, {}
    if change == "fingerprint":
        base = replace(tiny_base, fingerprint="0" * 64)
    elif change == "dtype":
        base = load_base("random:tiny", dtype="bf16", device="cpu")
        assert base.fingerprint == tiny_base.fingerprint
    else:
        options = {change: 5}
    text(base, 5, **options)
    assert sampled == [0, 0]


def test_an_interrupted_run_goes_on_where_it_stopped(tiny_base, monkeypatch, cached, sampled):
    whole = list(text(tiny_base, 3 * BATCH))
    sampled.clear()
    forward, calls = tiny_base.model.forward, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == LENGTH + 2:  # in the second batch
            raise KeyboardInterrupt
        return forward(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_base.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            text(tiny_base, 3 * BATCH, anew=True)
    assert [path.name for path in cached()] == ["00000.npz"]  # and nothing half written
    assert list(text(tiny_base, 3 * BATCH)) == whole
    assert sampled == [0, 1, 1, 2]


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def flip(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"\n") + 5] ^= 1  # a bit of the first ids, still in range
    path.write_bytes(data)


def store(ids):
    return lambda path: np.savez(path, input_ids=ids)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        cut,
        flip,
        store(np.zeros((ROWS, LENGTH - 1), np.int32)),
        store(np.full((ROWS, LENGTH), 260, np.int32)),
        store(np.full((ROWS, LENGTH), -1, np.int32)),
        store(np.zeros((ROWS, LENGTH), np.float32)),
        store(np.array([["pickle"] * LENGTH] * ROWS, object)),
    ],
    ids=["empty", "cut", "flipped", "shape", "above", "below", "dtype", "pickle"],
)
def test_a_damaged_file_is_made_again(tiny_base, sampled, cached, capsys, damage):
    first = list(text(tiny_base, 3 * BATCH))
    middle = cached()[1]
    damage(middle)
    assert list(text(tiny_base, 3 * BATCH)) == first and sampled == [0, 1, 2, 1]
    assert capsys.readouterr().err == f"{middle} is damaged, making it again\n"
    assert list(text(tiny_base, 3 * BATCH)) == first and sampled == [0, 1, 2, 1]


def test_a_cache_that_cannot_be_written_is_told_before_the_work(tiny_base, sampled, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "file"))
    with pytest.raises(HatError, match="cannot write the cache .*; set HAT_CACHE"):
        text(tiny_base, BATCH)
    assert sampled == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": 1}, "tokens must be a whole number of at least 2, got 1"),
        ({"block_size": 1}, "block_size must be a whole number of at least 2, got 1"),
        ({"block_size": 2049}, "block_size must be at most 2048, the context of random:tiny, got 2049"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_sizes(tiny_base, sampled, options, message):
    with pytest.raises(HatError, match=message):
        text(tiny_base, **{"tokens": BATCH, **options})
    assert sampled == []


def test_only_a_plain_base_writes_text():
    base = load_base("random:tiny", dtype="fp32", device="cpu")
    plain = list(text(base, BATCH, anew=True))
    hat = HierarchicalTransformer(base, HatConfig.default(base))
    with pytest.raises(HatError, match="random:tiny carries a HierarchicalTransformer: call its unload"):
        text(base, BATCH)
    assert list(text(hat.unload(), BATCH, anew=True)) == plain


# Openings


@pytest.mark.slow
def test_blocks_go_on_with_openings(tiny_base, cached):
    found = text(tiny_base, 6 * 64, source="openings", block_size=64)
    begun = [t for batch in range(2) for _, t in openings(ROWS, np.random.default_rng([0, batch]))]
    for row, beginning in zip(found, begun, strict=True):
        given = tiny_base.tokenizer(beginning).input_ids[:64]
        assert row["input_ids"][: len(given)] == given and row["doc"].startswith("openings-0:")
    assert len(cached()) == 2
    again = text(tiny_base, 6 * 64, source="openings", block_size=64, anew=True)
    assert list(found) == list(again)
    assert text(tiny_base, 6 * 64, source="openings", block_size=64, seed=1)["input_ids"] != found["input_ids"]


def test_what_is_drawn_lies_in_the_nucleus(tiny_base, monkeypatch):
    monkeypatch.setattr(mixture, "TOP_P", 0.3)
    found = text(tiny_base, 3 * 64, source="openings", block_size=64)
    for row, (_, beginning) in zip(found, openings(ROWS, np.random.default_rng([0, 0])), strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            chances, order = tiny_base.model(ids).logits[0].float().softmax(-1).sort(descending=True)
        before = (chances.cumsum(-1) - chances).gather(-1, order.argsort(-1))  # mass of the more probable tokens
        begun = len(tiny_base.tokenizer(beginning).input_ids)
        drawn = before[:-1].gather(-1, ids[0, 1:, None])[begun - 1 :, 0]
        assert (drawn < 0.3 + 1e-5).all() and begun < 60


def test_the_nucleus_is_drawn_by_its_own_probabilities(monkeypatch):
    monkeypatch.setattr(mixture, "TOP_P", 0.7)
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()[None]  # 0.5 and 0.25 are included, as 0.5 alone is not enough
    found = [int(mixture._nucleus(logits, torch.tensor([[u]], dtype=torch.float64))) for u in (1e-9, 0.66, 0.67, 1.0)]
    assert found == [1, 1, 3, 3]
