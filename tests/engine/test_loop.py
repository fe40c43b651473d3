"""The loop over tokens: the same tokens as step by step, chosen as transformers chooses them."""

import numpy as np
import pytest
import torch
from test_decoder import llama, steps
from transformers import DynamicCache
from transformers import generation as g

from hat_lib.engine import team
from hat_lib.engine.arrays import GREEDY
from hat_lib.engine.compiling import compiled
from hat_lib.engine.decoder import Decoder, Place
from hat_lib.engine.loop import draw, restrict, weigh

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def decoder():
    return Decoder(llama())


def course(decoder, ids, count, **choice):
    """``count`` tokens after ``ids [B, T]``, and the cache."""
    cache, none = DynamicCache(config=decoder.lm.config), np.zeros(len(ids), np.int64)
    decoder.lm(ids[:, :-1], cache=cache, use_cache=True)
    place = Place((none + cache.get_seq_length())[:, None], none, np.zeros((len(ids), 1), bool))
    last, choice = ids[:, -1:].numpy(), GREEDY._replace(**choice)
    return decoder.course(last, cache, decoder.dense, place, count, choice, unprotected=none), cache


@pytest.fixture
def ids():
    return torch.from_numpy(np.random.default_rng(0).integers(1, 101, (3, 12)))


def test_greedy_is_step_by_step(decoder, ids):
    found, _ = course(decoder, ids, 40)  # more than a piece of the context
    cache, token = DynamicCache(config=decoder.lm.config), ids[:, -1:]
    decoder.lm(ids[:, :-1], cache=cache, use_cache=True)
    for t in range(40):
        token = steps(decoder, token, cache).argmax(-1)
        assert token[:, 0].tolist() == found.ids[:, t].tolist()
    plain = decoder.lm.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert plain[:, 12:].tolist() == found.ids.tolist()


def test_the_rest_of_a_course_that_was_called_off(decoder, ids, monkeypatch):
    run, begun, (expected, _) = team.run, [], course(decoder, ids, 40)

    def broken(step, args, size):
        *rest, whole = args
        begun.append(whole.ran[0])
        run(step, (*rest, whole._replace(steps=20 * len(begun))), size)
        whole.kept[20:] += len(begun) == 1  # by a part of a step
        return len(begun) == 2

    monkeypatch.setattr(team, "run", broken)
    found, cache = course(decoder, ids, 40)
    assert begun == [0, 20] and cache.get_seq_length() == 51
    assert all(np.array_equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))


@pytest.mark.skipif(team.CLOCK is None, reason="nothing is late on Windows")
def test_a_long_call_of_fewer_threads_goes_on_with_more(decoder, ids, monkeypatch):
    expected, _ = course(decoder, ids, 40)
    monkeypatch.setattr(team, "_teams", {})
    monkeypatch.setattr(team, "SHORTEST", 1)
    monkeypatch.setattr(team, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    pace, run, threads = team._team(2).pace, team.run, []
    monkeypatch.setattr(team, "run", lambda *given: threads.append(pace.threads) or run(*given))
    while pace.threads == 2:
        pace.after(1, 1.0)
    found, _ = course(decoder, ids, 40)
    assert threads[:2] == [1, 2]
    assert np.array_equal(found.ids, expected.ids)


@compiled()
def drawn(weights, choice, out):
    weigh(weights, weights.max(), choice.temperature)
    restrict(weights, choice.top_k, choice.top_p, choice.min_p)
    for k in range(out.shape[0]):
        out[k] = draw(weights, choice.uniform[k, 0])


def test_distribution():
    """Draws at evenly spaced uniform numbers are as frequent as transformers' processors make them likely."""
    count, logits = 20_000, torch.from_numpy(np.random.default_rng(3).normal(0, 2, (1, 40)).astype("f4"))
    warpers = [g.TemperatureLogitsWarper(1.5), g.TopKLogitsWarper(9), g.TopPLogitsWarper(0.8), g.MinPLogitsWarper(0.1)]
    expected = g.LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)
    given = {"temperature": np.float32(1.5), "top_k": 9, "top_p": np.float32(0.8), "min_p": np.float32(0.1)}
    choice = GREEDY._replace(sample=True, uniform=((np.arange(count) + 0.5) / count)[:, None], **given)
    drawn(logits[0].numpy(), choice, out := np.zeros(count, np.int64))
    assert np.abs(np.bincount(out, minlength=40) / count - expected[0].numpy()).max() < 2 / count + 1e-5


def test_nan_among_the_logits(ids):
    """The likeliest is the first NaN, as for torch; nothing can be drawn."""
    lm = llama()
    lm.lm_head.weight[[60, 77]] = torch.nan
    plain = lm.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    found, _ = course(Decoder(lm), ids, 5)
    assert plain[:, 12:].tolist() == found.ids.tolist() == [[60] * 5] * 3
    with pytest.raises(RuntimeError, match="NaN"):
        course(Decoder(lm), ids, 5, sample=True, uniform=np.full((5, 3), 0.5))
