"""What the decode step reads and writes.

Axes: L layers, R rows (tokens run together), N rows whose logits are wanted, P threads, D hidden size, C inputs of a
product, H heads and G key/value heads of size h, F FFN width, E exits, V vocabulary. Arrays are float32 unless noted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy import ndarray

PARTIALS = 8
"""parts of a product's channels, whose sums are added in pairs whichever thread computes them"""
PIECE = 256
"""tokens of the vocabulary that a thread compares together"""
QKV, OUT, GATE_UP, DOWN, FFN = range(5)
"""indices into ``Rows.kept``"""


class Linear(NamedTuple):
    """One product of each layer."""

    weight: ndarray  # [L, C, out], transposed, in a format of `hat_lib.engine.weights`
    scale: ndarray  # [L, out], or no columns
    bias: ndarray  # [L, out], or no columns


class Weights(NamedTuple):
    """The base."""

    embed: ndarray  # [V, D], as the base has it
    head: ndarray  # [V, D], as the base has it or in eight bits
    head_scale: ndarray  # [V], or empty
    preview: ndarray  # [D, V], the head's weights transposed; no columns without a shortlist
    qkv: Linear
    o: Linear
    gate_up: Linear  # outputs alternate: `block` gates, then the ups of the same neurons
    down: Linear
    norms: ndarray  # [2, L, D], before attention and before the FFN
    last_norm: ndarray  # [D]
    heads: int
    kv_heads: int
    unit: int  # channels that share a scale and are not split between threads
    block: int
    eps: np.float32


class Decisions(NamedTuple):
    """What runs."""

    # [L, C]: a channel is kept if its magnitude is above its threshold; always, if that is negative
    qkv_threshold: ndarray
    o_threshold: ndarray
    gate_up_threshold: ndarray
    down_threshold: ndarray
    # exp(-(w.x + b)) multiplies a token's thresholds in a layer
    sensitivity: ndarray  # [L, D], or no columns
    sensitivity_bias: ndarray  # [L]
    # token grain: the FFN runs if w.x is above the threshold
    ffn: ndarray  # [L, D], or no columns
    ffn_threshold: ndarray  # [L, 1], or one for each row, [L, R]
    # what a row gets in place of an FFN that it skips; no layers if nothing
    correction_down: ndarray  # [L, rank, D]
    correction_up: ndarray  # [L, D, rank]
    correction_shift: ndarray  # [L, D]
    exit: ndarray  # int64 [L], which exit comes before a layer, or -1
    gate: ndarray  # [E, D], weights of leaving minus those of staying
    gate_threshold: ndarray  # [E, 1], or one for each row, [E, R]
    # a leaving token's state is translated
    scale: ndarray  # [E, D]
    shift: ndarray  # [E, D]
    reduce: ndarray  # [E, rank, D]
    expand: ndarray  # [E, D, rank]
    head_threshold: ndarray  # [D], for channels of the preview; empty to read the head in full
    margin: np.float32  # a logit is read in full if its preview is within this margin of the best


class Rows(NamedTuple):
    """The tokens, and where results go."""

    ids: ndarray  # int64 [R]
    sequence: ndarray  # int64 [R], whose cache
    slot: ndarray  # int64 [R], position in the cache
    first: ndarray  # int64 [R], the first position that the token sees
    protected: ndarray  # bool [R]
    scale: ndarray  # [R], factor on a row's thresholds
    cos: ndarray  # [R, h/2]
    sin: ndarray
    logit_rows: ndarray  # int64 [N], the rows for which the head runs
    # written to:
    keys: ndarray  # [L, B, G, size, h], in the base's dtype
    values: ndarray
    kept: ndarray  # int32 [P, L, 5, R], summed over threads: channels kept at each product, and 1 where the FFN ran
    exits: ndarray  # int64 [R], layers that each token ran
    head: ndarray  # int32 [P, 2, N], summed over threads: channels of the preview, and logits read in full
    logits: ndarray  # [N, V], in the base's dtype: torch would convert them with threads that spin on beside ours


class Scratch(NamedTuple):
    """Working memory."""

    h: ndarray  # [P, R, D]
    x: ndarray  # [P, R, D]
    qkv: ndarray  # [R, (H + 2G) h]
    mixed: ndarray  # [R, H h]
    partials: ndarray  # [2, PARTIALS, R, D], of narrow products, used alternately
    gate_up: ndarray  # [R, 2F], in blocks like the weights
    ffn: ndarray  # [R, F]
    index: ndarray  # uint64 [P, C + 8 PARTIALS]
    gathered: ndarray  # [P, R, C + 8 PARTIALS]
    ends: ndarray  # int64 [P, PARTIALS], where each part ends in the two above
    candidates: ndarray  # int64 [P, PIECE], tokens of the vocabulary
    queries: ndarray  # [P, H / G, h]
    scores: ndarray  # [P, H / G, size + 8]
    positions: ndarray  # uint64 [P, size + 8]: 0, 1, 2 ...
    scale: ndarray  # [P, R], factor on the thresholds of each row in a layer
    flags: ndarray  # bool [P, 5, R], see decode_step
    uncounted: ndarray  # int32 [P, R], for counts that another thread keeps
    small: ndarray  # [P, rank]
    preview: ndarray  # [R, V], or empty
    best: ndarray  # [P, R], best of the previews that each thread made
