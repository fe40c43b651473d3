"""The decode step: from the ids of a few tokens to their logits, in one compiled function run by a team of threads.

It is the layer of `hat_lib.method.layer`, with the same decisions, for up to eight tokens (rows) of one or more
sequences. All threads run it together. Each keeps a hidden state of its own and computes norms and decisions itself,
which is quicker than telling the others. The product of gate and up is split by outputs, those of q, k and v, of o and
of down by channels, attention by pieces of the context. A thread's outputs of gate and up are its own channels of down,
so the threads meet four times a layer: after q, k and v, after attention, after o and after down.
"""

from __future__ import annotations

import numpy as np

from hat_lib.engine.arrays import DOWN, FFN, GATE_UP, OUT, PARTIALS, QKV, SECTION, Gathered, Inputs, Share
from hat_lib.engine.attention import PIECE, attend, combine, pieces, place_all, put
from hat_lib.engine.compiling import compiled
from hat_lib.engine.four_bits import add
from hat_lib.engine.kernels import F0, LEAST, as_float, dots, exp, fetch, keep, span
from hat_lib.engine.operations import (
    add_correction,
    add_partials,
    exit_gate,
    fetch_small,
    inner,
    largest,
    lower,
    partial_product,
    product,
    rms_norm,
    shortlist,
    stand_in,
    swiglu,
)
from hat_lib.engine.team import meet

SENSITIVITY_LIMIT = np.float32(3)
"""same as `hat_lib.method.routers.SENSITIVITY_LIMIT`"""


@compiled()
def angles(base, rows, layer, r):
    """cos and sin of a row's rotary embedding in a layer."""
    if base.rotates[layer]:
        return rows.cos[rows.position[r]], rows.sin[rows.position[r]]
    return base.unrotated[0], base.unrotated[1]


@compiled()
def set_bars(base, thresholds, rows, layer, site, scale, bars):
    """``bars[0]``: the score above which each row keeps a channel at a site; protected rows keep all, and so do all
    rows if whole FFNs are skipped."""
    for r in range(scale.shape[0]):
        whole = rows.protected[r] or base.ffn.shape[1]
        bars[0, r] = LEAST if whole else thresholds.site[layer, site] * scale[r]


@compiled(inline=True)
def decode_step(t, team, barrier, base, thresholds, rows, shared, kept, exits, head):
    """Thread t's part of one step for all rows. Every thread of the team calls it; they meet inside. Returns True if
    the step was called off."""
    layers, width, count = base.norms.shape[1], base.embed.shape[1], rows.ids.shape[0]
    strength = thresholds.correction if base.qkv.expand.shape[1] else F0  # of the corrections of linear layers
    heads, groups, size, ffn_width = base.heads, base.kv_heads, rows.keys.shape[4], base.down.unit.shape[1]
    q_end, qkv_end, kept = heads * size, (heads + 2 * groups) * size, kept[t]
    of_qkv, of_kv, of_o, of_down = shared.lowered[0], shared.lowered[1], shared.lowered[2], shared.lowered[3]
    # What a thread has for itself: states, what it gathers of them, its rows' factors on thresholds, and flags.
    h, x = np.empty((count, width), np.float32), np.empty((count, width), np.float32)
    qkv, mixed = np.empty((count, qkv_end), np.float32), np.empty((count, q_end), np.float32)
    widest = max(ffn_width, width, q_end) + 8 * PARTIALS
    values = np.empty((count, widest), np.float32)
    gathered = Gathered(np.empty(widest, np.uint64), values, np.empty(PARTIALS, np.int64))
    queries, scores = np.empty((heads // groups, size), np.float32), np.empty((heads // groups, PIECE), np.float32)
    places, candidates = np.empty(PIECE, np.uint64), np.empty(SECTION, np.int64)
    scale, bars, uncounted = np.empty(count, np.float32), np.empty((2, count), np.float32), np.zeros(count, np.int32)
    z = np.empty((count, base.qkv.reduce.shape[1]), np.float32)
    small = np.empty(max(base.gates.reduce.shape[1], base.stand_in.down.shape[1]), np.float32)
    # Whether a row has not left, and whether it runs its FFN; and True for each.
    alive, runs, every_row = np.ones(count, np.bool_), np.ones(count, np.bool_), np.ones(count, np.bool_)
    # The thread's channels of q, k and v and of o, and its neurons.
    part, end_part = PARTIALS * t // team, PARTIALS * (t + 1) // team
    i0, i1 = span(width, part, PARTIALS, base.qkv.split), span(width, end_part, PARTIALS, base.qkv.split)
    o0, o1 = span(q_end, part, PARTIALS, base.o.split), span(q_end, end_part, PARTIALS, base.o.split)
    f0, f1 = span(ffn_width, part, PARTIALS, base.block), span(ffn_width, end_part, PARTIALS, base.block)
    to_states = Share(part, end_part, 0, width)

    for r in range(count):
        scale[r] = rows.scale[r]
        row = base.embed[rows.ids[r]]
        for i in range(width):
            h[r, i] = as_float(row[i])
        if t == 0:
            exits[r] = layers

    n_alive = count
    for layer in range(layers):
        gate = base.gates.before[layer]
        if gate >= 0 and thresholds.exit[gate] < np.inf:
            for r in range(count):
                leaves = alive[r] and not rows.protected[r]
                if leaves and exit_gate(base.gates, gate, thresholds.exit[gate], h[r], x[r], small):
                    alive[r] = False
                    n_alive -= 1
                    if t == 0:
                        exits[r] = layer

        rms_norm(h, base.norms[0, layer], base.eps, x)
        if base.sensitivity.shape[1]:
            for r in range(count):
                u = (inner(x[r], base.sensitivity[layer]) + base.sensitivity_bias[layer]) * -thresholds.sensitivity
                scale[r] = exp(min(max(u, -SENSITIVITY_LIMIT), SENSITIVITY_LIMIT)) * rows.scale[r]

        # While weights are read, memory brings the small arrays of what follows.
        fetch_small(base.o, layer, strength, o0, o1, 0, width)
        fetch_small(base.gate_up, layer, strength, 0, width, 2 * f0, 2 * f1)
        fetch(base.norms[1], layer, 0, width)

        # Queries, keys and values. A row that has left gets only keys and values, from all of its channels.
        together = qkv_end if n_alive == count else q_end
        set_bars(base, thresholds, rows, layer, QKV, scale, bars)
        if n_alive > 0:
            share, counts = Share(part, end_part, 0, together), kept[layer, QKV]
            inputs, sums = Inputs(x, bars[0], alive), shared.qkv
            partial_product(base.qkv, layer, inputs, strength, share, gathered, counts, sums, of_qkv)
        if n_alive < count:
            for r in range(count):
                bars[1, r] = bars[0, r] if alive[r] else LEAST
            share, inputs, sums = (
                Share(part, end_part, q_end, qkv_end),
                Inputs(x, bars[1], every_row),
                shared.qkv,
            )
            partial_product(base.qkv, layer, inputs, strength, share, gathered, uncounted, sums, of_kv)
        if meet(barrier, team):
            return True
        for r in range(count):
            qkv[r, :] = F0
        add_partials(base.qkv, layer, shared.qkv, team, every_row, qkv)
        add_correction(base.qkv, layer, of_qkv, strength, alive, z, qkv, 0, together)
        if n_alive < count:
            add_correction(base.qkv, layer, of_kv, strength, every_row, z, qkv, q_end, qkv_end)

        # Attention. One row writes its own key and value with the last piece of its context; several wait for all.
        q_norm, k_norm = base.head_norms[0, layer], base.head_norms[1, layer]
        if count > 1:
            for item in range(count * groups * t // team, count * groups * (t + 1) // team):
                r, g = item // groups, item % groups
                keys, values = rows.keys[layer, rows.sequence[r], g], rows.values[layer, rows.sequence[r], g]
                cos, sin = angles(base, rows, layer, r)
                put(qkv[r], heads, groups, g, k_norm, base.eps, cos, sin, keys, values, rows.slot[r])
            if meet(barrier, team):
                return True
        total = 0
        for r in range(count):
            total += groups * pieces(rows.first[r], rows.slot[r])
        item, begin, end = 0, total * t // team, total * (t + 1) // team
        for r in range(count):
            n, (cos, sin) = pieces(rows.first[r], rows.slot[r]), angles(base, rows, layer, r)
            for g in range(groups):
                keys, values = rows.keys[layer, rows.sequence[r], g], rows.values[layer, rows.sequence[r], g]
                for piece in range(max(begin - item, 0), min(end - item, n)):
                    if count == 1 and piece == n - 1:
                        put(qkv[r], heads, groups, g, k_norm, base.eps, cos, sin, keys, values, rows.slot[r])
                    if alive[r]:
                        place_all(qkv[r], g, q_norm, base.eps, cos, sin, queries)
                        those = slice(g * queries.shape[0], (g + 1) * queries.shape[0])
                        attend(
                            queries, keys, values, rows.first[r] + piece * PIECE, rows.slot[r], scores,
                            places, shared.tops[r, piece, those], shared.totals[r, piece, those],
                            shared.pieces[r, piece, those],
                        )  # fmt: skip
                item += n
        if meet(barrier, team):
            return True
        if n_alive == 0:
            continue

        for r in range(count):
            if alive[r]:
                n = pieces(rows.first[r], rows.slot[r])
                combine(shared.tops[r, :n], shared.totals[r, :n], shared.pieces[r, :n], o0, o1, mixed[r])
        set_bars(base, thresholds, rows, layer, OUT, scale, bars)
        inputs = Inputs(mixed, bars[0], alive)
        partial_product(base.o, layer, inputs, strength, to_states, gathered, kept[layer, OUT], shared.states[0], of_o)
        if meet(barrier, team):
            return True
        add_partials(base.o, layer, shared.states[0], team, alive, h)
        add_correction(base.o, layer, of_o, strength, alive, z, h, 0, width)

        # The feed-forward network.
        rms_norm(h, base.norms[1, layer], base.eps, x)
        n_running = 0
        for r in range(count):
            runs[r] = alive[r]
            if base.ffn.shape[1] and not rows.protected[r] and thresholds.site[layer, 0] > LEAST:
                runs[r] &= inner(x[r], base.ffn[layer]) + base.ffn_bias[layer] > thresholds.site[layer, 0]
            if alive[r] and not runs[r] and base.stand_in.shift.shape[0] and thresholds.correction > F0:
                stand_in(base.stand_in, layer, thresholds.correction, x[r], h[r], small)
            if t == 0:
                kept[layer, FFN, r] = runs[r]
            n_running += runs[r]
        if n_running == 0:
            continue
        set_bars(base, thresholds, rows, layer, GATE_UP, scale, bars)
        inputs, counts = Inputs(x, bars[0], runs), kept[layer, GATE_UP] if t == 0 else uncounted
        n = keep(inputs, base.gate_up.unit[layer], 0, width, gathered.index, gathered.values, counts)
        lower(base.gate_up, layer, inputs, strength, 0, width, z)
        fetch_small(base.down, layer, strength, f0, f1, 0, width)
        if layer + 1 < layers:
            fetch_small(base.qkv, layer + 1, strength, i0, i1, 0, qkv_end)
            fetch(base.norms[0], layer + 1, 0, width)
            fetch(base.sensitivity, layer + 1, 0, base.sensitivity.shape[1])
        product(base.gate_up, layer, gathered, n, z, strength, shared.gate_up, 2 * f0, 2 * f1)
        for r in range(count):
            swiglu(shared.gate_up[r], base.block, f0, f1, shared.ffn[r])
        set_bars(base, thresholds, rows, layer, DOWN, scale, bars)
        inputs, counts = Inputs(shared.ffn, bars[0], runs), kept[layer, DOWN]
        partial_product(base.down, layer, inputs, strength, to_states, gathered, counts, shared.states[1], of_down)
        if meet(barrier, team):
            return True
        add_partials(base.down, layer, shared.states[1], team, runs, h)
        add_correction(base.down, layer, of_down, strength, runs, z, h, 0, width)

    # The head, for the rows whose logits are wanted.
    count = rows.logit_rows.shape[0]
    for k in range(count):
        r = rows.logit_rows[k]
        rms_norm(h[r : r + 1], base.last_norm, base.eps, x[k : k + 1])
    x, vocabulary = x[:count], base.head.shape[0]
    v0, v1 = span(vocabulary, t, team, 32), span(vocabulary, t + 1, team, 32)
    if not thresholds.head > LEAST:
        dots(base.head, base.head_scale, x, rows.logits, v0, v1)
        return meet(barrier, team)
    for r in range(count):
        bars[0, r] = thresholds.head
    counts = head[t, 0] if t == 0 else uncounted
    n = keep(Inputs(x, bars[0], every_row), base.head_unit, 0, width, gathered.index, gathered.values, counts)
    add(base.preview, gathered.index, gathered.values, 0, n, n, shared.preview[:count], v0, v1)
    for r in range(count):
        preview = shared.preview[r]
        if base.head_scale.shape[0]:
            for v in range(v0, v1):
                preview[v] *= base.head_scale[v]
        shared.best[t, r] = largest(preview[v0:v1]) if v0 < v1 else LEAST
    if meet(barrier, team):
        return True
    for r in range(count):
        floor = largest(shared.best[:team, r]) - thresholds.margin
        head[t, 1, r] = shortlist(
            base.head, base.head_scale, x[r], shared.preview[r], floor, candidates, rows.logits[r], t, team
        )
    return meet(barrier, team)
