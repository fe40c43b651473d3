"""Steering: decoding converges to the requested work, causally, per sequence, the same on both paths; off, it does
nothing. What it remembers of a cache's rows goes along with them, and so do the texts of a random control."""

import pickle
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_transformer import close, stepwise
from tiny_runs import gating, new_hat
from transformers import DynamicCache

from hat_lib.config import HatError
from hat_lib.decoding.steering import LIMIT, offsets
from hat_lib.evaluation.choices import Random

pytestmark = pytest.mark.usefixtures("no_grad")
ASKED = 0.6


@pytest.fixture
def ids():
    return torch.from_numpy(np.random.default_rng(1).integers(5, 250, (3, 60)))


def off_by(factor):
    """A model whose thresholds are off by a factor."""
    hat = new_hat("channel")
    table = hat.calibration
    hat.calibration = replace(table, thresholds=(np.array(table.thresholds) * factor).tolist())
    return hat


def decoded(hat, ids):
    """Logits, and the share each token executed in the layers, ``[B, T]``."""
    with hat.collect() as states:
        logits = stepwise(hat, ids)
    return logits, torch.cat([s.share.mean(0) for s in states], 1)


@pytest.mark.parametrize("factor", [0.6, 1.5])
def test_converges_to_the_request(factor, ids):
    hat = off_by(factor)
    with hat.at(ASKED):
        plain = decoded(hat, ids)[1][:, 40:].mean()
        with hat.steered(0.2):
            steered = decoded(hat, ids)[1][:, 40:].mean()
    assert abs(plain - ASKED) > 0.05 and abs(steered - ASKED) < 0.02


@pytest.mark.parametrize("engine", [True, False])
def test_layers_make_up_for_a_head_that_reads_less_than_expected(engine, ids):
    hat, found = gating(threshold=30.0, margin=0.0), {}
    for gain in (0.0, 0.5):
        with hat.at(ASKED), hat.steered(gain), nullcontext() if engine else hat.reference():
            hat.lm.generate(ids, max_new_tokens=60, min_new_tokens=60, do_sample=False)
        found[gain] = hat.trace
        assert hat.trace.head_share < 0.3  # 0.5 is expected
    assert abs(found[0.0].capacity - ASKED) > 0.03 and abs(found[0.5].capacity - ASKED) < 0.02


def test_engine_equals_reference_and_alone_equals_in_a_batch(ids):
    hat = off_by(1.5)
    other = ids.clone()
    other[:, 12:] = other[:, 12:].flip(1)
    with hat.at(ASKED), hat.steered(0.1):
        assert hat.decoding.startswith("engine")
        logits, shares = decoded(hat, ids[:, :20])
        with hat.reference():
            others = decoded(hat, ids[:, :20])
        alone, changed = decoded(hat, ids[1:2, :20]), decoded(hat, other[:, :20])
    close(logits, others[0], 1e-4), close(shares, others[1], 1e-4)
    close(alone[0], logits[1:2], 1e-4), close(alone[1], shares[1:2], 1e-4)
    close(changed[0][:, :12], logits[:, :12])  # the future never changes the past


WAYS = {
    "random": lambda hat: [hat.using(Random(0.6))],
    "steered": lambda hat: [hat.at(0.6), hat.steered(0.5)],
    "steered reference": lambda hat: [hat.at(0.6), hat.steered(0.5), hat.reference()],
}
CHANGES = {
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "crop": (lambda cache: cache.crop(-3), [0, 1, 2]),
    "reset": (lambda cache: cache.reset(), [0]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_rows_take_along_what_is_remembered(way, change, ids):
    """A cache whose rows or length were changed, and that was copied, continues as a fresh decode of its rows."""
    hat, (apply, rows) = off_by(1.5), CHANGES[change]
    with ExitStack() as inside:
        for context in [hat.engine(), *WAYS[way](hat)]:
            inside.enter_context(context)
        cache = DynamicCache(config=hat.lm.config)
        for token in ids[:, :10].split(1, dim=1):
            hat.lm(token, cache=cache, use_cache=True)
        cache = pickle.loads(pickle.dumps(cache))
        apply(cache)
        start = cache.get_seq_length()
        found = [hat.lm(token, cache=cache, use_cache=True).logits for token in ids[rows, start:16].split(1, dim=1)]
        close(torch.cat(found, 1), stepwise(hat, ids[rows, :16])[:, start:])


def test_offsets(ids):
    """None in a first forward, within their limit."""
    hat, cache = off_by(50.0), DynamicCache(config=new_hat("channel").lm.config)
    with hat.at(0.9):
        expected = hat.lm(ids).logits
        with hat.steered(1.0):
            assert torch.equal(hat.lm(ids, cache=cache).logits, expected)
    assert (offsets(cache, 3, 60) == -LIMIT).all() and not offsets(None, 2, 60).any()
    with pytest.raises(HatError):
        new_hat("token").steered()
