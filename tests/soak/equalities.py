"""The equalities of docs/architecture.md, on randomly drawn models.

A case is a Llama's shape, a method's shape and a text. Decisions recorded in one pass are forced on another, so that
rounding cannot flip any of them. The head's decisions cannot be forced, and may flip at one token.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import GRAINS, skipping, stepwise, tune
from transformers import LlamaConfig, LlamaForCausalLM

from hat_lib.base.load import Base, exact_hash, fingerprint
from hat_lib.base.shapes import byte_tokenizer
from hat_lib.hat import HierarchicalTransformer
from hat_lib.method.trace import Trace

TOKENIZER = byte_tokenizer()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@st.composite
def drawn(draw) -> SimpleNamespace:
    heads = draw(st.integers(1, 4))
    depth = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    return SimpleNamespace(
        depth=depth,
        heads=heads,
        kv_heads=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        head_size=2 * draw(st.integers(1, 8)),
        width=heads * draw(st.integers(2, 12)),  # transformers requires a multiple
        inner=draw(st.integers(4, 96)),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tied=draw(st.booleans()),
        dtype=dtype,
        grain=draw(st.sampled_from(GRAINS)),
        exits=draw(st.sets(st.integers(1, depth - 1))) if depth > 1 else set(),
        translator_rank=draw(st.integers(0, 3)),
        correction_rank=draw(st.sampled_from([None, None, 0, 2])),
        protected=draw(st.integers(0, 3)),
        capacity=draw(st.integers(50, 99)) / 100,
        skips_head=dtype == torch.float32 and draw(st.booleans()),  # in bf16 a channel of the preview may flip as well
        lora=draw(st.sampled_from([False, False, False, True])),
        batch=draw(st.integers(1, 4)),
        tokens=draw(st.integers(2, 12)),
        side=draw(st.sampled_from(["left", "right"])),
        threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**16)),
    )


def run(count: int, check=None) -> None:
    """``count`` cases of ``check``, by default `equal`, the same on every run; one that fails is shrunk and raised."""

    @hypothesis.seed(0)
    @settings(max_examples=count, database=None, deadline=None, report_multiple_bugs=False,
              suppress_health_check=[*HealthCheck])  # fmt: skip
    @given(drawn())
    def cases(case):
        (check or equal)(case)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            for expected in ("token grain", "Initializing zero-element", "weights of the base", ".*below the lowest"):
                warnings.filterwarnings("ignore", expected)
            cases()
    finally:
        torch.set_num_threads(threads)


def llama(case: SimpleNamespace) -> Base:
    """A base of this shape, with random weights."""
    config = LlamaConfig(
        num_hidden_layers=case.depth, hidden_size=case.width, intermediate_size=case.inner, vocab_size=260,
        num_attention_heads=case.heads, num_key_value_heads=case.kv_heads, head_dim=case.head_size,
        attention_bias=case.attention_bias, mlp_bias=case.mlp_bias, tie_word_embeddings=case.tied,
        bos_token_id=256, eos_token_id=257, pad_token_id=258, max_position_embeddings=64, attn_implementation="sdpa",
    )  # fmt: skip
    draws, lm = np.random.default_rng(case.seed), LlamaForCausalLM(config)
    for name, p in lm.named_parameters():
        scale = 0.1 if p.dim() == 1 else p.shape[1] ** -0.5
        p.copy_(torch.from_numpy(draws.normal(size=tuple(p.shape)) * scale + ("norm" in name)))
    lm.requires_grad_(False).eval()
    identity, rotary = fingerprint(lm), lm.model.rotary_emb
    lm.to(case.dtype).config.dtype = case.dtype
    rotary.float().__init__(config)  # frequencies stay fp32, as in a base loaded in bf16
    return Base(lm, TOKENIZER, identity, "drawn")


def adaptive(case: SimpleNamespace, base: Base) -> HierarchicalTransformer:
    """Random routers, gates and corrections, and thresholds that skip about a third."""
    shape = {"translator_rank": min(case.translator_rank, case.width), "protected_tokens": case.protected}
    rank = None if case.correction_rank is None else min(case.correction_rank, case.width)
    hat = skipping(case.grain, base, tuple(sorted(case.exits)), bar=0.6, correction_rank=rank, **shape)
    if case.skips_head:
        tables = {"head_thresholds": [2.0, 0.0], "head_margins": [2.0, 9.0], "head_shares": [0.5, 1.0]}
        hat.calibration = replace(hat.calibration, **tables)
    hat.capacity = case.capacity
    return hat


def equal(case: SimpleNamespace, base: Base | None = None) -> None:
    """Raise AssertionError unless every equality holds, on ``base`` or on a Llama of the case's shape."""
    base, draws = base or llama(case), np.random.default_rng(case.seed + 1)
    ids = torch.from_numpy(draws.integers(0, 256, (case.batch, case.tokens)))
    expected, frozen = base.model(ids).logits, exact_hash(base.model)

    tolerance = TOLERANCE[case.dtype]

    def close(a, b, what, tips=0):
        assert a.shape == b.shape and a.isfinite().all(), what
        off = (a.float() - b.float()).abs() > tolerance * max(1.0, float(b.abs().max()))
        assert off.any(-1).sum() <= tips, f"{what}: {int(off.sum())} logits differ"

    hat = adaptive(case, base)
    tips = 1 if case.skips_head else 0
    with hat.dense():
        close(hat.lm(ids).logits, expected, "dense = base")
    with hat.at(1.0, 0.0):
        close(hat.lm(ids).logits, expected, "capacity 1 = base")

    with TemporaryDirectory() as folder:
        before, point = hat.lm(ids).logits, (hat.capacity, hat.exit_rate)
        hat.save_pretrained(Path(folder, "saved"))
        assert exact_hash(hat.unload().model) == frozen, "the base changed"
        assert not any("forward" in vars(m) for m in base.model.modules()), "a forward is left"
        hat = HierarchicalTransformer.from_pretrained(Path(folder, "saved"), base)
    hat.capacity, hat.exit_rate = point
    assert torch.equal(hat.lm(ids).logits, before), "saved = loaded"

    if case.lora:
        tune(hat.lm, case.seed)
    with hat.record(), hat.reference():
        parallel, state = hat.lm(ids).logits, hat.trace
    masks = state.masks
    if case.dtype == torch.bfloat16:
        # Some of these models magnify rounding: allow twice the distance of this pass from fp32.
        hat.to(torch.float32)
        with hat.reference(), hat.force(masks):
            exact = hat.lm(ids).logits
        hat.to(torch.bfloat16)
        tolerance = max(tolerance, 2 * float((parallel - exact).abs().max()) / max(1.0, float(parallel.abs().max())))

    for path in (hat.reference, nullcontext):
        for rows in (slice(None), slice(0, 1)):
            some = masks.map(lambda m, rows=rows: m[rows])
            with path(), hat.force(some), hat.collect() as states:
                close(stepwise(hat, ids[rows]), parallel[rows], f"decode = parallel, {path.__name__}", tips)
            assert torch.equal(Trace.cat(states).exit_layer, state.exit_layer[rows]), "exits, step by step"
            close(Trace.cat(states).share, state.share[:, rows], "shares, step by step")
    with hat.force(masks), hat.changed(compact=False):
        close(hat.lm(ids).logits, parallel, "compact = masked", tips)

    if case.dtype == torch.float32:  # deciding by themselves: rows in which no decision flipped
        with hat.reference(), hat.collect() as theirs:
            slow = stepwise(hat, ids)
        with hat.collect() as ours:
            fast = stepwise(hat, ids)
        a, b = (Trace.cat(states).site_share for states in (ours, theirs))
        alike = (a - b).abs().amax((0, 1, 3)) < 1e-6
        close(fast[alike], slow[alike], "engine = reference path", tips)
    one = stepwise(hat, ids)
    if hat.trace.executed is not None:  # the engine ran it
        torch.set_num_threads(case.threads)
        assert torch.equal(one, stepwise(hat, ids)), "1 thread = several"
        torch.set_num_threads(1)

    at = case.tokens // 2
    changed = torch.cat((ids[:, :at], (ids[:, at:] + 17) % 256), 1)
    with hat.record(), hat.reference():
        hat.lm(changed)
    other = hat.trace.masks
    for where, mask in masks.keep.items():
        if where in other.keep:  # once all tokens have left, no layer runs
            share = (mask[:, :at] != other.keep[where][:, :at]).float().mean()
            assert share <= (0.01 if case.dtype == torch.float32 else 0.1), "the future decides about the past"
    close(_with_past(hat, masks, other, changed, at)[:, :at], parallel[:, :at], "the future changes the past", tips)

    lengths = draws.integers(1, case.tokens + 1, case.batch)
    _padded(hat, ids, lengths, case.side, lambda a, b: close(a, b, "alone = in a batch", tips))


def _with_past(hat, masks, other, ids, at):
    """The logits of ``ids``, whose first tokens decide as in ``masks`` and the others as in ``other``."""
    joined = type(masks)(
        {k: torch.cat((m[:, :at], other.keep.get(k, m)[:, at:]), 1) for k, m in masks.keep.items()},
        {k: torch.cat((m[:, :at], other.exits.get(k, m)[:, at:]), 1) for k, m in masks.exits.items()},
    )
    with hat.force(joined), hat.reference():
        return hat.lm(ids).logits


def _padded(hat, ids, lengths, side, close) -> None:
    """Each row alone and in a batch with padding."""
    width = ids.shape[1]
    batch, mask = torch.full_like(ids, 258), torch.zeros_like(ids)
    spans = [slice(width - n, width) if side == "left" else slice(0, n) for n in map(int, lengths)]
    for row, span in enumerate(spans):
        batch[row, span], mask[row, span] = ids[row, : lengths[row]], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with hat.record(), hat.reference():
        together, state = hat.lm(batch, attention_mask=mask, position_ids=positions).logits, hat.trace
    pads = mask == 0
    assert not state.share[:, pads].any() and (state.exit_layer[pads] == state.n_layers).all(), "a pad ran"
    for row, span in enumerate(spans):
        with hat.force(state.masks.map(lambda m, row=row, span=span: m[row : row + 1, span])):
            close(hat.lm(ids[row : row + 1, : lengths[row]]).logits[0], together[row, span])
        assert torch.equal(hat.trace.exit_layer[0], state.exit_layer[row, span]), "exits, alone and in a batch"
        assert torch.equal(hat.trace.protected[0], state.protected[row, span]), "protected, alone and in a batch"
