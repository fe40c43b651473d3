"""The parts of a decoder layer that `hat_lib.engine.step` puts together; arithmetic is in float32."""

import numpy as np

from hat_lib.engine.arrays import PARTIALS, Product
from hat_lib.engine.compiling import compiled
from hat_lib.engine.integers import add
from hat_lib.engine.kernels import F0, F1, as_float, dot, exp, fetch, keep, span


@compiled(reorder=True)
def mean_square(x):
    return dot(x, x) / np.float32(x.shape[0])


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


@compiled(inline=True)
def of_layer(linear, layer, strength):
    """A `Linear` of one layer, whose correction has this strength."""
    return Product(
        linear.weight[layer], linear.scale[layer], linear.bias[layer], linear.unit[layer], linear.reduce[layer],
        linear.expand[layer], linear.split, strength,
    )  # fmt: skip


@compiled()
def lower(product, inputs, first, last, out):
    """``out[r] = reduce x[r]``, ``[R, rank]``, of a correction, from the channels that row r keeps of first to last."""
    for r in range(inputs.x.shape[0] if product.strength > F0 else 0):
        if inputs.runs[r]:
            row, unit = inputs.x[r, first:last], product.unit[first:last]
            for k in range(product.reduce.shape[0]):
                out[r, k] = kept_dot(product.reduce[k, first:last], row, unit, inputs.bar[r])


@compiled()
def expand(product, z, y, c0, c1):
    """Add a correction to outputs c0 to c1 of one row, ``z`` being what `lower` left."""
    for k in range(z.shape[0]):
        add_scaled(y[c0:c1], product.expand[k, c0:c1], product.strength * z[k])
    add_scaled(y[c0:c1], product.expand[z.shape[0], c0:c1], product.strength)


@compiled()
def fetch_small(product, i0, i1, c0, c1):
    """Prefetch what a product of inputs i0 to i1 and outputs c0 to c1 reads besides its weights."""
    fetch(product.unit, i0, i1)
    if product.strength > F0:
        for k in range(product.reduce.shape[0]):
            fetch(product.reduce[k], i0, i1)
        for k in range(product.expand.shape[0]):
            fetch(product.expand[k], c0, c1)


@compiled()
def whole_product(product, gathered, n, z, y, c0, c1):
    """Outputs c0 to c1, from the n gathered channels; ``z`` is what `lower` left."""
    scale, bias = product.scale, product.bias
    add(product.weight, gathered, 0, n, n, y, c0, c1)
    for r in range(y.shape[0]):
        if scale.shape[0]:
            for j in range(c0, c1):
                y[r, j] *= scale[j]
        if bias.shape[0]:
            for j in range(c0, c1):
                y[r, j] += bias[j]
        if product.strength > F0:
            expand(product, z[r], y[r], c0, c1)


@compiled()
def parts(n, split, thread):
    """The thread's part of n channels: its first and its last of `PARTIALS` parts, and where these begin and end."""
    part, end_part = PARTIALS * thread.t // thread.team, PARTIALS * (thread.t + 1) // thread.team
    return span(n, part, PARTIALS, split), span(n, end_part, PARTIALS, split)


@compiled()
def partial_product(thread, product, inputs, c0, gathered, kept, partials, lowered):
    """A thread's share of a product whose channels are split: long pieces of the weight's rows, from output c0.

    The channels form `PARTIALS` parts, whose sums are added in pairs: the same sum for any number of threads. A thread
    has neighbouring parts, a power of two in number, and leaves its own sum in the first.
    """
    channels, n, c1 = inputs.x.shape[1], 0, partials.shape[2]
    mine = range(PARTIALS * thread.t // thread.team, PARTIALS * (thread.t + 1) // thread.team)
    for p in mine:
        first, last = span(channels, p, PARTIALS, product.split), span(channels, p + 1, PARTIALS, product.split)
        n = keep(inputs, product.unit, first, last, gathered, kept, n)
        gathered.ends[p] = n
        lower(product, inputs, first, last, lowered[p])
    start = 0
    for p in mine:
        add(product.weight, gathered, start, gathered.ends[p], n, partials[p], c0, c1)
        start = gathered.ends[p]
    width = 1
    while width < len(mine):
        for p in range(mine.start, mine.stop, 2 * width):
            for r in range(partials.shape[1]):
                into, other = partials[p, r, c0:c1], partials[p + width, r, c0:c1]
                for i in range(into.shape[0]):
                    into[i] += other[i]
        width *= 2


@compiled()
def add_partials(thread, product, partials, lowered, runs, z, y):
    """Add a product to the rows of ``y`` that run, from what the threads left in ``partials`` and ``lowered``."""
    p, scale, bias, team = partials, product.scale, product.bias, thread.team
    for r in range(y.shape[0]):
        if not runs[r]:
            continue
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
        if product.strength > F0:
            for k in range(z.shape[1]):
                z[r, k] = F0
                for q in range(PARTIALS):
                    z[r, k] += lowered[q, r, k]
            expand(product, z[r], y[r], 0, y.shape[1])


@compiled()
def swiglu(gate_up, block, f0, f1, out):
    """``out = silu(gate) * up``, from f0 to f1; each block of gates comes before the block of their ups."""
    for start in range(f0, f1, block):
        gates, ups, to = gate_up[2 * start :], gate_up[2 * start + block :], out[start:]
        for i in range(block):
            to[i] = gates[i] / (F1 + exp(-gates[i])) * ups[i]


@compiled()
def score(x, router):
    """``router [D + 1]``: weights, and bias."""
    return dot(router, x) + router[x.shape[0]]


@compiled()
def add_low_rank(reduce, expand, start, x, factor, h):
    """``h += factor * (start + expand (reduce x))``."""
    small = np.empty(reduce.shape[0], np.float32)
    for k in range(small.shape[0]):
        small[k] = dot(reduce[k], x)
    for i in range(h.shape[0]):
        s = start[i]
        for k in range(small.shape[0]):
            s += small[k] * expand[i, k]
        h[i] += factor * s


@compiled()
def exit_gate(gates, e, threshold, h, n):
    """Whether a row leaves at exit e; if so, its state is translated (`hat_lib.method.routers.ExitGate`)."""
    square = mean_square(h)
    factor = F1 / np.sqrt(square + np.float32(1.1920929e-07))
    for i in range(h.shape[0]):
        n[i] = h[i] * factor
    if not score(n, gates.router[e]) > threshold:
        return False
    start = np.empty(h.shape[0], np.float32)
    for i in range(h.shape[0]):
        start[i] = gates.scale[e, i] * n[i] + gates.shift[e, i]
    add_low_rank(gates.reduce[e], gates.expand[e], start, n, np.sqrt(square * np.float32(h.shape[0])), h)
    return True
