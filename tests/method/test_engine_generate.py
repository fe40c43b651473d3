"""Texts that the engine writes within transformers' `generate` are those of the reference path."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from soak.processors import agrees
from test_fast_path import every_family, hook
from test_transformer import GREEDY, close
from tiny_runs import active, tiny
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, TextStreamer, generation
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)  # fmt: skip

from hat_lib.config import HatError
from hat_lib.decoding.choice import ORDER, choice_of
from hat_lib.engine import team
from hat_lib.method.trace import Trace

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:token grain")]


class Listener(StoppingCriteria):
    """Calls ``act`` at the second token, and records torch's threads."""

    def __init__(self, act):
        self.act, self.threads = act, []

    def __call__(self, input_ids, scores, **kwargs):
        self.threads.append(torch.get_num_threads())
        if len(self.threads) == 2:
            self.act()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class TestGenerate:
    """transformers' own loop writes the same on either path."""

    def both(self, hat, ids, **settings):
        given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | settings
        torch.manual_seed(0)
        with hat.collect() as states:
            found = hat.lm.generate(ids, **given)
        assert {s.executed is not None for s in states if s.start} == {True, "position_ids" not in settings}
        torch.manual_seed(0)
        with hat.reference():
            return found, hat.lm.generate(ids, **given)

    SETTINGS = {"greedy": {}, "penalty": {"repetition_penalty": 1.3}, "beams": {"num_beams": 2},
                "shortest": {"min_new_tokens": 9, "eos_token_id": 7},
                "negative positions": {"position_ids": torch.arange(14)[None] - 18}}  # fmt: skip

    @pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
    def test_same_text(self, hat, ids, settings):
        assert torch.equal(*self.both(hat, ids, **settings))

    def test_hook_added_between_tokens_counts_from_the_next_call(self, channel_hat, ids):
        listener = Listener(lambda: hook(channel_hat))
        for on_engine in (True, False):
            with channel_hat.collect() as found:
                channel_hat.lm.generate(ids[:1], stopping_criteria=[listener], **GREEDY)
            assert [state.executed is not None for state in found] == [False, *[on_engine] * 7]

    @every_family
    @pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_p": 0.9}], ids=["greedy", "sampled"])
    def test_prompt_in_full(self, hat, ids, settings):
        plain, given = tiny(name=hat.base.name).model, {"cache": DynamicCache(config=hat.lm.config)} | GREEDY | settings
        torch.manual_seed(3)
        with hat.collect() as found:
            text = hat.lm.generate(ids, **given)
        torch.manual_seed(3)
        assert torch.equal(hat.lm.generate(ids, **GREEDY | settings), text)
        expected = plain(ids, use_cache=True).cache.layers
        for layer, other in zip(given["cache"].layers, expected, strict=True):
            close(layer.keys[:, :, :14], other.keys)
        whole = Trace.cat(found)
        assert found[0].tokens == 14 and whole.tokens == 21 and found[0].site_share[:-1].eq(1).all()
        assert Trace.cat(found[1:]).capacity < 1
        gated = hat.lm.generate(ids, gate_prompt=True, **GREEDY)
        with hat.reference():
            assert torch.equal(hat.lm.generate(ids, gate_prompt=True, **GREEDY), gated)

    def test_steered_token_by_token_or_several_at_a_time(self, channel_hat, ids):
        found = []
        for streamer in (None, TextStreamer(channel_hat.base.tokenizer)):
            with channel_hat.at(0.5, 0.0), channel_hat.steered(), channel_hat.collect() as states:
                text = channel_hat.lm.generate(ids[:1], streamer=streamer, **GREEDY | {"max_new_tokens": 40})
            found.append((text, Trace.cat(states[1:])))
        (text, whole), (again, streamed) = found
        assert torch.equal(text, again) and torch.equal(whole.site_share, streamed.site_share)

    def test_replay_is_what_generate_ran(self, hat, ids):
        for around in (hat.at, hat.reference):
            with around(), hat.collect() as found:
                text = hat.lm.generate(ids[:1], **GREEDY)
            cache = DynamicCache(config=hat.lm.config)
            with hat.dense():
                hat.lm(ids[:1], cache=cache, use_cache=True)
            for tokens, mask in ((text[:, :0], None), (text[:, 14:-1], torch.ones(1, 7))):
                with pytest.raises(HatError):
                    hat.replay(tokens, cache, mask)
            with around(), hat.collect() as again:
                hat.replay(text[:, 14:-1], cache)
            expected = Trace.cat(found[1:])
            assert again == [hat.trace] and torch.equal(again[0].site_share, expected.site_share)
            assert torch.equal(again[0].exit_layer, expected.exit_layer) and cache.get_seq_length() == 21

    @pytest.mark.parametrize("pace", [2, 1])
    def test_torch_has_its_threads_back(self, pace, channel_hat, ids, monkeypatch):
        def fail():
            raise ValueError

        monkeypatch.setattr(team, "cores", lambda: 2)
        monkeypatch.setattr(team, "LATE", 1 << 62)
        monkeypatch.setattr(team, "_teams", {})  # a team that is made here keeps this pace
        monkeypatch.setattr(team.Pace, "threads", property(lambda _: pace, lambda _, threads: None), raising=False)
        before, listener = torch.get_num_threads(), Listener(fail)
        try:
            torch.set_num_threads(2)
            with pytest.raises(ValueError):
                channel_hat.lm.generate(ids[:1], stopping_criteria=[listener], **GREEDY)
            assert torch.get_num_threads() == 2 and listener.threads == [pace, 1]  # after the prefill, and after a step
            with ThreadPoolExecutor(1) as pool:  # a thread started afterwards
                assert pool.submit(torch.get_num_threads).result() == 2
        finally:
            torch.set_num_threads(before)

    def test_conversation_goes_on_behind_one_cache(self, hat, ids):
        texts = []
        for around in (hat.at(), hat.reference()):
            cache, text = DynamicCache(config=hat.lm.config), ids[:1, :5]
            with around:
                for turn in (ids[1:2], ids[2:3, :3]):
                    text = torch.cat([text, turn], 1)
                    text = hat.lm.generate(text, cache=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
                    cache.crop(-2)  # as if a user had removed the end
                    text = text[:, :-2]
            texts.append(text)
        assert torch.equal(*texts)

    @pytest.mark.parametrize(("prompt", "more"), [(1, 63), (60, 40)])
    def test_up_to_the_context_limit_and_beyond(self, prompt, more):
        base = tiny()
        config = copy.deepcopy(base.model.config)
        config.max_position_embeddings = 64
        lm = LlamaForCausalLM(config).eval()
        hat, given = active("channel", replace(base, model=copy.deepcopy(lm))), GREEDY | {"max_new_tokens": more}
        text = torch.from_numpy(np.random.default_rng(1).integers(5, 250, (1, prompt)))
        assert torch.equal(*self.both(hat, text, max_new_tokens=more))
        with hat.dense():
            assert torch.equal(hat.lm.generate(text, **given), lm.generate(text, **given))


WARPER = {"filter_value": [-np.inf, -3.0, 0.0, np.nan], "min_tokens_to_keep": [1, 2, 20, 500]}
STOPS = [7, [7, 9], torch.tensor([9, 7]), torch.tensor(7)]
ARGUMENTS = {
    "TemperatureLogitsWarper": {"temperature": [0.7, 1e-3, 1e6, np.inf]},
    "TopKLogitsWarper": {"top_k": [5, 1, 259, 10**30]} | WARPER,
    "TopPLogitsWarper": {"top_p": [0.8, 1e-6, 0.0, 1.0]} | WARPER,
    "MinPLogitsWarper": {"min_p": [0.1, 0.0, 1.0]} | WARPER,
    "RepetitionPenaltyLogitsProcessor": {
        "penalty": [1.3, 0.5, 1e30, 1.0],
        "prompt_ignore_length": [None, 0, 4, 12, 13, np.int64(4), torch.tensor([0, 12]), torch.tensor([-3, 13])],
    },
    "MinNewTokensLengthLogitsProcessor": {
        "prompt_length_to_skip": [12, 0, 10, 14], "min_new_tokens": [3, 0, 1, 10**30], "eos_token_id": STOPS,
        "device": ["cpu"],
    },
    "EosTokenCriteria": {"eos_token_id": STOPS},
    "MaxLengthCriteria": {"max_length": [20, 10**30], "max_position_embeddings": [None, 8]},
}  # fmt: skip
"""what the engine takes over, and values of each argument: first what is usual"""
UNLIKE = {"filter_value", "min_tokens_to_keep", "prompt_ignore_length", "eos_token_id"}
"""for some values of these, transformers' own loop runs"""


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_every_argument_of_every_processor(kind):
    """The engine chooses as transformers does, or leaves it to transformers, at this token and at later ones."""
    values, made = ARGUMENTS[kind], getattr(generation, kind)
    assert {*ARGUMENTS} == {k.__name__ for k in ORDER} | {"EosTokenCriteria", "MaxLengthCriteria"}
    assert [*values] == [*inspect.signature(made).parameters]
    draws, config, padless, greedy = np.random.default_rng(0), *(GenerationConfig(do_sample=d) for d in (1, 1, 0))
    config._pad_token_tensor = greedy._pad_token_tensor = torch.tensor(0)
    padless._pad_token_tensor = None
    ids = torch.from_numpy(draws.integers(0, 260, (2, 16)))
    logits = torch.from_numpy(draws.normal(0, 2, (2, 260)).astype("f4"))
    for given in (dict(zip(values, v, strict=True)) for v in product(*values.values())):
        one, usual = made(**given), all(given[name] is values[name][0] for name in UNLIKE & {*given})
        others = [k for k in (EosTokenCriteria(7), MaxLengthCriteria(20)) if type(k) is not made]
        processors = LogitsProcessorList([one] if made in ORDER else [])
        criteria = StoppingCriteriaList(others if made in ORDER else [*others, one])
        choice = choice_of(ids[:, :12], 260, processors, criteria, config)
        if choice is None:
            assert not usual, given
            continue
        for step in range(5):
            if step and choice.seen.size:
                choice.seen[[0, 1], ids[:, 11 + step]] = True
            expected = processors(ids[:, : 12 + step], logits.clone()).softmax(-1).numpy()
            assert agrees(expected, logits.numpy(), choice, step), given
        assert np.array_equal(np.unique(choice.stops), criteria(torch.arange(260)[:, None], None).nonzero().ravel())
        assert (choice_of(ids[:, :12], 260, processors, criteria, greedy) is None) == ("Warper" in kind)
        assert choice_of(ids[:, :12], 260, processors, criteria, padless) is None
        assert choice_of(ids[:, :12], 260, processors, StoppingCriteriaList([*criteria] * 2), config) is None
