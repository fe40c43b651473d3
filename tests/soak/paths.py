"""Drawn models off the beaten path: extremes, chunked prompts, uneven batches, assisted texts, forwards beside a
text's own, interrupts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from hat_lib.method.trace import Trace
from soak.equalities import TOLERANCE, adaptive, llama, stepwise
from soak.interrupts import at_every_line


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


class Curious(BaseStreamer, LogitsProcessor):
    """Asks the model about another text each time that it sees a token."""

    def __init__(self, ask):
        self.put, self.end = (lambda ids: ask()), ask

    def __call__(self, input_ids, scores):
        self.end()
        return scores


def beside(case) -> None:
    """Forwards and texts of a logits processor, of guidance or in a streamer are not the text's."""
    hat, ids, draws = prepared(case)
    other, kind = torch.from_numpy(draws.integers(0, 256, (3, 5))), int(draws.integers(3))
    curious = Curious(lambda: (hat.lm(other), generated(hat, other[:1])))
    generated(hat, ids, **({"streamer": curious}, {"logits_processor": [curious]}, {"guidance_scale": 1.5})[kind])
    assert hat.trace.covers == "new tokens" and hat.trace.real.shape == (len(ids), 5), "whose forwards"


def lines(case) -> None:
    """Ctrl-C at a few lines of generate: the next forward and the next text are as they were."""
    hat, ids, draws = prepared(case)
    expected, text = stepwise(hat, ids), generated(hat, ids)
    for line in at_every_line(lambda: generated(hat, ids), lambda all: draws.choice(all, 5).tolist()):
        assert torch.equal(stepwise(hat, ids), expected) and hat.trace.tokens == 1, line
    assert torch.equal(generated(hat, ids), text)


CLASSES: dict[str, Callable] = {check.__name__: check for check in (extremes, chunks, uneven, assisted, beside, lines)}
