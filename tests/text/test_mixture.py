"""What a run trains on: equal shares of whole blocks in one fixed order; the base's own text is sampled from its whole
distribution, reproducibly, and kept through interruptions."""

import json
import shutil

import numpy as np
import pytest
import torch

from hat_lib.base.load import load_base
from hat_lib.config import HatConfig, HatError
from hat_lib.hat import HierarchicalTransformer
from hat_lib.text import mixture
from hat_lib.text.blocks import load_text
from hat_lib.text.mixture import self_text, sources, training_text

ROWS, LENGTH = 3, 8
BATCH = ROWS * LENGTH


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("HAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    """60 documents of 100 bytes."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:02d}" * 50}) for i in range(60)))
    return path


def text(base, tokens, **options):
    return self_text(base, tokens, **{"block_size": LENGTH, "batch_size": ROWS, "progress": False, **options})


def build(base, text, tokens=640, **options):
    return training_text(base, str(text), tokens, **{"block_size": 32, "progress": False, **options})


def test_sources():
    assert sources(" a.txt + self ") == ["a.txt", "self"]
    assert sources("bundled") == ["addresses", "self"]
    for bad in ("", "+", "self+", "self+ self"):
        with pytest.raises(HatError):
            sources(bad)


def test_sources_share_the_tokens_evenly(tiny_base, corpus):
    found = build(tiny_base, f"{corpus}+self")
    ours = [row["doc"].startswith("self-0:") for row in found]
    assert len(found) == 20 and sum(ours) == 10
    assert {len(ids) for ids in found["input_ids"]} == {32} and found["index"][:] == list(range(20))
    assert ours != sorted(ours) and ours != sorted(ours, reverse=True)  # mixed, in an order fixed by the seed
    again, other = (build(tiny_base, f"{corpus}+self", seed=seed)["input_ids"] for seed in (0, 1))
    assert list(found["input_ids"]) == list(again) != list(other)


def test_blocks_come_from_all_of_the_train_split(tiny_base, corpus):
    train = load_text(corpus, tiny_base.tokenizer, split="train", block_size=32)
    whole = [tuple(row["input_ids"]) for row in train if len(row["input_ids"]) == 32]
    found = [whole.index(tuple(ids)) for ids in build(tiny_base, corpus)["input_ids"]]
    assert len(found) == 20 and min(found) == 0
    assert np.diff(sorted(found)).max() <= 2 * len(whole) / 20  # evenly spaced
    assert len(build(tiny_base, corpus, tokens=10**6)) == len(train)  # a short source gives all it has


# The base's own text


def test_tokens_come_from_the_whole_distribution_at_temperature_one(tiny_base):
    """Only then is the mean surprisal of the sampled tokens equal to the entropy."""
    ids = torch.tensor(text(tiny_base, 4096, block_size=64, batch_size=64)["input_ids"])
    with torch.no_grad():
        log_p = tiny_base.model(ids[:, :-1]).logits.log_softmax(-1)
    excess = -log_p.gather(-1, ids[:, 1:, None])[..., 0] + (log_p.exp() * log_p).sum(-1)
    assert abs(excess.mean()) < 3 * excess.std() / excess.numel() ** 0.5
    assert len(ids.unique()) == tiny_base.model.config.vocab_size
    assert set(ids[:, 0].tolist()) <= set(range(256))  # bytes; BOS, EOS and PAD are never the first


def test_the_same_seed_gives_the_same_text_and_more_tokens_continue_it(tiny_base, cache, sampled):
    short, other = (list(text(tiny_base, 40, seed=seed)["input_ids"]) for seed in (0, 1))
    assert [len(ids) for ids in short] == [LENGTH] * 5 and len({tuple(ids) for ids in short + other}) == 10
    sampled.clear()
    more = text(tiny_base, 90)
    assert more["input_ids"][:5] == short and sampled == [2, 3]  # what is kept needs no model
    assert more["doc"] == [f"self-0:{row}" for row in range(12)]


def test_an_interrupted_call_goes_on(tiny_base, monkeypatch, cache, sampled):
    whole = list(text(tiny_base, 3 * BATCH))
    shutil.rmtree(cache)
    sampled.clear()
    forward, turns = tiny_base.model.forward, iter(range(LENGTH + 1))  # into the second batch
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(tiny_base.model, "forward", lambda *args, **how: (next(turns), forward(*args, **how))[1])
        text(tiny_base, 3 * BATCH)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["00000.npz"]  # and nothing half written
    assert list(text(tiny_base, 3 * BATCH)) == whole and sampled == [0, 1, 1, 2]


def test_refusals(tiny_base, cache):
    for options in {"tokens": 1}, {"block_size": 1}, {"block_size": 2049}:
        with pytest.raises(HatError, match=[*options][0]):
            text(tiny_base, **{"tokens": BATCH, **options})
    base = load_base("random:tiny", dtype="fp32", device="cpu")
    hat = HierarchicalTransformer(base, HatConfig.default(base))
    with pytest.raises(HatError, match="unload"):
        text(base, BATCH)
    assert len(text(hat.unload(), BATCH)) == ROWS
    shutil.rmtree(cache)
    cache.touch()
    with pytest.raises(HatError, match="HAT_CACHE"):
        text(tiny_base, BATCH)
