"""Drawn models off the beaten path: extremes, hooks, interrupts, chunked prompts, uneven batches, pairs of contexts,
assisted texts, forwards beside a text's own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from hat_lib.evaluation.choices import Random
from hat_lib.evaluation.controls import RandomExits
from hat_lib.method.trace import Trace
from soak.equalities import TOLERANCE, adaptive, llama, stepwise
from soak.interrupts import at_every_line

EVERYTHING = {"capacity", "exit rate", "decisions", "exits", "corrections", "head", "steering"}
CONTEXTS = {
    "at": (lambda hat: hat.at(0.7), {"capacity"}),
    "at exits": (lambda hat: hat.at(exit_rate=0.4), {"exit rate"}),
    "dense": (lambda hat: hat.dense(), EVERYTHING),
    "correcting": (lambda hat: hat.correcting(0.9), {"corrections"}),
    "full head": (lambda hat: hat.changed(shortlist=None), {"head"}),
    "steered": (lambda hat: hat.steered(), {"steering"}),
    "using": (lambda hat: hat.using(Random(0.6)), {"decisions"}),
    "exiting": (lambda hat: hat.using(exits=RandomExits(dict.fromkeys(hat.config.exit_layers, 0.3))), {"exits"}),
    "masked": (lambda hat: hat.changed(compact=False), {"compact"}),
    "record": (lambda hat: hat.record(), {"record"}),
    "reference": (lambda hat: hat.reference(), {"reference"}),
    "collect": (lambda hat: hat.collect(), {"states"}),
}
"""contexts of a model, and what each of them names"""
PAIRS = list(combinations(CONTEXTS, 2))


def check_pair(hat, ids, pair, tolerance: float = 1e-5) -> None:
    """Contexts that name different things do the same in either order; of two that name the same, the inner wins."""

    def seen(*names):
        first, second = ([CONTEXTS[name][0](hat) for name in names] * 2)[:2]
        with first, second if len(names) > 1 else hat.changed():
            logits = stepwise(hat, ids)
            what = hat.capacity, hat.exit_rate, hat.decoding, hat.trace.capacity, hat.trace.masks is None
            return logits, what

    def same(a, b):
        assert float((a[0] - b[0]).abs().max()) <= tolerance * max(1.0, float(b[0].abs().max())), pair
        assert a[1] == b[1], pair

    (a, one), (b, other) = ((name, CONTEXTS[name][1]) for name in pair)
    if not one & other:
        same(seen(a, b), seen(b, a))
    if one <= other:
        same(seen(a, b), seen(b))
    if other <= one:
        same(seen(b, a), seen(a))


def prepared(case: SimpleNamespace):
    """An adaptive model, a text and a source of numbers."""
    hat, draws = adaptive(case, llama(case)), np.random.default_rng(case.seed + 2)
    return hat, torch.from_numpy(draws.integers(0, 256, (case.batch, case.tokens))), draws


def generated(hat, ids, **settings) -> torch.Tensor:
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 258, "eos_token_id": None}
    return hat.lm.generate(ids, attention_mask=torch.ones_like(ids), **given | settings)


def extremes(case) -> None:
    """Gates beyond where exp overflows, and norms of 1e4: the engine is the reference path, inf and NaN included."""
    hat, ids, draws = prepared(case)
    layer = hat.lm.model.layers[int(draws.integers(case.depth))]
    layer.mlp.gate_proj.weight.mul_(10.0 ** draws.integers(1, 4))
    hat.lm.model.norm.weight.mul_(10.0 ** draws.integers(0, 5))
    with hat.dense():
        fast = stepwise(hat, ids)
        with hat.reference():
            slow = stepwise(hat, ids)
    assert torch.equal(fast.isfinite(), slow.isfinite())
    off = (fast.float() - slow.float()).abs().nan_to_num().max() / slow.float().abs().nan_to_num().max()
    assert off <= 20 * TOLERANCE[case.dtype], off


def hooks(case) -> None:
    """A hook put on the base before a model is attached fires at each step."""
    base, seen = llama(case), []
    modules = [m for m in base.model.model.layers.modules() if not list(m.children())]
    module = modules[case.seed % len(modules)]
    module.register_forward_hook(lambda *args: seen.append(1))
    hat, ids = adaptive(case, base), torch.zeros(1, case.tokens, dtype=torch.long)
    with hat.at(1.0, 0.0):
        seen.clear()
        stepwise(hat, ids)
    assert len(seen) >= case.tokens or type(module) is torch.nn.Identity


def interrupts(case) -> None:
    """Ctrl-C anywhere in a forward of the reference path: the thread is as it was before."""
    hat, ids, draws = prepared(case)
    with hat.reference():
        expected, before = hat.lm(ids).logits, hat.trace
        modules = [m for m in hat.lm.modules() if m is not hat.lm]  # whose own hooks come after its forward
        left = int(draws.integers(3))

        def interrupt(*args):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        hook = modules[int(draws.integers(len(modules)))].register_forward_hook(interrupt)
        try:
            for _ in range(4):
                hat.lm(ids)
                before = hat.trace
        except KeyboardInterrupt:
            assert hat.trace is before, "the trace of a forward that was interrupted"
        hook.remove()
        assert torch.equal(hat.lm(ids).logits, expected) and hat.trace is not before


def chunks(case) -> None:
    """A prompt in chunks runs in full, and the trace is of the new tokens."""
    hat, ids, draws = prepared(case)
    expected = generated(hat, ids)
    with hat.collect() as states:
        found = generated(hat, ids, prefill_chunk_size=int(draws.integers(1, case.tokens + 1)))
    prompt = [state for state in states if state.start + state.tokens <= case.tokens]
    assert sum(state.tokens for state in prompt) == case.tokens
    assert min(state.capacity for state in prompt) > 0.9999, "a prompt runs in full"
    assert hat.trace.tokens == 5 and hat.trace.capacity == Trace.cat(states[len(prompt) :]).capacity, "trace"
    assert case.dtype == torch.bfloat16 or torch.equal(found, expected), "text of a prompt in chunks"


def uneven(case) -> None:
    """Rows that end at different lengths are those that they are alone."""
    hat, ids, draws = prepared(case)
    stop = int(generated(hat, ids)[0, case.tokens + int(draws.integers(5))])
    together = generated(hat, ids, eos_token_id=stop)
    for row, text in zip(ids, together, strict=True):
        alone = generated(hat, row[None], eos_token_id=stop)[0]
        rest = text[len(alone) :]
        assert (rest == 258).all(), "after its end, a row has pads"
        assert case.dtype == torch.bfloat16 or torch.equal(text[: len(alone)], alone), "a row alone = in a batch"


def contexts(case) -> None:
    """Two contexts, of which each changes what it names and nothing else."""
    hat, ids, draws = prepared(case)
    named = [pair for pair in PAIRS if _has(hat, pair)]
    check_pair(hat, ids[:1], named[int(draws.integers(len(named)))], 10 * TOLERANCE[case.dtype])


def assisted(case) -> None:
    """A greedy text with drafts, or without a cache, is the text, and runs what that runs."""
    hat, ids, draws = prepared(case)
    ids = ids[:1].repeat(1, 3)
    ways = {"prompt_lookup_num_tokens": int(draws.integers(1, 6))}, {"use_cache": False}
    expected, trace = generated(hat, ids), hat.trace
    found = generated(hat, ids, **ways[int(draws.integers(2))])
    if case.dtype == torch.float32:
        assert torch.equal(found, expected) and torch.equal(hat.trace.exit_layer, trace.exit_layer), "assisted = plain"
        assert (hat.trace.site_share - trace.site_share).abs().max() < 1e-5, "shares, assisted"


def beside(case) -> None:
    """Forwards of a logits processor, of guidance or in a streamer are not the text's."""
    hat, ids, draws = prepared(case)
    other, kind = torch.from_numpy(draws.integers(0, 256, (3, 5))), int(draws.integers(3))

    class Curious(BaseStreamer):
        put, end = (lambda self, ids: hat.lm(other)), (lambda self: generated(hat, other[:1]))

    def ask(input_ids, scores):
        hat.lm(other)
        return scores

    generated(hat, ids, **({"streamer": Curious()}, {"logits_processor": [ask]}, {"guidance_scale": 1.5})[kind])
    assert hat.trace.covers == "new tokens" and hat.trace.real.shape == (len(ids), 5), "whose forwards"


def lines(case) -> None:
    """Ctrl-C at a few lines of generate: the next forward and the next text are as they were."""
    hat, ids, draws = prepared(case)
    expected, text = stepwise(hat, ids), generated(hat, ids)
    for line in at_every_line(lambda: generated(hat, ids), lambda all: draws.choice(all, 5).tolist()):
        assert torch.equal(stepwise(hat, ids), expected) and hat.trace.tokens == 1, line
    assert torch.equal(generated(hat, ids), text)


def _has(hat, pair) -> bool:
    """Whether a model has what both contexts are about."""
    lacks = {"correcting": not hat.corrections, "steered": not hat.grain.scales_thresholds}
    lacks |= dict.fromkeys(("at exits", "exiting"), not hat.gates)
    return not any(lacks.get(name) for name in pair)


CLASSES: dict[str, Callable] = {
    check.__name__: check for check in (extremes, hooks, interrupts, chunks, uneven, contexts, assisted, beside, lines)
}
