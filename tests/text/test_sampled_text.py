"""The base's own text: full blocks from its whole distribution, the same again, and kept through interruptions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import hat_lib.text.sampled
from hat_lib.backbone.base import load_base
from hat_lib.config import HatConfig, HatError
from hat_lib.model.transformer import HierarchicalTransformer
from hat_lib.text.blocks import load_text
from hat_lib.text.sampled import self_text

ROWS, LENGTH = 3, 8
BATCH = ROWS * LENGTH


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    """An empty cache; returns the function that lists the files in it."""
    monkeypatch.setenv("HAT_CACHE", str(tmp_path))
    return lambda: sorted(path for path in tmp_path.rglob("*") if path.is_file())


@pytest.fixture
def sampled(monkeypatch):
    """The batches that were really sampled, in order."""
    batches, sample = [], hat_lib.text.sampled._sample

    def noted(base, shape, seed, bar):
        batches.append(seed[1])
        return sample(base, shape, seed, bar)

    monkeypatch.setattr(hat_lib.text.sampled, "_sample", noted)
    return batches


@pytest.fixture
def corpus(tiny_base, tmp_path):
    """Blocks that `load_text` makes of a file, the last one short."""
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 10)
    return load_text(path, tiny_base.tokenizer, split="train", block_size=LENGTH)


def text(base, tokens, **options):
    options = {"block_size": LENGTH, "batch_size": ROWS, "progress": False, **options}
    return self_text(base, tokens, **options)


# What is sampled


@pytest.mark.parametrize("tokens, rows", [(2, 1), (8, 1), (9, 2), (24, 3), (25, 4), (60, 8)])
def test_blocks_are_full_and_just_enough(tiny_base, tokens, rows):
    found = text(tiny_base, tokens)
    assert [len(ids) for ids in found["input_ids"]] == [LENGTH] * rows
    assert found["n_context"] == [0] * rows
    assert found["doc"] == [f"self-0:{row}" for row in range(rows)]


def test_rows_are_those_of_load_text(tiny_base, corpus):
    assert text(tiny_base, 8).features == corpus.features


def test_tokens_come_from_the_whole_distribution_at_temperature_one(tiny_base):
    """Only then is the surprise at the sampled tokens, on average, the entropy."""
    ids = torch.tensor(text(tiny_base, 4096, block_size=64, batch_size=64)["input_ids"])
    with torch.no_grad():
        log_p = tiny_base.model(ids[:, :-1]).logits.log_softmax(-1)
    surprise = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    excess = surprise - entropy
    assert entropy.mean() > 2  # far from deterministic, or the mean would say nothing
    assert abs(excess.mean()) < 3 * excess.std() / excess.numel() ** 0.5
    assert len(ids.unique()) == tiny_base.model.config.vocab_size


def test_first_tokens_are_spread_over_the_vocabulary_without_special_tokens(tiny_base):
    first = {ids[0] for ids in text(tiny_base, 4000, block_size=2, batch_size=2000)["input_ids"]}
    assert first == set(range(256))  # all bytes; BOS, EOS and PAD never


def test_bos_comes_first_where_the_tokenizer_puts_it(tiny_base):
    class WithBos:
        bos_token_id = 256

        def __call__(self, text):
            return type("", (), {"input_ids": [256]})

    blocks = text(replace(tiny_base, tokenizer=WithBos()), 48)["input_ids"]
    assert {ids[0] for ids in blocks} == {256} and len({ids[1] for ids in blocks}) > 1


def test_same_seed_same_text_and_another_seed_another(tiny_base):
    state = torch.get_rng_state()
    first, again, other = (list(text(tiny_base, 48, cache=False, seed=s)["input_ids"]) for s in (0, 0, 1))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert len({tuple(ids) for ids in first + other}) == 12  # nor does any batch repeat another


@pytest.mark.parametrize("cache", [True, False])
def test_more_tokens_continue_the_same_text(tiny_base, sampled, cache):
    short = list(text(tiny_base, 40, cache=cache))
    assert len(short) == 5 and list(text(tiny_base, 90, cache=cache))[:5] == short
    assert sampled == ([0, 1, 2, 3] if cache else [0, 1, 0, 1, 2, 3])


# What is kept


def test_cached_text_needs_no_model(tiny_base, sampled, cached):
    first = list(text(tiny_base, 2 * BATCH))
    assert len(cached()) == 2 and sampled == [0, 1]
    assert list(text(tiny_base, 2 * BATCH)) == first and sampled == [0, 1]


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


def test_without_cache_nothing_is_read_or_written(tiny_base, sampled, cached):
    text(tiny_base, BATCH, cache=False)
    assert cached() == []
    text(tiny_base, BATCH)
    text(tiny_base, BATCH, cache=False)
    assert sampled == [0, 0, 0] and len(cached()) == 1


def test_an_interrupted_run_goes_on_where_it_stopped(tiny_base, monkeypatch, cached, sampled):
    whole = list(text(tiny_base, 3 * BATCH, cache=False))
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
            text(tiny_base, 3 * BATCH)
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


# Bad input


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
    plain = list(text(base, BATCH, cache=False))
    hat = HierarchicalTransformer(base, HatConfig.default(base))
    with pytest.raises(HatError, match="random:tiny carries a HierarchicalTransformer: call its unload"):
        text(base, BATCH)
    assert list(text(hat.unload(), BATCH, cache=False)) == plain
