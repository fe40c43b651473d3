"""The head: logits of the whole vocabulary, or of the tokens that a preview finds likely (`hat_lib.method.head`).

Weights are the base's own, ``[V, D]``, or in eight bits with a float16 for each 32 channels. These are multiplied by
inputs in sixteen bits, of one scale: 32 products and their sum are integers.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from hat_lib.engine.arrays import GROUP, SECTION, TILE, Inputs
from hat_lib.engine.compiling import compiled
from hat_lib.engine.integers import add, dot_pairs
from hat_lib.engine.kernels import F0, LEAST, as_stored, dot, fetch, keep, span
from hat_lib.engine.operations import largest
from hat_lib.engine.team import meet
from hat_lib.engine.vectors import F32, I8, I16, I32, add_product, call, data, load, splat, vector

SOON = 8
"""how many rows ahead to prefetch"""


@compiled()
def all_logits(thread, base, x, logits):
    """Logits ``[N, V]`` of normed states ``x [N, D]``, from all channels. Returns what `meet` does."""
    vocabulary = base.head.shape[0]
    v0, v1 = span(vocabulary, thread.t, thread.team, TILE), span(vocabulary, thread.t + 1, thread.team, TILE)
    dots(base.head, base.head_scale, x, logits, v0, v1)
    return meet(thread.barrier, thread.team)


@compiled()
def likely_logits(thread, base, thresholds, x, gathered, logits, shared, counts):
    """Logits as by `all_logits` of likely tokens, and previews of others.

    Notes in ``counts [2, N]`` how many channels the previews read, and how many logits this thread reads in full.
    """
    (t, team, barrier), count, vocabulary = thread, x.shape[0], base.head.shape[0]
    bars, every_row = np.full(count, thresholds.head, np.float32), np.ones(count, np.bool_)
    read = counts[0] if t == 0 else np.zeros(count, np.int32)
    n = keep(Inputs(x, bars, every_row), base.head_unit, 0, x.shape[1], gathered, read)
    v0, v1 = span(vocabulary, t, team, TILE), span(vocabulary, t + 1, team, TILE)
    end = shared.preview.shape[1] if v1 == vocabulary else v1  # tiles are whole
    if v0 < v1:
        add(base.preview, gathered, 0, n, n, shared.preview[:count], v0, end)
    for r in range(count):
        preview = shared.preview[r]
        if base.preview_scale.shape[0]:
            for v in range(v0, v1):
                preview[v] *= base.preview_scale[v]
        shared.best[t, r] = largest(preview[v0:v1]) if v0 < v1 else LEAST
    if meet(barrier, team):
        return True
    inputs = as_inputs(base.head, x)
    for r in range(count):
        floor, row = largest(shared.best[:team, r]) - thresholds.margin, shared.preview[r]
        counts[1, r] = shortlist(thread, base, inputs, r, row, floor, logits[r], shared.candidates[t])
    return meet(barrier, team)


@compiled()
def dots(head, scale, x, y, v0, v1):
    """``y[r, v] = head[v] . x[r]`` for v from v0 to v1, rounded to the dtype of y."""
    inputs = as_inputs(head, x)
    for v in range(v0, v1):
        row, factors = head[v], scale[v]
        for r in range(x.shape[0]):
            y[r, v] = as_stored(dot_scaled(row, factors, inputs, r), y[r, v])


@compiled()
def round_into(values, out):
    for i in range(values.shape[0]):
        out[i] = as_stored(values[i], out[i])


@compiled()
def shortlist(thread, base, inputs, r, preview, floor, logits, candidates):
    """This thread's logits ``[V]`` of row r: previews, and in full those that reach ``floor``; returns how many do.

    Threads take pieces in turn: likely tokens have low ids, and one thread would have most of them. ``candidates [V]``
    is to work in.
    """
    n, vocabulary, head, scale = 0, logits.shape[0], base.head, base.head_scale
    for v0 in range(thread.t * SECTION, vocabulary, thread.team * SECTION):
        v1 = min(v0 + SECTION, vocabulary)
        piece = preview[v0:v1]
        round_into(piece, logits[v0:v1])
        if not largest(piece) < floor:
            for i in range(piece.shape[0]):
                candidates[n] = v0 + i
                n += piece[i] >= floor
    for k in range(n):
        if k + SOON < n:
            fetch(head[candidates[k + SOON]], 0, head.shape[1])
            fetch(scale[candidates[k + SOON]], 0, scale.shape[1])
        v = candidates[k]
        logits[v] = as_stored(dot_scaled(head[v], scale[v], inputs, r), logits[v])
    return n


def as_inputs(head, x):
    """What `dot_scaled` multiplies the head by: ``x [N, D]``; for weights in int8 codes and a unit of each row, with
    ``x ~ unit * codes``, codes in sixteen bits. The unit is NaN if there is NaN or infinity. In compiled code."""


def dot_scaled(w, scale, inputs, r):
    """``w . x[r]`` for a row of the head, with the bits of a float16 for each 32 channels of int8. In compiled code."""


@overload(as_inputs)
def _as_inputs(head, x):
    return rounded if head.dtype == types.int8 else lambda head, x: x


def rounded(head, x):
    codes, units = np.zeros(x.shape, np.int16), np.empty(x.shape[0], np.float32)
    for r in range(x.shape[0]):
        top = F0
        for value in x[r]:
            top = max(top, abs(value)) if abs(value) < np.inf else np.float32(np.nan)
        units[r] = max(top, np.float32(1e-30)) / np.float32(32767)
        for i in range(x.shape[1] if top == top else 0):
            codes[r, i] = np.int16(np.rint(x[r, i] / units[r]))
    return codes, units


@overload(dot_scaled)
def _dot_scaled(w, scale, inputs, r):
    if w.dtype == types.int8:
        return lambda w, scale, inputs, r: dot_eight(w, scale, inputs[0][r]) * np.float32(2.0**112) * inputs[1][r]
    return lambda w, scale, inputs, r: dot(w, inputs[r])


@intrinsic
def dot_eight(context, w, scale, codes):
    """The sum over groups of ``scale * (w . codes)``, times ``2 ** -112``."""

    def build(inner, b, signature, args):
        words, scales, inputs = data(inner, b, signature.args, args)
        (groups,) = cgutils.unpack_tuple(b, cgutils.create_struct_proxy(scale)(inner, b, args[1]).shape)
        total = cgutils.alloca_once_value(b, ir.Constant(vector(F32, GROUP // 2), None))
        with cgutils.for_range(b, groups) as loop:
            at = [b.mul(loop.index, groups.type(GROUP))]
            weights = b.sext(load(b, b.gep(words, at), I8, GROUP), vector(I16, GROUP))
            s = b.sitofp(dot_pairs(b, weights, load(b, b.gep(inputs, at), I16, GROUP)), vector(F32, GROUP // 2))
            # The bits of a float16 that is not negative, as those of a float32, are 2 ** 112 times too small.
            bits = b.shl(b.zext(b.load(b.gep(scales, [loop.index])), I32), I32(13))
            b.store(add_product(b, b.load(total), s, splat(b, b.bitcast(bits, F32), GROUP // 2)), total)
        name = f"vector.reduce.fadd.v{GROUP // 2}f32"
        return call(b, name, F32, F32(0), b.load(total), fastmath=("reassoc",))

    return types.float32(w, scale, codes), build
