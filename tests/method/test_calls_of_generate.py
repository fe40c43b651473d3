"""A call of generate: whose forwards are the text's, what is the prompt's, and what an interrupt leaves behind."""

import time

import pytest
import torch
from soak.interrupts import at_every_line
from soak.paths import Curious
from test_transformer import GREEDY, close
from tiny_runs import active, peaked, stepwise, tiny
from transformers import DynamicCache

from hat_lib.base.load import fingerprint
from hat_lib.decoding import generate
from hat_lib.decoding.inference import AdaptiveInference
from hat_lib.method.routers import column_norm
from hat_lib.method.trace import Trace

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:weights of the base were changed")]


def beside(hat) -> dict:
    """Settings of generate with which other forwards run in its midst: name -> settings."""
    other = torch.arange(40, 58).view(3, 6)
    asks = {
        "a forward": lambda: hat.lm(other),
        "a text": lambda: hat.lm.generate(other, **GREEDY | {"max_new_tokens": 2}),
    }
    found = {"guidance": {"guidance_scale": 1.5}}
    for name, ask in asks.items():
        found[f"{name} in a streamer"] = {"streamer": Curious(ask)}
        found[f"{name} in a processor"] = {"logits_processor": [Curious(ask)]}
    return found


def ran(hat, text, length) -> Trace:
    """What the new tokens of a text run when they are replayed."""
    cache = DynamicCache(config=hat.lm.config)
    with hat.dense():
        hat.lm(text[:, :length], cache=cache, use_cache=True)
    hat.replay(text[:, length:-1], cache)
    return hat.trace


def same(trace, expected):
    assert trace.covers == "new tokens" and torch.equal(trace.exit_layer, expected.exit_layer)
    close(trace.site_share, expected.site_share)


@pytest.mark.parametrize("name", beside(None))
def test_a_trace_has_the_rows_of_the_text_that_comes_out(ids, name):
    hat = active("channel")
    settings = beside(hat)[name]
    text = hat.lm.generate(ids, **GREEDY | settings)
    same(hat.trace, ran(hat, text, ids.shape[1]))
    out = AdaptiveInference(hat).generate("One", max_new_tokens=8, **settings)
    same(out.trace, ran(hat, out.ids, out.prompt_length))


LOOKUP, EARLY = {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}


@pytest.mark.parametrize("path", ["engine", "reference"])
@pytest.mark.parametrize("how", [LOOKUP, LOOKUP | {"gate_prompt": True}, EARLY, {"assistant_model": None},
                                 {"use_cache": False}], ids=str)  # fmt: skip
def test_assisted_text_is_the_text(path, how):
    """In fp32, greedy: the prompt runs in full and drafts by capacity, though one forward may read both."""
    hat = active("channel", peaked())
    how = how | {"assistant_model": peaked().model} if "assistant_model" in how else how
    for seed in range(2):
        prompt = torch.randint(5, 250, (1, 5), generator=torch.Generator().manual_seed(seed)).repeat(1, 3)
        given = {**GREEDY, "max_new_tokens": 24, "gate_prompt": "gate_prompt" in how}
        with hat.changed(engine=False if path == "reference" else None):
            expected, trace = hat.lm.generate(prompt, **given), hat.trace
            found = hat.lm.generate(prompt, **given | how)
        assert torch.equal(found, expected), seed
        same(hat.trace, trace)


def test_states_and_attentions_of_a_prompt_with_drafts(ids):
    hat = active("channel", base := tiny())
    base.model.set_attn_implementation("eager")
    prompt, more = ids[:1, :4].repeat(1, 3), {"output_hidden_states": True, "output_attentions": True}
    more |= GREEDY | {"return_dict_in_generate": True}
    plain, drafted = (hat.lm.generate(prompt, **more | how) for how in ({}, LOOKUP))
    for name in ("hidden_states", "attentions"):
        for one, other in zip(getattr(plain, name), getattr(drafted, name), strict=True):
            for a, b in zip(one, other, strict=True):
                close(b, a)


def test_set_up_is_not_a_part_of_a_texts_time(monkeypatch):
    class Slow(generate.Decoder):
        def __init__(self, *args, **how):
            time.sleep(2)
            super().__init__(*args, **how)

    monkeypatch.setattr(generate, "Decoder", Slow)
    hat = active("channel")
    assert AdaptiveInference(hat).generate("One", mode="lossless", max_new_tokens=3, measure=False).seconds < 2
    hat.weight_format = "int8"
    assert hat.prepare() > 2 > hat.prepare()


@pytest.mark.parametrize("loop", ["the engine's loop", "transformers' loop"])
def test_an_interrupt_anywhere_in_generate_leaves_the_thread_as_it_was(ids, loop):
    hat, ids = active("channel"), ids[:2, :6]
    how = GREEDY | {"max_new_tokens": 3} | ({"logits_processor": [Curious(int)]} if "transf" in loop else {})
    expected, text, threads = stepwise(hat, ids), hat.lm.generate(ids, **how), torch.get_num_threads()
    for line in at_every_line(lambda: hat.lm.generate(ids, **how)):
        assert torch.equal(stepwise(hat, ids), expected) and hat.trace.tokens == 1, line
        assert torch.get_num_threads() == threads and hat.capacity == 0.7 and not hat._context.collectors, line
    assert torch.equal(hat.lm.generate(ids, **how), text)


def test_an_interrupt_in_refresh_leaves_nothing_stale(ids):
    hat, edits = active("channel", tiny()), iter(range(1, 1000))
    hat.lm.generate(ids, **GREEDY)
    linear = hat.lm.model.layers[1].mlp.gate_proj

    def edit_and_refresh():
        linear.weight[:, 3] += next(edits)
        hat.refresh()

    for line in at_every_line(edit_and_refresh):
        assert hat.checkpoint().base_fingerprint == fingerprint(hat.lm), line
        mlp = hat.lm.model.layers[1].mlp
        close(hat.routers["1_gate_up"].column_norm, column_norm(mlp.gate_proj, mlp.up_proj))
        hat.lm(ids[:1], use_cache=True)
        with hat.at(1.0, 0.0):
            fast = stepwise(hat, ids[:1, :3])
            with hat.reference():
                close(fast, stepwise(hat, ids[:1, :3]), 1e-4)
