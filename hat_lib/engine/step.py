"""The decode step: from the ids of a few tokens to their logits, in one compiled function run by a team of threads.

It is the layer of `hat_lib.model.decoder_layer`, with the same decisions, for up to eight tokens (rows) of one or more
sequences. All threads run it together. Each keeps a hidden state of its own and computes norms and decisions itself,
which is quicker than telling the others; products are split, wide ones by outputs and narrow ones by channels,
attention by heads, and after each the threads meet. Arithmetic is in float32.

Axes of arrays: L layers, R rows, D hidden size, H heads and G key/value heads, each of size h, F FFN width, E exits,
V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from hat_lib.engine.compiling import compiled
from hat_lib.engine.four_bits import add
from hat_lib.engine.kernels import (
    F0,
    F1,
    LANES,
    LEAVES,
    add_eight_to_all,
    as_float,
    as_stored,
    dot,
    dots,
    exp,
    keep,
    prefetch_at,
    span,
)
from hat_lib.engine.team import meet

SENSITIVITY_LIMIT = np.float32(3)
"""same as `hat_lib.model.routers.SENSITIVITY_LIMIT`"""
PIECE = 256
"""tokens of the vocabulary that a thread looks at together"""
LOWEST = np.finfo(np.float32).min
"""best preview of a thread that has made none"""
QKV, OUT, GATE_UP, DOWN, FFN = range(5)
"""indices into ``Rows.kept``"""


class Weights(NamedTuple):
    """The base. Products' weights are transposed, ``[L, C, out]``, in one format (`hat_lib.engine.weights`)."""

    embed: ndarray
    """``[V, D]`` as the base has it"""
    head: ndarray
    """``[V, D]``, as the base has it or in eight bits"""
    head_scale: ndarray
    """float32 ``[V]``, or empty"""
    preview: ndarray
    """``[D, V]``: the head's weights once more, transposed; no columns if the head is never gated"""
    qkv: ndarray
    o: ndarray
    gate_up: ndarray
    down: ndarray
    qkv_scale: ndarray
    o_scale: ndarray
    gate_up_scale: ndarray
    down_scale: ndarray
    """float32 ``[L, out]``, or no columns"""
    qkv_bias: ndarray
    o_bias: ndarray
    gate_up_bias: ndarray
    down_bias: ndarray
    """float32 ``[L, out]``, or no columns"""
    norms: ndarray
    """float32 ``[2, L, D]``: before attention, before the FFN"""
    last_norm: ndarray
    """float32 ``[D]``"""
    heads: int
    kv_heads: int
    unit: int
    """number of channels that share a scale and are not split between threads"""
    block: int
    """outputs of ``gate_up`` alternate: this many gates, then the ups of the same neurons"""
    eps: np.float32


class Decisions(NamedTuple):
    """What runs. All float32 unless noted."""

    cut_qkv: ndarray
    cut_o: ndarray
    cut_gate_up: ndarray
    cut_down: ndarray
    """``[L, C]``: a channel is kept if its magnitude is above this; always, if this is negative"""
    sensitivity: ndarray
    """``[L, D]``, or no columns: exp(-(w.x + b)) multiplies a token's cuts in a layer"""
    sensitivity_bias: ndarray
    ffn: ndarray
    """``[L, D]``, or no columns: the token grain's routers"""
    ffn_cut: ndarray
    """``[L, 1]``, or one per row, ``[L, R]``: the FFN runs if w.x is above this"""
    instead_down: ndarray
    """``[L, rank, D]``"""
    instead_up: ndarray
    """``[L, D, rank]``"""
    instead_shift: ndarray
    """``[L, D]``; or no layers in all three: what a row gets in place of an FFN that it skips"""
    exit: ndarray
    """int64 ``[L]``: which gate comes before a layer, or -1"""
    gate: ndarray
    """``[E, D]``: leaving minus staying"""
    gate_cut: ndarray
    """``[E, 1]``, or one per row, ``[E, R]``"""
    scale: ndarray
    shift: ndarray
    """``[E, D]``"""
    reduce: ndarray
    """``[E, rank, D]``"""
    expand: ndarray
    """``[E, D, rank]``"""
    cut_head: ndarray
    """``[D]``, or empty: a channel is in the preview of the logits if its magnitude is above this"""
    margin: np.float32
    """a logit is read in full if its preview is within this margin of the best"""


class Rows(NamedTuple):
    """The tokens, and where results go; written to: keys and values, ``kept``, ``exits``, ``head``, ``logits``."""

    ids: ndarray
    """int64 ``[R]``"""
    sequence: ndarray
    slot: ndarray
    """int64 ``[R]``: whose cache, and which position in it"""
    first: ndarray
    """int64 ``[R]``: the first position that the token sees"""
    protected: ndarray
    """bool ``[R]``"""
    scale: ndarray
    """float32 ``[R]``: factor on all cuts of a row"""
    cos: ndarray
    sin: ndarray
    """float32 ``[R, h/2]``"""
    keys: ndarray
    values: ndarray
    """``[L, B, G, room, h]``, in the dtype of the base's cache"""
    kept: ndarray
    """int32 ``[P, L, 5, R]``, to be summed over threads: channels kept at each product, and 1 where the FFN ran"""
    exits: ndarray
    """int64 ``[R]``: layers that each token ran"""
    head: ndarray
    """int32 ``[P, 2, N]``, to be summed over threads: channels of the preview, and logits read in full"""
    read: ndarray
    """int64 ``[N]``: the rows whose logits are asked for; the head runs for no others"""
    logits: ndarray
    """``[N, V]``, in the dtype of the base: to convert it, torch would wake threads that go on spinning beside ours"""


class Scratch(NamedTuple):
    """Working memory for a team of P threads."""

    h: ndarray
    x: ndarray
    """``[P, R, D]``"""
    qkv: ndarray
    """``[R, (H + 2G) h]``"""
    mixed: ndarray
    """``[R, H h]``"""
    leaves: ndarray
    """``[2, LEAVES, R, D]``: the parts of narrow products, used alternately"""
    gate_up: ndarray
    """``[R, 2F]``, in blocks like the weights"""
    ffn: ndarray
    """``[R, F]``"""
    index: ndarray
    """uint64 ``[P, C + 8 LEAVES]``"""
    picked: ndarray
    """``[P, R, C + 8 LEAVES]``"""
    ends: ndarray
    """int64 ``[P, LEAVES]``: the end of each part in the two above"""
    words: ndarray
    """int64 ``[P, PIECE]``: tokens of the vocabulary"""
    queries: ndarray
    """``[P, H / G, h]``"""
    scores: ndarray
    """``[P, H / G, room + 8]``"""
    places: ndarray
    """uint64 ``[P, room + 8]``: 0, 1, 2 ..."""
    scale: ndarray
    """``[P, R]``: factor on the cuts of each row in a layer"""
    rows: ndarray
    """bool ``[P, 5, R]``: rows that have not left, whose FFN runs, that keep all channels, that keep all channels for
    K and V; and all rows"""
    unused: ndarray
    """int32 ``[P, R]``: for counts that another thread keeps"""
    small: ndarray
    """``[P, rank]``"""
    preview: ndarray
    """``[R, V]``, or empty"""
    best: ndarray
    """``[P, R]``: best of the previews that each thread made"""


@compiled()
def normed(h, weight, eps, out):
    """RMS norm of each row of ``h [R, D]``."""
    for r in range(h.shape[0]):
        row, to, s = h[r], out[r], mean_square(h[r])
        factor = F1 / np.sqrt(s + eps)
        for i in range(row.shape[0]):
            to[i] = row[i] * factor * weight[i]


@compiled(reorder=True)
def mean_square(x):
    s = F0
    for i in range(x.shape[0]):
        s += x[i] * x[i]
    return s / np.float32(x.shape[0])


@compiled(reorder=True)
def inner(a, b):
    s = F0
    for i in range(a.shape[0]):
        s += a[i] * b[i]
    return s


@compiled()
def finish(y, scale, bias, c0, c1):
    """Apply the outputs' scales, of weights in fewer bits, and biases, if there are any."""
    for r in range(y.shape[0]):
        if scale.shape[0]:
            for j in range(c0, c1):
                y[r, j] *= scale[j]
        if bias.shape[0]:
            for j in range(c0, c1):
                y[r, j] += bias[j]


@compiled()
def wide(w, scale, bias, index, picked, n, y, c0, c1):
    """Outputs c0 to c1 of a product, from all the kept channels."""
    add(w, index, picked, 0, n, n, y, c0, c1)
    finish(y, scale, bias, c0, c1)


@compiled()
def narrow(w, unit, x, cut, scale, whole, runs, index, picked, ends, kept, leaves, t, team):
    """This thread's share of a product whose channels are split: whole rows of the weight, in long pieces.

    The channels form `LEAVES` parts, whose sums are added in pairs: the same sum for any number of threads. A thread
    has an aligned run of them, a power of two in number, and leaves its own sum in the first.
    """
    channels, part, n = x.shape[1], LEAVES // team, 0
    for leaf in range(t * part, (t + 1) * part):
        first, last = span(channels, leaf, LEAVES, unit), span(channels, leaf + 1, LEAVES, unit)
        n = ends[leaf] = keep(x, first, last, cut, scale, whole, runs, index, picked, kept, n)
    start = 0
    for leaf in range(t * part, (t + 1) * part):
        add(w, index, picked, start, ends[leaf], n, leaves[leaf], 0, leaves.shape[2])
        start = ends[leaf]
    width = 1
    while width < part:
        for leaf in range(t * part, (t + 1) * part, 2 * width):
            for r in range(leaves.shape[1]):
                into, other = leaves[leaf, r], leaves[leaf + width, r]
                for i in range(into.shape[0]):
                    into[i] += other[i]
        width *= 2


@compiled()
def gather(leaves, team, scale, bias, runs, h):
    """Add what the threads left in ``leaves`` to the hidden state of the rows that run."""
    for r in range(h.shape[0]):
        if runs[r]:
            for i in range(h.shape[1]):
                if team == 1:
                    s = leaves[0, r, i]
                elif team == 2:
                    s = leaves[0, r, i] + leaves[4, r, i]
                elif team == 4:
                    s = (leaves[0, r, i] + leaves[2, r, i]) + (leaves[4, r, i] + leaves[6, r, i])
                else:
                    low = (leaves[0, r, i] + leaves[1, r, i]) + (leaves[2, r, i] + leaves[3, r, i])
                    s = low + ((leaves[4, r, i] + leaves[5, r, i]) + (leaves[6, r, i] + leaves[7, r, i]))
                if scale.shape[0]:
                    s *= scale[i]
                if bias.shape[0]:
                    s += bias[i]
                h[r, i] += s


@compiled()
def rotate(head, cos, sin, out):
    """Rotary position embedding of one head, rounded to the dtype of ``out``."""
    half = cos.shape[0]
    for e in range(half):
        a, b = head[e], head[half + e]
        out[e] = as_stored(a * cos[e] - b * sin[e], out[e])
        out[half + e] = as_stored(b * cos[e] + a * sin[e], out[e])


@compiled()
def exit_gate(decide, e, r, h, n, small):
    """Whether a row leaves at exit e; if so, its state is translated (`hat_lib.model.routers.ExitGate`)."""
    d = h.shape[0]
    factor = F1 / np.sqrt(mean_square(h) + np.float32(1.1920929e-07))
    for i in range(d):
        n[i] = h[i] * factor
    if not inner(n, decide.gate[e]) > decide.gate_cut[e, r % decide.gate_cut.shape[1]]:
        return False
    length = np.sqrt(mean_square(h) * np.float32(d))
    for k in range(decide.reduce.shape[1]):
        small[k] = inner(n, decide.reduce[e, k])
    for i in range(d):
        change = decide.scale[e, i] * n[i] + decide.shift[e, i]
        for k in range(decide.reduce.shape[1]):
            change += small[k] * decide.expand[e, i, k]
        h[i] += length * change
    return True


@compiled()
def stand_in(decide, layer, x, h, small):
    """Add to ``h`` what stands in for the FFN of ``x``."""
    rank = decide.instead_down.shape[1]
    for k in range(rank):
        small[k] = inner(x, decide.instead_down[layer, k])
    for i in range(h.shape[0]):
        s = decide.instead_shift[layer, i]
        for k in range(rank):
            s += small[k] * decide.instead_up[layer, i, k]
        h[i] += s


@compiled(reorder=True)
def largest(x):
    top = x[0]  # not from -inf, which this arithmetic takes not to exist
    for i in range(1, x.shape[0]):
        top = max(top, x[i])
    return top


@compiled(reorder=True)
def attend(q, keys, values, first, last, factor, places, scores, out):
    """Attention of queries ``q [n, h]`` over the positions from ``first`` to ``last`` of the cache ``[room, h]`` that
    they share. Values are added eight at a time, the last eight filled up with some times 0."""
    count, size = q.shape
    for s in range(first, last + 1):
        for i in range(count):
            scores[i, s] = dot(keys[s], q[i]) * factor
    for i in range(count):
        row, total = scores[i, first : last + 1], F0
        top = largest(row)
        for s in range(row.shape[0]):
            row[s] = exp(row[s] - top)
            total += row[s]
        for s in range(row.shape[0]):
            row[s] /= total
    full = first + (last - first + 8) // 8 * 8
    for s in range(last + 1, full):
        places[s], scores[:count, s] = last, F0
    out[:] = F0
    for s in range(first, full, 8):
        for e in range(0, size - size % LANES, LANES):
            add_eight_to_all(values, places, s, scores, out, e)
    for s in range(last + 1, full):
        places[s] = s
    for i in range(count):
        for e in range(size - size % LANES, size):
            for s in range(first, last + 1):
                out[i, e] += scores[i, s] * as_float(values[s, e])


@compiled()
def shortlist(head, scale, x, preview, floor, words, logits, t, team):
    """This thread's logits of one row: previews, and in full those that reach ``floor``; returns how many do.

    Threads take pieces in turn: likely tokens have low ids, and one thread would have most of them.
    """
    found, n, vocabulary, line = 0, 0, logits.shape[0], 64 // head.itemsize
    for v0 in range(t * PIECE, vocabulary, team * PIECE):
        v1 = min(v0 + PIECE, vocabulary)
        for v in range(v0, v1):
            logits[v] = as_stored(preview[v], logits[v])
        if not largest(preview[v0:v1]) < floor:
            for v in range(v0, v1):
                words[n] = v
                n += preview[v] >= floor
                if n == PIECE:
                    found, n = found + read(head, scale, x, words[:n], line, logits), 0
    return found + read(head, scale, x, words[:n], line, logits)


@compiled()
def read(head, scale, x, words, line, logits):
    """The logits of some tokens, in full; returns how many."""
    for k in range(words.shape[0]):
        if k + 4 < words.shape[0]:
            for i in range(0, x.shape[0], line):
                prefetch_at(head, words[k + 4], i)
        value = dot(head[words[k]], x)
        if scale.shape[0]:
            value *= scale[words[k]]
        logits[words[k]] = as_stored(value, logits[words[k]])
    return words.shape[0]


@compiled()
def swiglu(gate_up, block, f0, f1, out):
    """``out = silu(gate) * up``, from f0 to f1; each block of gates comes before the block of their ups."""
    for start in range(f0, f1, block):
        gates, ups, to = gate_up[2 * start :], gate_up[2 * start + block :], out[start:]
        for i in range(block):
            to[i] = gates[i] / (F1 + exp(-gates[i])) * ups[i]


@compiled(keep=True)
def decode_step(t, team, barrier, base, decide, rows, room):
    """Thread t's part of one step for all rows. Every thread of the team calls it; they meet inside."""
    layers, wide_d = base.qkv.shape[0], base.embed.shape[1]
    count, heads, groups = rows.ids.shape[0], base.heads, base.kv_heads
    size = rows.keys.shape[4]
    q_end, ff_width = heads * size, decide.cut_down.shape[1]
    scaling = F1 / np.sqrt(np.float32(size))
    lanes = 8 if team >= 8 else 4 if team >= 4 else 2 if team >= 2 else 1
    h, x, index, picked, scale = room.h[t], room.x[t], room.index[t], room.picked[t], room.scale[t]
    alive, runs, whole, kv_whole, everyone = (
        room.rows[t, 0], room.rows[t, 1], room.rows[t, 2], room.rows[t, 3], room.rows[t, 4]
    )  # fmt: skip
    kept, unused = rows.kept[t], room.unused[t]

    for r in range(count):
        alive[r] = everyone[r] = True
        whole[r] = kv_whole[r] = rows.protected[r]
        scale[r] = rows.scale[r]
        row = base.embed[rows.ids[r]]
        for i in range(wide_d):
            h[r, i] = as_float(row[i])
        if t == 0:
            rows.exits[r] = layers

    living = count
    for layer in range(layers):
        gate = decide.exit[layer]
        if gate >= 0:
            for r in range(count):
                if alive[r] and not rows.protected[r] and exit_gate(decide, gate, r, h[r], x[r], room.small[t]):
                    alive[r], kv_whole[r] = False, True
                    living -= 1
                    if t == 0:
                        rows.exits[r] = layer

        # Queries, keys and values. A row that has left gets only keys and values, from all of its channels.
        normed(h, base.norms[0, layer], base.eps, x)
        if decide.sensitivity.shape[1]:
            for r in range(count):
                u = inner(x[r], decide.sensitivity[layer]) + decide.sensitivity_bias[layer]
                scale[r] = exp(min(max(-u, -SENSITIVITY_LIMIT), SENSITIVITY_LIMIT)) * rows.scale[r]
        w, w_scale, bias, cut = base.qkv[layer], base.qkv_scale[layer], base.qkv_bias[layer], decide.cut_qkv[layer]
        total, start = room.qkv.shape[1], 0
        if living < count:
            if living > 0:
                n = keep(x, 0, wide_d, cut, scale, whole, alive, index, picked, kept[layer, QKV] if t == 0 else unused)
                c0, c1 = span(q_end, t, team, 32), span(q_end, t + 1, team, 32)
                wide(w, w_scale, bias, index, picked, n, room.qkv, c0, c1)
            start = q_end
            n = keep(x, 0, wide_d, cut, scale, kv_whole, everyone, index, picked, unused)
        else:
            n = keep(x, 0, wide_d, cut, scale, whole, alive, index, picked, kept[layer, QKV] if t == 0 else unused)
        c0, c1 = start + span(total - start, t, team, 32), start + span(total - start, t + 1, team, 32)
        wide(w, w_scale, bias, index, picked, n, room.qkv, c0, c1)
        if meet(barrier, team):
            return

        # Attention, by heads. Keys and values of a group are put into the cache by each thread that has some of its
        # heads: all write the same. A single row does not need to wait for others.
        begin, end = count * heads * t // team, count * heads * (t + 1) // team
        item = begin
        while item < end:
            r, head = item // heads, item % heads
            g = head * groups // heads
            item += (g + 1) * heads // groups - head
            keys, values = rows.keys[layer, rows.sequence[r], g], rows.values[layer, rows.sequence[r], g]
            qkv, slot = room.qkv[r].reshape(-1, size), rows.slot[r]
            rotate(qkv[heads + g], rows.cos[r], rows.sin[r], keys[slot])
            for e in range(size):
                values[slot, e] = as_stored(qkv[heads + groups + g, e], values[slot, e])
        if count > 1 and meet(barrier, team):
            return
        item = begin
        while item < end:
            r, head = item // heads, item % heads
            g = head * groups // heads
            n = min(end - item, (g + 1) * heads // groups - head)
            item += n
            if alive[r]:
                keys, values = rows.keys[layer, rows.sequence[r], g], rows.values[layer, rows.sequence[r], g]
                qkv, mixed = room.qkv[r].reshape(-1, size), room.mixed[r].reshape(-1, size)
                q = room.queries[t, :n]
                for i in range(n):
                    rotate(qkv[head + i], rows.cos[r], rows.sin[r], q[i])
                attend(
                    q, keys, values, rows.first[r], rows.slot[r], scaling, room.places[t], room.scores[t],
                    mixed[head : head + n],
                )  # fmt: skip
        if meet(barrier, team):
            return
        if living == 0:
            continue

        if t < lanes:
            narrow(
                base.o[layer], base.unit, room.mixed, decide.cut_o[layer], scale, whole, alive,
                index, picked, room.ends[t], kept[layer, OUT], room.leaves[0], t, lanes,
            )  # fmt: skip
        if meet(barrier, team):
            return
        gather(room.leaves[0], lanes, base.o_scale[layer], base.o_bias[layer], alive, h)

        # The feed-forward network.
        normed(h, base.norms[1, layer], base.eps, x)
        running = 0
        for r in range(count):
            runs[r] = alive[r]
            if decide.ffn.shape[1] and layer > 0 and not rows.protected[r]:
                runs[r] &= inner(x[r], decide.ffn[layer]) > decide.ffn_cut[layer, r % decide.ffn_cut.shape[1]]
            if alive[r] and not runs[r] and decide.instead_shift.shape[0]:
                stand_in(decide, layer, x[r], h[r], room.small[t])
            if t == 0:
                kept[layer, FFN, r] = runs[r]
            running += runs[r]
        if running == 0:
            continue
        counts = kept[layer, GATE_UP] if t == 0 else unused
        n = keep(x, 0, wide_d, decide.cut_gate_up[layer], scale, whole, runs, index, picked, counts)
        w, w_scale, bias = base.gate_up[layer], base.gate_up_scale[layer], base.gate_up_bias[layer]
        f0, f1 = span(ff_width, t, team, 32), span(ff_width, t + 1, team, 32)
        wide(w, w_scale, bias, index, picked, n, room.gate_up, 2 * f0, 2 * f1)
        for r in range(count):
            swiglu(room.gate_up[r], base.block, f0, f1, room.ffn[r])
        if meet(barrier, team):
            return
        if t < lanes:
            narrow(
                base.down[layer], base.unit, room.ffn, decide.cut_down[layer], scale, whole, runs,
                index, picked, room.ends[t], kept[layer, DOWN], room.leaves[1], t, lanes,
            )  # fmt: skip
        if meet(barrier, team):
            return
        gather(room.leaves[1], lanes, base.down_scale[layer], base.down_bias[layer], runs, h)

    count = rows.read.shape[0]
    for k in range(count):
        r = rows.read[k]
        normed(h[r : r + 1], base.last_norm, base.eps, x[k : k + 1])
    x, vocabulary = x[:count], base.head.shape[0]
    v0, v1 = span(vocabulary, t, team, 32), span(vocabulary, t + 1, team, 32)
    if not decide.cut_head.shape[0]:
        dots(base.head, base.head_scale, x, rows.logits, v0, v1)
        meet(barrier, team)
        return
    for r in range(count):
        scale[r], whole[r] = F1, False
    counts = rows.head[t, 0] if t == 0 else unused
    n = keep(x, 0, wide_d, decide.cut_head, scale, whole, everyone, index, picked, counts)
    wide(base.preview, base.head_scale, base.o_bias[0, :0], index, picked, n, room.preview[:count], v0, v1)
    for r in range(count):
        room.best[t, r] = largest(room.preview[r, v0:v1]) if v0 < v1 else LOWEST
    if meet(barrier, team):
        return
    for r in range(count):
        floor = largest(room.best[:team, r]) - decide.margin
        rows.head[t, 1, r] = shortlist(
            base.head, base.head_scale, x[r], room.preview[r], floor, room.words[t], rows.logits[r], t, team
        )
    meet(barrier, team)
