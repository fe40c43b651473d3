"""The parts of a decoder layer, and of the head, that `hat_lib.engine.step` puts together; arithmetic is in float32."""

from __future__ import annotations

import numpy as np

from hat_lib.engine.arrays import PARTIALS, SECTION
from hat_lib.engine.compiling import compiled
from hat_lib.engine.four_bits import add
from hat_lib.engine.kernels import F0, F1, as_float, as_stored, dot, exp, fetch, keep, span


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


@compiled(numbers=True)
def largest(x):
    """If one of them is NaN, that or another."""
    top = x[0]
    for i in range(1, x.shape[0]):
        top = max(top, x[i])
    return top


@compiled()
def rms_norm(h, weight, eps, out):
    """RMS norm of each row of ``h [R, D]``."""
    for r in range(h.shape[0]):
        factor = F1 / np.sqrt(mean_square(h[r]) + eps)
        row, to = h[r], out[r]
        for i in range(row.shape[0]):
            to[i] = row[i] * factor * weight[i]


@compiled(reorder=True)
def kept_dot(weights, x, threshold, factor, everything):
    """``weights . x`` of the channels that `keep` keeps. Slices, or LLVM would not vectorise it; as in `add_scaled`."""
    s = F0
    for i in range(x.shape[0]):
        kept = everything | (not abs(x[i]) <= threshold[i] * factor)
        s += as_float(weights[i]) * (x[i] if kept else F0)
    return s


@compiled()
def add_scaled(y, weights, factor):
    for j in range(y.shape[0]):
        y[j] += factor * as_float(weights[j])


@compiled()
def lower(x, first, last, threshold, scale, keep_all, runs, reduce, strength, out):
    """``out[r] = reduce x[r]``, ``[R, rank]``, from the channels that row r keeps (as in `keep`), of first to last."""
    for r in range(x.shape[0] if strength > F0 else 0):
        if runs[r]:
            for k in range(reduce.shape[0]):
                weights, row, bars = reduce[k, first:last], x[r, first:last], threshold[first:last]
                out[r, k] = kept_dot(weights, row, bars, scale[r], keep_all[r])


@compiled()
def expand(linear, layer, z, strength, y, c0, c1):
    """Add a correction to outputs c0 to c1 of one row, ``z`` being what `lower` left."""
    rank = z.shape[0]
    for k in range(rank + 1):
        add_scaled(y[c0:c1], linear.expand[layer, k, c0:c1], strength * (z[k] if k < rank else F1))


@compiled()
def fetch_small(linear, threshold, layer, strength, i0, i1, c0, c1):
    """Prefetch what a product of inputs i0 to i1 and outputs c0 to c1 reads besides its weights."""
    fetch(threshold, layer, i0, i1)
    if strength > F0:
        for k in range(linear.reduce.shape[1]):
            fetch(linear.reduce[layer], k, i0, i1)
        for k in range(linear.expand.shape[1]):
            fetch(linear.expand[layer], k, c0, c1)


@compiled()
def product(linear, layer, index, gathered, n, z, strength, y, c0, c1):
    """Outputs c0 to c1 of a product, from all the kept channels."""
    scale, bias = linear.scale[layer], linear.bias[layer]
    add(linear.weight[layer], index, gathered, 0, n, n, y, c0, c1)
    for r in range(y.shape[0]):
        if scale.shape[0]:
            for j in range(c0, c1):
                y[r, j] *= scale[j]
        if bias.shape[0]:
            for j in range(c0, c1):
                y[r, j] += bias[j]
        if strength > F0:
            expand(linear, layer, z[r], strength, y[r], c0, c1)


@compiled()
def partial_product(
    linear, layer, unit, x, threshold, scale, keep_all, runs, index, gathered, ends, kept, strength, partials, lowered,
    part, end_part, c0, c1,
):  # fmt: skip
    """A thread's share of outputs c0 to c1 of a product whose channels are split: long pieces of the weight's rows.

    The channels form `PARTIALS` parts, whose sums are added in pairs: the same sum for any number of threads. A thread
    has neighbouring parts, a power of two in number, and leaves its own sum in the first.
    """
    channels, n = x.shape[1], 0
    for p in range(part, end_part):
        first, last = span(channels, p, PARTIALS, unit), span(channels, p + 1, PARTIALS, unit)
        n = ends[p] = keep(x, first, last, threshold, scale, keep_all, runs, index, gathered, kept, n)
        lower(x, first, last, threshold, scale, keep_all, runs, linear.reduce[layer], strength, lowered[p])
    start = 0
    for p in range(part, end_part):
        add(linear.weight[layer], index, gathered, start, ends[p], n, partials[p], c0, c1)
        start = ends[p]
    width = 1
    while width < end_part - part:
        for p in range(part, end_part, 2 * width):
            for r in range(partials.shape[1]):
                into, other = partials[p, r, c0:c1], partials[p + width, r, c0:c1]
                for i in range(into.shape[0]):
                    into[i] += other[i]
        width *= 2


@compiled()
def add_partials(linear, layer, partials, team, runs, y):
    """Add the sum of what the threads left in ``partials`` to the rows of ``y`` that run."""
    p, scale, bias = partials, linear.scale[layer], linear.bias[layer]
    for r in range(y.shape[0]):
        if runs[r]:
            for i in range(y.shape[1]):
                if team == 1:
                    s = p[0, r, i]
                elif team == 2:
                    s = p[0, r, i] + p[4, r, i]
                elif team == 4:
                    s = (p[0, r, i] + p[2, r, i]) + (p[4, r, i] + p[6, r, i])
                else:
                    s = (p[0, r, i] + p[1, r, i]) + (p[2, r, i] + p[3, r, i])
                    s += (p[4, r, i] + p[5, r, i]) + (p[6, r, i] + p[7, r, i])
                if scale.shape[0]:
                    s *= scale[i]
                if bias.shape[0]:
                    s += bias[i]
                y[r, i] += s


@compiled()
def add_correction(linear, layer, lowered, strength, runs, z, y, c0, c1):
    """Add a correction to outputs c0 to c1, from the parts that `partial_product` has lowered."""
    for r in range(y.shape[0] if strength > F0 else 0):
        if runs[r]:
            for k in range(z.shape[1]):
                z[r, k] = F0
                for q in range(PARTIALS):
                    z[r, k] += lowered[q, r, k]
            expand(linear, layer, z[r], strength, y[r], c0, c1)


@compiled()
def swiglu(gate_up, block, f0, f1, out):
    """``out = silu(gate) * up``, from f0 to f1; each block of gates comes before the block of their ups."""
    for start in range(f0, f1, block):
        gates, ups, to = gate_up[2 * start :], gate_up[2 * start + block :], out[start:]
        for i in range(block):
            to[i] = gates[i] / (F1 + exp(-gates[i])) * ups[i]


@compiled()
def exit_gate(decide, e, r, h, n, small):
    """Whether a row leaves at exit e; if so, its state is translated (`hat_lib.method.routers.ExitGate`)."""
    d = h.shape[0]
    factor = F1 / np.sqrt(mean_square(h) + np.float32(1.1920929e-07))
    for i in range(d):
        n[i] = h[i] * factor
    if not inner(n, decide.gate[e]) > decide.gate_threshold[e, r % decide.gate_threshold.shape[1]]:
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
def correct(decide, layer, x, h, small):
    """Add to ``h`` what a skipped FFN of ``x`` is replaced by."""
    rank = decide.correction_down.shape[1]
    for k in range(rank):
        small[k] = inner(x, decide.correction_down[layer, k])
    for i in range(h.shape[0]):
        s = decide.correction_shift[layer, i]
        for k in range(rank):
            s += small[k] * decide.correction_up[layer, i, k]
        h[i] += s


@compiled()
def shortlist(head, scale, x, preview, floor, candidates, logits, t, team):
    """This thread's logits of one row: previews, and in full those that reach ``floor``; returns how many do.

    Threads take pieces in turn: likely tokens have low ids, and one thread would have most of them.
    """
    found, n, vocabulary = 0, 0, logits.shape[0]
    for v0 in range(t * SECTION, vocabulary, team * SECTION):
        v1 = min(v0 + SECTION, vocabulary)
        for v in range(v0, v1):
            logits[v] = as_stored(preview[v], logits[v])
        if not largest(preview[v0:v1]) < floor:
            for v in range(v0, v1):
                candidates[n] = v
                n += preview[v] >= floor
                if n == SECTION:
                    full_logits(head, scale, x, candidates, logits)
                    found, n = found + n, 0
    full_logits(head, scale, x, candidates[:n], logits)
    return found + n


@compiled()
def full_logits(head, scale, x, candidates, logits):
    """The logits of some tokens, from all channels."""
    for k in range(candidates.shape[0]):
        if k + 4 < candidates.shape[0]:
            fetch(head, candidates[k + 4], 0, x.shape[0])
        value = dot(head[candidates[k]], x)
        if scale.shape[0]:
            value *= scale[candidates[k]]
        logits[candidates[k]] = as_stored(value, logits[candidates[k]])
