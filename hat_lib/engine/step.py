"""The decode step: from the ids of a few tokens to their logits, in one compiled function run by a team of threads.

It is the layer of `hat_lib.model.decoder_layer`, with the same decisions, for up to eight tokens (rows) of one or more
sequences. All threads run it together. Each keeps a hidden state of its own and computes norms and decisions itself,
which is quicker than telling the others; products are split, wide ones by outputs and narrow ones by channels,
attention by heads, and after each the threads meet.
"""

from __future__ import annotations

import numpy as np

from hat_lib.engine.arrays import DOWN, FFN, GATE_UP, OUT, QKV
from hat_lib.engine.compiling import compiled
from hat_lib.engine.kernels import F1, as_float, as_stored, dots, exp, keep, span
from hat_lib.engine.operations import (
    add_partials,
    attend,
    correct,
    exit_gate,
    inner,
    largest,
    partial_product,
    product,
    rms_norm,
    rotate,
    shortlist,
    swiglu,
)
from hat_lib.engine.team import meet

SENSITIVITY_LIMIT = np.float32(3)
"""same as `hat_lib.model.routers.SENSITIVITY_LIMIT`"""
LOWEST = np.finfo(np.float32).min
"""best preview of a thread that has made none"""


@compiled(keep=True)
def decode_step(t, team, barrier, base, decide, rows, scratch):
    """Thread t's part of one step for all rows. Every thread of the team calls it; they meet inside."""
    layers, width = base.norms.shape[1], base.embed.shape[1]
    count, heads, groups = rows.ids.shape[0], base.heads, base.kv_heads
    size, ffn_width = rows.keys.shape[4], decide.down_threshold.shape[1]
    q_end, qkv_end = heads * size, scratch.qkv.shape[1]
    scaling = F1 / np.sqrt(np.float32(size))
    splits = 8 if team >= 8 else 4 if team >= 4 else 2 if team >= 2 else 1  # threads that share a narrow product
    h, x, index, gathered, ends = scratch.h[t], scratch.x[t], scratch.index[t], scratch.gathered[t], scratch.ends[t]
    scale, uncounted, kept = scratch.scale[t], scratch.uncounted[t], rows.kept[t]
    # Whether a row has not left, runs its FFN, keeps all channels, keeps all of them for K and V; and True for each.
    flags = scratch.flags[t]
    alive, runs, keep_all, kv_keep_all, every_row = flags[0], flags[1], flags[2], flags[3], flags[4]

    for r in range(count):
        alive[r] = every_row[r] = True
        keep_all[r] = kv_keep_all[r] = rows.protected[r]
        scale[r] = rows.scale[r]
        row = base.embed[rows.ids[r]]
        for i in range(width):
            h[r, i] = as_float(row[i])
        if t == 0:
            rows.exits[r] = layers

    n_alive = count
    for layer in range(layers):
        gate = decide.exit[layer]
        if gate >= 0:
            for r in range(count):
                if alive[r] and not rows.protected[r] and exit_gate(decide, gate, r, h[r], x[r], scratch.small[t]):
                    alive[r], kv_keep_all[r] = False, True
                    n_alive -= 1
                    if t == 0:
                        rows.exits[r] = layer

        # Queries, keys and values. A row that has left gets only keys and values, from all of its channels.
        rms_norm(h, base.norms[0, layer], base.eps, x)
        if decide.sensitivity.shape[1]:
            for r in range(count):
                u = inner(x[r], decide.sensitivity[layer]) + decide.sensitivity_bias[layer]
                scale[r] = exp(min(max(-u, -SENSITIVITY_LIMIT), SENSITIVITY_LIMIT)) * rows.scale[r]
        w, w_scale, bias = base.qkv.weight[layer], base.qkv.scale[layer], base.qkv.bias[layer]
        threshold, counts = decide.qkv_threshold[layer], kept[layer, QKV] if t == 0 else uncounted
        start = 0
        if n_alive < count:
            if n_alive > 0:
                n = keep(x, 0, width, threshold, scale, keep_all, alive, index, gathered, counts)
                c0, c1 = span(q_end, t, team, 32), span(q_end, t + 1, team, 32)
                product(w, w_scale, bias, index, gathered, n, scratch.qkv, c0, c1)
            start = q_end
            n = keep(x, 0, width, threshold, scale, kv_keep_all, every_row, index, gathered, uncounted)
        else:
            n = keep(x, 0, width, threshold, scale, keep_all, alive, index, gathered, counts)
        c0, c1 = start + span(qkv_end - start, t, team, 32), start + span(qkv_end - start, t + 1, team, 32)
        product(w, w_scale, bias, index, gathered, n, scratch.qkv, c0, c1)
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
            qkv, slot = scratch.qkv[r].reshape(-1, size), rows.slot[r]
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
                qkv, mixed = scratch.qkv[r].reshape(-1, size), scratch.mixed[r].reshape(-1, size)
                q = scratch.queries[t, :n]
                for i in range(n):
                    rotate(qkv[head + i], rows.cos[r], rows.sin[r], q[i])
                attend(
                    q, keys, values, rows.first[r], rows.slot[r], scaling, scratch.positions[t], scratch.scores[t],
                    mixed[head : head + n],
                )  # fmt: skip
        if meet(barrier, team):
            return
        if n_alive == 0:
            continue

        if t < splits:
            partial_product(
                base.o.weight[layer], base.unit, scratch.mixed, decide.o_threshold[layer], scale, keep_all, alive,
                index, gathered, ends, kept[layer, OUT], scratch.partials[0], t, splits,
            )  # fmt: skip
        if meet(barrier, team):
            return
        add_partials(scratch.partials[0], splits, base.o.scale[layer], base.o.bias[layer], alive, h)

        # The feed-forward network.
        rms_norm(h, base.norms[1, layer], base.eps, x)
        n_running = 0
        for r in range(count):
            runs[r] = alive[r]
            if decide.ffn.shape[1] and layer > 0 and not rows.protected[r]:
                bar = decide.ffn_threshold[layer, r % decide.ffn_threshold.shape[1]]
                runs[r] &= inner(x[r], decide.ffn[layer]) > bar
            if alive[r] and not runs[r] and decide.correction_shift.shape[0]:
                correct(decide, layer, x[r], h[r], scratch.small[t])
            if t == 0:
                kept[layer, FFN, r] = runs[r]
            n_running += runs[r]
        if n_running == 0:
            continue
        counts = kept[layer, GATE_UP] if t == 0 else uncounted
        n = keep(x, 0, width, decide.gate_up_threshold[layer], scale, keep_all, runs, index, gathered, counts)
        w, w_scale, bias = base.gate_up.weight[layer], base.gate_up.scale[layer], base.gate_up.bias[layer]
        f0, f1 = span(ffn_width, t, team, 32), span(ffn_width, t + 1, team, 32)
        product(w, w_scale, bias, index, gathered, n, scratch.gate_up, 2 * f0, 2 * f1)
        for r in range(count):
            swiglu(scratch.gate_up[r], base.block, f0, f1, scratch.ffn[r])
        if meet(barrier, team):
            return
        if t < splits:
            partial_product(
                base.down.weight[layer], base.unit, scratch.ffn, decide.down_threshold[layer], scale, keep_all, runs,
                index, gathered, ends, kept[layer, DOWN], scratch.partials[1], t, splits,
            )  # fmt: skip
        if meet(barrier, team):
            return
        add_partials(scratch.partials[1], splits, base.down.scale[layer], base.down.bias[layer], runs, h)

    # The head, for the rows whose logits are wanted.
    count = rows.logit_rows.shape[0]
    for k in range(count):
        r = rows.logit_rows[k]
        rms_norm(h[r : r + 1], base.last_norm, base.eps, x[k : k + 1])
    x, vocabulary = x[:count], base.head.shape[0]
    v0, v1 = span(vocabulary, t, team, 32), span(vocabulary, t + 1, team, 32)
    if not decide.head_threshold.shape[0]:
        dots(base.head, base.head_scale, x, rows.logits, v0, v1)
        meet(barrier, team)
        return
    for r in range(count):
        scale[r], keep_all[r] = F1, False
    counts = rows.head[t, 0] if t == 0 else uncounted
    n = keep(x, 0, width, decide.head_threshold, scale, keep_all, every_row, index, gathered, counts)
    no_bias = base.last_norm[:0]
    product(base.preview, base.head_scale, no_bias, index, gathered, n, scratch.preview[:count], v0, v1)
    for r in range(count):
        scratch.best[t, r] = largest(scratch.preview[r, v0:v1]) if v0 < v1 else LOWEST
    if meet(barrier, team):
        return
    for r in range(count):
        floor = largest(scratch.best[:team, r]) - decide.margin
        rows.head[t, 1, r] = shortlist(
            base.head, base.head_scale, x[r], scratch.preview[r], floor, scratch.candidates[t], rows.logits[r], t, team
        )
    meet(barrier, team)
