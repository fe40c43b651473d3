"""The decode step: from the ids of a few tokens to their logits, in one compiled function run by a team of threads.

It is the layer of `hat_lib.method.layer`, with the same decisions, for up to eight tokens (rows) of one or more
sequences. All threads run it together. Each keeps a hidden state of its own and computes norms and decisions itself,
which is quicker than telling the others. The product of gate and up is split by outputs, those of q, k and v, of o and
of down by channels, attention by pieces of the context. A thread's outputs of gate and up are its own channels of down,
so the threads meet four times a layer: after q, k and v, after attention, after o and after down.
"""

import numpy as np

from hat_lib.engine.arrays import DOWN, FFN, GATE_UP, OUT, PARTIALS, QKV, TILE, Gathered, Inputs
from hat_lib.engine.attention import PIECE, attend, combine, pieces, place_keys, place_queries
from hat_lib.engine.compiling import compiled
from hat_lib.engine.head import all_logits, likely_logits
from hat_lib.engine.kernels import F0, LEAST, as_float, exp, fetch, keep
from hat_lib.engine.operations import (
    add_low_rank,
    add_partials,
    exit_gate,
    fetch_small,
    lower,
    of_layer,
    partial_product,
    parts,
    rms_norm,
    score,
    swiglu,
    whole_product,
)
from hat_lib.engine.team import meet

SENSITIVITY_LIMIT = np.float32(3)
"""same as `hat_lib.method.routers.SENSITIVITY_LIMIT`"""


@compiled()
def set_bars(base, thresholds, rows, layer, x, alive, bars):
    """``bars [4, R]``: the score above which each row keeps a channel at each site of a layer with the normed input
    ``x``. Rows that are protected keep all, so do rows that have left, and all rows if whole FFNs are skipped."""
    for r in range(x.shape[0]):
        scale, whole = rows.scale[r], rows.protected[r] or not alive[r] or base.ffn.shape[1] > 0
        if base.sensitivity.shape[1]:
            u = score(x[r], base.sensitivity[layer]) * -thresholds.sensitivity
            scale *= exp(min(max(u, -SENSITIVITY_LIMIT), SENSITIVITY_LIMIT))
        for site in range(FFN):
            bars[site, r] = LEAST if whole else thresholds.site[layer, site] * scale


@compiled(inline=True)
def decode_step(thread, base, thresholds, rows, shared, course, step):
    """This thread's part of one step for all rows. Every thread of the team calls it; they meet inside. Returns True if
    the step was called off."""
    t, team, barrier = thread
    layers, width, count = base.norms.shape[1], base.embed.shape[1], rows.ids.shape[0]
    strength = thresholds.correction if base.qkv.expand.shape[1] else F0  # of the corrections of linear layers
    size, ffn_width = rows.keys.shape[4], base.down.unit.shape[1]
    q_end, qkv_end = base.heads * size, (base.heads + 2 * base.kv_heads) * size
    kept, exits = course.kept[step, t], course.exits[step]
    # What a thread has for itself: states, what it gathers of them, its rows' bars, and flags.
    h, x = np.empty((count, width), np.float32), np.empty((count, width), np.float32)
    qkv, mixed = np.empty((count, qkv_end), np.float32), np.empty((count, q_end), np.float32)
    queries = np.empty((count, base.heads, size), np.float32)
    widest, ends = max(ffn_width, width, q_end) + 8 * PARTIALS, np.empty(PARTIALS, np.int64)
    places = np.empty(2 * widest, np.uint64)
    gathered = Gathered(np.empty(widest, np.uint64), np.empty((count, widest), np.float32), ends, places)
    of_group = base.heads // base.kv_heads
    context = Gathered(np.empty(PIECE, np.uint64), np.empty((of_group, PIECE), np.float32), ends, places)
    bars, uncounted = np.empty((FFN, count), np.float32), np.zeros(count, np.int32)
    z = np.empty((count, base.qkv.reduce.shape[1]), np.float32)
    # Whether a row has not left, and whether it runs its FFN; and True for each.
    alive, runs, every_row = np.ones(count, np.bool_), np.ones(count, np.bool_), np.ones(count, np.bool_)
    # The thread's channels of q, k and v and of o, and its neurons.
    i0, i1 = parts(width, base.qkv.split, thread)
    o0, o1 = parts(q_end, base.o.split, thread)
    f0, f1 = parts(ffn_width, base.down.split, thread)

    for r in range(count):
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
                if leaves and exit_gate(base.gates, gate, thresholds.exit[gate], h[r], x[r]):
                    alive[r] = False
                    n_alive -= 1
                    if t == 0:
                        exits[r] = layer

        rms_norm(h, base.norms[0, layer], base.eps, x)
        set_bars(base, thresholds, rows, layer, x, alive, bars)

        # While weights are read, memory brings the small arrays of what follows.
        of_o, of_gate_up = of_layer(base.o, layer, strength), of_layer(base.gate_up, layer, strength)
        fetch_small(of_o, o0, o1, 0, width)
        fetch_small(of_gate_up, 0, width, 2 * f0, 2 * f1)
        fetch(base.norms[1, layer], 0, width)

        # Queries, keys and values. Rows that have left need no queries, but of few rows among others they cost little.
        product, lowered = of_layer(base.qkv, layer, strength), shared.lowered[QKV]
        inputs, begin = Inputs(x, bars[QKV], every_row), 0 if n_alive else q_end // TILE * TILE
        partial_product(thread, product, inputs, begin, gathered, kept[layer, QKV], shared.qkv, lowered)
        if meet(barrier, team):
            return True
        for r in range(count):
            qkv[r, :] = F0
            if not alive[r]:
                kept[layer, QKV, r] = 0
        add_partials(thread, product, shared.qkv, lowered, every_row, z, qkv)

        # Attention. Where a sequence has several tokens, each sees the keys of those before it, and all threads put the
        # same keys and values into the cache, rather than wait for each other.
        item, whole, alone = 0, 0, count == rows.keys.shape[1]
        for r in range(count):
            whole += base.kv_heads * pieces(rows, r)
            for g in range(0 if alone else base.kv_heads):
                place_keys(base, rows, layer, r, g, qkv[r])
        begin, end = whole * t // team, whole * (t + 1) // team
        for r in range(count):
            n = pieces(rows, r)
            for g in range(base.kv_heads):
                keys, values = rows.keys[layer, rows.sequence[r], g], rows.values[layer, rows.sequence[r], g]
                those, mine = slice(g * of_group, (g + 1) * of_group), range(max(begin - item, 0), min(end - item, n))
                if len(mine):
                    place_queries(base, rows, layer, r, those, qkv[r], queries[r])
                    if alone and mine.stop == n:
                        place_keys(base, rows, layer, r, g, qkv[r])
                for piece in mine:
                    if alive[r]:
                        to = (
                            shared.tops[r, piece, those],
                            shared.totals[r, piece, those],
                            shared.pieces[r, piece, those],
                        )
                        first = rows.first[r] + piece * PIECE
                        attend(queries[r, those], keys, values, first, rows.slot[r], context, to)
                item += n
        if meet(barrier, team):
            return True
        if n_alive == 0:
            continue

        for r in range(count):
            if alive[r]:
                combine(shared, r, pieces(rows, r), o0, o1, mixed[r])
        inputs, lowered = Inputs(mixed, bars[OUT], alive), shared.lowered[OUT]
        partial_product(thread, of_o, inputs, 0, gathered, kept[layer, OUT], shared.states[0], lowered)
        if meet(barrier, team):
            return True
        add_partials(thread, of_o, shared.states[0], lowered, alive, z, h)

        # The feed-forward network.
        rms_norm(h, base.norms[1, layer], base.eps, x)
        n_running = 0
        for r in range(count):
            runs[r] = alive[r]
            if base.ffn.shape[1] and not rows.protected[r] and thresholds.site[layer, 0] > LEAST:
                runs[r] &= score(x[r], base.ffn[layer]) > thresholds.site[layer, 0]
            if alive[r] and not runs[r] and base.stand_in.shift.shape[0] and thresholds.correction > F0:
                down, up = base.stand_in.down[layer - 1], base.stand_in.up[layer - 1]
                add_low_rank(down, up, base.stand_in.shift[layer - 1], x[r], thresholds.correction, h[r])
            if t == 0:
                kept[layer, FFN, r] = runs[r]
            n_running += runs[r]
        if n_running == 0:
            continue
        inputs, counts = Inputs(x, bars[GATE_UP], runs), kept[layer, GATE_UP] if t == 0 else uncounted
        n = keep(inputs, of_gate_up.unit, 0, width, gathered, counts)
        lower(of_gate_up, inputs, 0, width, z)
        product = of_layer(base.down, layer, strength)
        fetch_small(product, f0, f1, 0, width)
        if layer + 1 < layers:
            fetch_small(of_layer(base.qkv, layer + 1, strength), i0, i1, 0, qkv_end)
            fetch(base.norms[0, layer + 1], 0, width)
            fetch(base.sensitivity[layer + 1], 0, base.sensitivity.shape[1])
        whole_product(of_gate_up, gathered, n, z, shared.gate_up, 2 * f0, 2 * f1)
        for r in range(count):
            swiglu(shared.gate_up[r], base.block, f0, f1, shared.ffn[r])
        inputs, lowered = Inputs(shared.ffn, bars[DOWN], runs), shared.lowered[DOWN]
        partial_product(thread, product, inputs, 0, gathered, kept[layer, DOWN], shared.states[1], lowered)
        if meet(barrier, team):
            return True
        add_partials(thread, product, shared.states[1], lowered, runs, z, h)

    # The head, for the rows whose logits are wanted.
    wanted = rows.logit_rows.shape[0]
    for k in range(wanted):
        r = rows.logit_rows[k]
        rms_norm(h[r : r + 1], base.last_norm, base.eps, x[k : k + 1])
    if thresholds.head > LEAST:
        return likely_logits(thread, base, thresholds, x[:wanted], gathered, rows.logits, shared, course.head[step, t])
    return all_logits(thread, base, x[:wanted], rows.logits)
