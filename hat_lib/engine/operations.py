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
def kept_dot(weights, x, unit, bar):
    """``weights . x`` of the channels that `keep` keeps. Slices, or LLVM would not vectorise it; as in `add_scaled`."""
    s = F0
    for i in range(x.shape[0]):
        s += as_float(weights[i]) * (x[i] if not abs(x[i]) <= unit[i] * bar else F0)
    return s


@compiled()
def add_scaled(y, weights, factor):
    for j in range(y.shape[0]):
        y[j] += factor * as_float(weights[j])


@compiled()
def lower(linear, layer, inputs, strength, first, last, out):
    """``out[r] = reduce x[r]``, ``[R, rank]``, of a correction, from the channels that row r keeps of first to last."""
    for r in range(inputs.x.shape[0] if strength > F0 else 0):
        if inputs.runs[r]:
            row, unit = inputs.x[r, first:last], linear.unit[layer, first:last]
            for k in range(linear.reduce.shape[1]):
                out[r, k] = kept_dot(linear.reduce[layer, k, first:last], row, unit, inputs.bar[r])


@compiled()
def expand(linear, layer, z, strength, y, c0, c1):
    """Add a correction to outputs c0 to c1 of one row, ``z`` being what `lower` left."""
    rank = z.shape[0]
    for k in range(rank + 1):
        add_scaled(y[c0:c1], linear.expand[layer, k, c0:c1], strength * (z[k] if k < rank else F1))


@compiled()
def fetch_small(linear, layer, strength, i0, i1, c0, c1):
    """Prefetch what a product of inputs i0 to i1 and outputs c0 to c1 reads besides its weights."""
    fetch(linear.unit, layer, i0, i1)
    if strength > F0:
        for k in range(linear.reduce.shape[1]):
            fetch(linear.reduce[layer], k, i0, i1)
        for k in range(linear.expand.shape[1]):
            fetch(linear.expand[layer], k, c0, c1)


@compiled()
def product(linear, layer, gathered, n, z, strength, y, c0, c1):
    """Outputs c0 to c1 of a product, from the n gathered channels; ``z`` is what `lower` left."""
    scale, bias = linear.scale[layer], linear.bias[layer]
    add(linear.weight[layer], gathered.index, gathered.values, 0, n, n, y, c0, c1)
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
def partial_product(linear, layer, inputs, strength, share, gathered, kept, partials, lowered):
    """A thread's share of a product whose channels are split: long pieces of the weight's rows.

    The channels form `PARTIALS` parts, whose sums are added in pairs: the same sum for any number of threads. A thread
    has neighbouring parts, a power of two in number, and leaves its own sum in the first.
    """
    channels, n, c0, c1 = inputs.x.shape[1], 0, share.c0, share.c1
    for p in range(share.first, share.last):
        first, last = span(channels, p, PARTIALS, linear.split), span(channels, p + 1, PARTIALS, linear.split)
        n = keep(inputs, linear.unit[layer], first, last, gathered.index, gathered.values, kept, n)
        gathered.ends[p] = n
        lower(linear, layer, inputs, strength, first, last, lowered[p])
    start = 0
    for p in range(share.first, share.last):
        end = gathered.ends[p]
        add(linear.weight[layer], gathered.index, gathered.values, start, end, n, partials[p], c0, c1)
        start = end
    width = 1
    while width < share.last - share.first:
        for p in range(share.first, share.last, 2 * width):
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
def exit_gate(gates, e, threshold, h, n, small):
    """Whether a row leaves at exit e; if so, its state is translated (`hat_lib.method.routers.ExitGate`)."""
    d = h.shape[0]
    factor = F1 / np.sqrt(mean_square(h) + np.float32(1.1920929e-07))
    for i in range(d):
        n[i] = h[i] * factor
    if not inner(n, gates.weight[e]) + gates.bias[e] > threshold:
        return False
    length = np.sqrt(mean_square(h) * np.float32(d))
    for k in range(gates.reduce.shape[1]):
        small[k] = inner(n, gates.reduce[e, k])
    for i in range(d):
        change = gates.scale[e, i] * n[i] + gates.shift[e, i]
        for k in range(gates.reduce.shape[1]):
            change += small[k] * gates.expand[e, i, k]
        h[i] += length * change
    return True


@compiled()
def stand_in(terms, layer, strength, x, h, small):
    """Add to ``h`` what a skipped FFN of ``x`` is replaced by."""
    rank = terms.down.shape[1]
    for k in range(rank):
        small[k] = inner(x, terms.down[layer, k])
    for i in range(h.shape[0]):
        s = terms.shift[layer, i]
        for k in range(rank):
            s += small[k] * terms.up[layer, i, k]
        h[i] += strength * s


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
