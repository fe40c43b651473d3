"""What the engine reads and writes.

Axes: L layers, R rows (tokens run together), N rows whose logits are wanted, S steps, P threads, D hidden size, C
inputs of a product, r rank of corrections, H heads and G key/value heads of size h, F FFN width, E exits, V vocabulary.
Arrays are float32 unless noted; "stored" ones are in the base's dtype, bfloat16 as its bits, uint16.
"""

from collections import namedtuple
from typing import NamedTuple

import numpy as np
from numpy import ndarray

PARTIALS = 8
"""parts of a product's channels, whose sums are added in pairs whichever thread computes them"""
SECTION = 256
"""tokens of the vocabulary that a thread compares together"""
MAX_TOKENS = 8
"""in one step"""
GROUP, GROUP_ROWS = 32, 38
"""in four bits: channels that share a scale, and rows of memory that they and their scales take"""
BLOCK = 16
"""channels whose inputs share a scale, where inputs are rounded to eight bits"""
TILE = 128
"""outputs that are not split between threads, if they are enough"""
MIDDLE, OFFSET = 8, 2
"""in four bits: what is taken from codes, and the power of two that is the unit of offsets"""
QKV, OUT, GATE_UP, DOWN, FFN = range(5)
"""indices into ``Course.kept``"""


class Linear(NamedTuple):
    """One product of each layer."""

    weight: ndarray  #: [L, C, out or more], transposed, in a format of `hat_lib.engine.weights`
    scale: ndarray  #: [L, out], or no columns
    bias: ndarray  #: [L, out], or no columns
    unit: ndarray  #: [L, C], magnitude of an input whose score is 1
    # A correction adds strength * (expand^T (reduce x) + shift), for the channels x that are kept.
    # Stored, or in bfloat16 beside weights of fewer bits; no rows without corrections.
    reduce: ndarray  #: [L, r, C]
    expand: ndarray  #: [L, r + 1, out], shift last
    split: int  #: channels that share a scale and are not split between threads


Product = namedtuple("Product", (*Linear._fields, "strength"))
"""a `Linear` of one layer, without the first axis, and the strength of its correction"""


class Gates(NamedTuple):
    """Where and when a token leaves, and how its state is then translated."""

    before: ndarray  #: int64 [L], which gate comes before a layer, or -1
    router: ndarray  #: [E, D + 1], weights of leaving minus those of staying, and bias
    scale: ndarray  #: [E, D]
    shift: ndarray  #: [E, D]
    reduce: ndarray  #: [E, rank, D]
    expand: ndarray  #: [E, D, rank]


class StandIn(NamedTuple):
    """What a token gets in place of an FFN that it skips, in all layers but the first; no layers if nothing."""

    down: ndarray  #: [L - 1, rank, D]
    up: ndarray  #: [L - 1, D, rank]
    shift: ndarray  #: [L - 1, D]


class Weights(NamedTuple):
    """The base, with routers and gates."""

    embed: ndarray  #: [V, D], as the base has it
    head: ndarray  #: [V, D], as the base has it or in eight bits
    head_scale: ndarray  #: float16 [V, D / 32] as its bits, int16, of eight bits; or no columns
    head_unit: ndarray  #: [D], like `Linear.unit`, of the preview
    preview: ndarray  #: [D, V or more], the head's weights transposed, or in four bits; no columns without a shortlist
    preview_scale: ndarray  #: [V or more], or empty
    qkv: Linear
    o: Linear
    gate_up: Linear  #: outputs alternate: `block` gates, then the ups of the same neurons
    down: Linear
    sensitivity: ndarray  #: [L, D + 1], weights and bias of tokens' sensitivity; or no columns
    ffn: ndarray  #: [L, D + 1], token grain: of the router of the whole FFN; or no columns
    stand_in: StandIn
    gates: Gates
    norms: ndarray  #: [2, L, D], before attention and before the FFN
    last_norm: ndarray  #: [D]
    head_norms: ndarray  #: [2, L, h], of queries and of keys; or no columns
    rotates: ndarray  #: bool [L], whether a layer has a rotary embedding
    heads: int
    kv_heads: int
    block: int
    eps: np.float32


class Thread(NamedTuple):
    """One of the threads that run a step together."""

    t: int
    team: int  #: how many they are
    barrier: ndarray  #: of `hat_lib.engine.team`


class Inputs(NamedTuple):
    """What a product reads: a row keeps a channel if its magnitude is above ``unit * bar``, or if it is NaN."""

    x: ndarray  #: [R, C]
    bar: ndarray  #: [R], -inf to keep all
    runs: ndarray  #: bool [R], whether a row runs at all; not read for a single row


class Gathered(NamedTuple):
    """The channels that any row keeps, of one thread."""

    index: ndarray  #: uint64 [C + 8 PARTIALS]
    values: ndarray  #: [R, C + 8 PARTIALS]
    ends: ndarray  #: int64 [PARTIALS], where each part ends in both
    rows: ndarray  #: uint64 [2 C + 8 PARTIALS], for products in integers to work in


class Rows(NamedTuple):
    """The tokens of a step, and where results go."""

    ids: ndarray  #: int64 [R]
    sequence: ndarray  #: int64 [R], whose cache
    slot: ndarray  #: int64 [R], position in the cache
    first: ndarray  #: int64 [R], the first position that the token sees
    position: ndarray  #: int64 [R], of the rotary embedding
    protected: ndarray  #: bool [R]
    scale: ndarray  #: [R], factor on a row's thresholds
    logit_rows: ndarray  #: int64 [N], the rows for which the head runs
    angles: ndarray  #: [2, 1 + positions, h/2], cos and sin: first those of a layer that does not rotate
    # written to:
    keys: ndarray  #: [L, B, G, size, h], stored
    values: ndarray
    logits: ndarray  #: [N, V], stored: torch would convert them with threads that spin on beside ours


class Choice(NamedTuple):
    """How the next token follows from the logits, as transformers' logits processors and samplers do it."""

    given: ndarray  #: int64 [S, R], the tokens of a text that is known; no rows to choose them
    sample: bool  #: else the likeliest
    penalty: np.float32  #: of tokens that are in the text already; 1 for none
    temperature: np.float32
    top_k: int  #: 0 for all
    top_p: np.float32  #: 1 for all
    min_p: np.float32  #: 0 for all
    uniform: ndarray  #: float64 [S, R] in [0, 1), one a draw; no rows if greedy
    seen: ndarray  #: bool [R, V], which tokens are in the text; no columns without a penalty
    stops: ndarray  #: int64, the tokens that end a text
    earliest: int  #: step before which a text may not end
    pad: int  #: what follows the end


GREEDY = Choice(
    given=np.zeros((0, 0), np.int64), sample=False, penalty=np.float32(1), temperature=np.float32(1), top_k=0,
    top_p=np.float32(1), min_p=np.float32(0), uniform=np.zeros((0, 0)), seen=np.zeros((0, 0), bool),
    stops=np.zeros(0, np.int64), earliest=0, pad=0,
)  # fmt: skip


class Steering(NamedTuple):
    """Thresholds that move (`hat_lib.decoding.steering`): they are multiplied by exp(offset)."""

    offset: ndarray  #: [R]; moved
    gain: np.float32  #: 0 for none
    asked: np.float32  #: share of a token's routable work
    limit: np.float32
    shares: ndarray  #: [4], work that one channel of each product stands for, of all that is routable
    head: ndarray  #: [2], the same of a channel of the preview, and of a logit read in full


STILL = Steering(np.zeros(MAX_TOKENS, np.float32), *np.zeros(3, np.float32), np.zeros(FFN, np.float32),
                 np.zeros(2, np.float32))  # fmt: skip


class Course(NamedTuple):
    """The steps of a call: one of several tokens, or several of one token a sequence."""

    steps: int
    choice: Choice
    steering: Steering
    unprotected: ndarray  #: int64 [R], the step from which a row is no longer protected
    # written to:
    ended: ndarray  #: bool [R], whether a text has ended
    ids: ndarray  #: int64 [S, R], tokens chosen; no rows if logits are wanted and nothing else
    offsets: ndarray  #: [S, R], of steering after each
    kept: ndarray  #: int32 [S, P, L, 5, R], summed over threads: channels kept at each product, 1 where the FFN ran
    exits: ndarray  #: int64 [S, R], layers that each token ran
    head: ndarray  #: int32 [S, P, 2, N], summed over threads: channels of the preview, and logits read in full
    logits: ndarray  #: [S or 0, R, V], stored, if they are wanted
    ran: ndarray  #: int64 [1], steps until all texts had ended; or, negative, why the call was broken off


class Shared(NamedTuple):
    """Working memory that threads share."""

    qkv: ndarray  #: [PARTIALS, R, (H + 2G) h], sums of q, k and v by parts of the channels
    states: ndarray  #: [2, PARTIALS, R, D], of o and down
    lowered: ndarray  #: [4, PARTIALS, R, r], inputs of the corrections of each product
    gate_up: ndarray  #: [R, 2F], in blocks like the weights
    ffn: ndarray  #: [R, F]
    tops: ndarray  #: [R, pieces, H], of each piece of a row's context the largest score,
    totals: ndarray  #: [R, pieces, H], the sum of exp(score - largest),
    pieces: ndarray  #: [R, pieces, H, h], and the sum of so weighted values
    preview: ndarray  #: [R, V or more], or empty
    candidates: ndarray  #: int64 [P, V], of a thread's shortlist
    best: ndarray  #: [P, R], best of the previews, or of the logits, that each thread made
    likeliest: ndarray  #: int64 [P, R], in its share of the vocabulary
