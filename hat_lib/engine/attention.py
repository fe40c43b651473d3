"""Attention of a few tokens over the context in the cache, in pieces of `PIECE` tokens.

A piece of a row's context, for the queries that share a key head, is a thread's work. Each leaves its maximum, sum and
weighted values, and whoever needs a head's output combines those of its pieces, in their order (online softmax, Milakov
and Gimelshein 2018, arXiv:1805.02867). So threads share the work evenly, and their number does not change a bit.
"""

import numpy as np

from hat_lib.engine.compiling import compiled
from hat_lib.engine.kernels import F0, F1, LANES, add_eight, as_float, as_stored, dot, exp, fetch
from hat_lib.engine.operations import largest

PIECE = 32
"""tokens of the context"""
LOWEST = np.finfo(np.float32).min


@compiled()
def pieces(rows, r):
    """Number of pieces of a row's context."""
    return (rows.slot[r] - rows.first[r]) // PIECE + 1


@compiled()
def place(head, norm, eps, cos, sin, out):
    """The norm of one head, if there is one, and its rotary position embedding, rounded to the dtype of ``out``."""
    half, factor = cos.shape[0], F1
    if norm.shape[0]:
        total = F0
        for e in range(2 * half):
            total += head[e] * head[e]
        factor /= np.sqrt(total / np.float32(2 * half) + eps)
    for e in range(half):
        a, b = head[e], head[half + e]
        if norm.shape[0]:
            a, b = a * factor * norm[e], b * factor * norm[half + e]
        out[e] = as_stored(a * cos[e] - b * sin[e], out[e])
        out[half + e] = as_stored(b * cos[e] + a * sin[e], out[e])


@compiled()
def place_queries(base, rows, layer, r, those, qkv, queries):
    """Some of a row's queries ``[H, h]``."""
    size, angle, norm = queries.shape[1], rows.position[r] + 1 if base.rotates[layer] else 0, base.head_norms[0, layer]
    for head in range(those.start, those.stop):
        q = qkv[head * size : (head + 1) * size]
        place(q, norm, base.eps, rows.angles[0, angle], rows.angles[1, angle], queries[head])


@compiled()
def place_keys(base, rows, layer, r, g, qkv):
    """A row's key and value of one head, in the cache."""
    sequence, slot = rows.sequence[r], rows.slot[r]
    key, value = rows.keys[layer, sequence, g, slot], rows.values[layer, sequence, g, slot]
    size, angle = key.shape[0], rows.position[r] + 1 if base.rotates[layer] else 0
    k, v = (base.heads + g) * size, (base.heads + base.kv_heads + g) * size
    norm = base.head_norms[1, layer]
    place(qkv[k : k + size], norm, base.eps, rows.angles[0, angle], rows.angles[1, angle], key)
    for e in range(size):
        value[e] = as_stored(qkv[v + e], value[e])


@compiled(reorder=True)
def attend(q, keys, values, first, last, gathered, parts):
    """The piece of a context that begins at ``first``, for queries that share a key head.

    Values are added eight at a time, the last eight filled up with some times 0.

    Args:
        q: ``[n, h]``.
        keys, values: ``[size, h]``, stored.
        last: the last token that the queries see; it may lie in a later piece.
        gathered: with space for ``[n, PIECE]``, to work in.
        parts: what `combine` reads, ``[n]``, ``[n]`` and ``[n, h]``.
    """
    (count, size), n = q.shape, min(PIECE, last - first + 1)
    places, scores, (tops, totals, out) = gathered.index, gathered.values, parts
    factor = F1 / np.sqrt(np.float32(size))
    for s in range(n):
        key = keys[first + s]
        fetch(values[first + s], 0, size)
        for i in range(count):
            scores[i, s] = dot(key, q[i]) * factor
        places[s] = first + s
    for s in range(n, (n + 7) // 8 * 8):
        places[s] = first
        for i in range(count):
            scores[i, s] = F0
    for i in range(count):
        row, total = scores[i, :n], F0
        top = max(largest(row), LOWEST)  # all may be -inf, which less itself is NaN
        for s in range(n):
            row[s] = exp(row[s] - top)
            total += row[s]
        tops[i], totals[i] = top, total
        for e in range(size):
            out[i, e] = F0
    for s in range(0, n, 8):
        if first + PIECE + s + 8 <= keys.shape[0]:
            for soon in range(first + PIECE + s, first + PIECE + s + 8):
                fetch(keys[soon], 0, size)
        for e in range(0, size - size % LANES, LANES):
            add_eight(values, places, s, scores, out, e)
    for i in range(count):
        for e in range(size - size % LANES, size):
            for s in range(n):
                out[i, e] += scores[i, s] * as_float(values[first + s, e])


@compiled()
def combine(shared, r, n, c0, c1, mixed):
    """The output of the heads to which channels c0 to c1 belong, from a row's n pieces."""
    tops, totals, parts = shared.tops[r], shared.totals[r], shared.pieces[r]
    _, heads, size = parts.shape
    for head in range(c0 // size, min((c1 + size - 1) // size, heads)):
        top, total = tops[0, head], F0
        for piece in range(1, n):
            top = max(top, tops[piece, head])
        for piece in range(n):
            total += totals[piece, head] * exp(tops[piece, head] - top)
        out = mixed[head * size : (head + 1) * size]
        for piece in range(n):
            factor, part = exp(tops[piece, head] - top) / total, parts[piece, head]
            for e in range(size):
                out[e] = part[e] * factor if piece == 0 else out[e] + part[e] * factor
