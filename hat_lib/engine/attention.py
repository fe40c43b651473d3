"""Attention of a few tokens over the context in the cache, in pieces of `PIECE` tokens.

A piece of a row's context, for the queries that share a key head, is a thread's work. Each leaves its maximum, sum and
weighted values, and whoever needs a head's output combines those of its pieces, in their order (online softmax, Milakov
and Gimelshein 2018, arXiv:1805.02867). So threads share the work evenly, and their number does not change a bit.
"""

from __future__ import annotations

import numpy as np

from hat_lib.engine.compiling import compiled
from hat_lib.engine.kernels import F0, F1, LANES, add_eight, as_float, as_stored, dot, exp
from hat_lib.engine.operations import largest

PIECE = 32
"""tokens of the context"""


@compiled()
def pieces(rows, r):
    """Number of pieces that row r sees."""
    return (rows.slot[r] - rows.first[r]) // PIECE + 1


@compiled()
def rotate(head, cos, sin, out):
    """Rotary position embedding of one head, rounded to the dtype of ``out``."""
    half = cos.shape[0]
    for e in range(half):
        a, b = head[e], head[half + e]
        out[e] = as_stored(a * cos[e] - b * sin[e], out[e])
        out[half + e] = as_stored(b * cos[e] + a * sin[e], out[e])


@compiled()
def put(rows, qkv, layer, r, g, heads, groups):
    """Put a row's key and value of a group into the cache."""
    keys, values = rows.keys[layer, rows.sequence[r], g], rows.values[layer, rows.sequence[r], g]
    states, slot, position = qkv[r].reshape(-1, keys.shape[1]), rows.slot[r], rows.position[r]
    rotate(states[heads + g], rows.cos[position], rows.sin[position], keys[slot])
    for e in range(keys.shape[1]):
        values[slot, e] = as_stored(states[heads + groups + g, e], values[slot, e])


@compiled(reorder=True)
def attend(rows, scratch, t, layer, r, g, groups, piece):
    """A piece of row r's context, for the queries of group g. Values are added eight at a time, the last eight filled
    up with some times 0."""
    keys, values = rows.keys[layer, rows.sequence[r], g], rows.values[layer, rows.sequence[r], g]
    size, position = keys.shape[1], rows.position[r]
    first = rows.first[r] + piece * PIECE
    last = min(first + PIECE - 1, rows.slot[r])
    heads, q, scores, places = (
        scratch.qkv[r].reshape(-1, size),
        scratch.queries[t],
        scratch.scores[t],
        scratch.places[t],
    )
    count, factor = q.shape[0], F1 / np.sqrt(np.float32(size))
    out = scratch.pieces[r, piece]
    for i in range(count):
        rotate(heads[g * count + i], rows.cos[position], rows.sin[position], q[i])
    n = last - first + 1
    for s in range(n):
        key = keys[first + s]
        for i in range(count):
            scores[i, s] = dot(key, q[i]) * factor
        places[s] = first + s
    for s in range(n, (n + 7) // 8 * 8):
        places[s], scores[:, s] = last, F0
    mixed = out[g * count : (g + 1) * count]
    for i in range(count):
        row, total = scores[i, :n], F0
        top = largest(row)
        for s in range(n):
            row[s] = exp(row[s] - top)
            total += row[s]
        scratch.tops[r, piece, g * count + i], scratch.totals[r, piece, g * count + i] = top, total
    mixed[:] = F0
    for s in range(0, n, 8):
        for e in range(0, size - size % LANES, LANES):
            add_eight(values, places, s, scores, mixed, e)
    for i in range(count):
        for e in range(size - size % LANES, size):
            for s in range(n):
                mixed[i, e] += scores[i, s] * as_float(values[first + s, e])


@compiled()
def combine(scratch, t, r, n, c0, c1):
    """The output of row r's heads to which channels c0 to c1 belong, from its n pieces."""
    heads, size = scratch.pieces.shape[2], scratch.pieces.shape[3]
    mixed = scratch.mixed[t, r].reshape(-1, size)
    for head in range(c0 // size, min((c1 + size - 1) // size, heads)):
        top, total = scratch.tops[r, 0, head], F0
        for piece in range(1, n):
            top = max(top, scratch.tops[r, piece, head])
        for piece in range(n):
            total += scratch.totals[r, piece, head] * exp(scratch.tops[r, piece, head] - top)
        out = mixed[head]
        for piece in range(n):
            factor, part = exp(scratch.tops[r, piece, head] - top) / total, scratch.pieces[r, piece, head]
            for e in range(size):
                out[e] = part[e] * factor if piece == 0 else out[e] + part[e] * factor
