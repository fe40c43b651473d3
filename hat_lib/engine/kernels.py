"""Sparse products: a channel that is not kept is memory that is not read.

Weights are stored transposed, ``[C, out]``, so that input channel i of a linear layer is one row, and
``y = sum_i x_i W[i]`` runs over the rows of the kept channels only. Eight rows are added at a time, so that y, which
stays in the nearest cache, is loaded and stored once for eight of them.

Sums over channels are in their order, never reassociated. So the bits are the same whether a channel is skipped or
multiplied by zero, whether a token is alone or among others, and for any number of threads.
"""

from functools import reduce

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from hat_lib.engine.compiling import compiled
from hat_lib.engine.vectors import (
    F32,
    I32,
    add_product,
    data,
    every,
    load,
    prefetch,
    splat,
    store,
    vector,
)

F0, F1 = np.float32(0), np.float32(1)
LEAST = np.float32(-np.inf)
"""below every number"""
LANES = 16
"""outputs at a time with several rows"""
COLUMNS = 2048
"""outputs at a time: for these, eight rows of a weight and the sums of eight tokens fit the nearest caches"""


def as_float(stored):
    """A stored weight as a float32, from a float32 or the bits of a bfloat16 (uint16). In compiled code."""


@overload(as_float)
def _as_float(stored):
    if stored == types.uint16:
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    return lambda stored: stored


def as_stored(value, like):
    """A float32 in the form of ``like``: itself, or the bits of the nearest bfloat16 (ties to even; NaN stays NaN), as
    uint16. In compiled code."""


@overload(as_stored)
def _as_stored(value, like):
    def shorten(value, like):
        bits = np.float32(value).view(np.uint32)
        rounded = np.uint32(bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
        return np.uint16(0x7FC0) if value != value else np.uint16(rounded >> np.uint32(16))

    return (lambda value, like: value) if like == types.float32 else shorten


@intrinsic
def power_of_two(context, exponent):
    """``2.0 ** exponent`` for an int32 from -126 to 127, as a float32. In 32 bits throughout, or `exp` takes longer."""

    def build(_, builder, __, args):
        i32 = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.add(args[0], i32(127)), i32(23)), ir.FloatType())

    return types.float32(types.int32), build


@compiled()
def exp(x):
    """``e ** x`` in float32 to a relative error of about 2e-7, in a form that vectorises; 0 below -87, and infinity or
    NaN where that is so."""
    x = min(max(x, np.float32(-87)), np.float32(89))
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    f = (x - whole * np.float32(0.693145752)) - whole * np.float32(1.42860677e-6)  # minus whole * ln 2, in two parts
    tail = np.float32(1 / 120) + f * (np.float32(1 / 720) + f * np.float32(1 / 5040))
    series = F1 + f * (F1 + f * (np.float32(1 / 2) + f * (np.float32(1 / 6) + f * (np.float32(1 / 24) + f * tail))))
    return (series + series) * power_of_two(np.int32(whole) - np.int32(1))  # in two steps: 2 ** 128 is infinity


@intrinsic
def add_eight(context, w, index, k, values, y, column):
    """Add eight channels, from ``index[k]``, to `LANES` outputs of every row. All arrays are contiguous.

    Vectorised by hand: when two rows are written, LLVM cannot be sure that neither is also read.
    """

    def build(inner, b, signature, args):
        def pointer(i, *offsets):
            (whole,) = data(inner, b, signature.args[i : i + 1], args[i : i + 1])
            return b.gep(whole, [reduce(b.add, offsets)])

        def shape(i):
            return cgutils.unpack_tuple(b, cgutils.create_struct_proxy(signature.args[i])(inner, b, args[i]).shape)

        def widened(channel):
            at = pointer(0, b.mul(channel, shape(0)[1]), args[5])
            stored = load(b, at, at.type.pointee, LANES)
            if w.dtype == types.float32:
                return stored
            bits = b.zext(stored, vector(I32, LANES))
            return b.bitcast(b.shl(bits, every(16, bits)), vector(F32, LANES))

        count, outputs = shape(4)
        eight = [widened(b.load(b.gep(pointer(1, args[2]), [I32(i)]))) for i in range(8)]
        with cgutils.for_range(b, count) as loop:
            x = pointer(3, b.mul(loop.index, shape(3)[1]), args[2])
            to = pointer(4, b.mul(loop.index, outputs), args[5])
            s = load(b, to, F32, LANES)
            for i, weight in enumerate(eight):
                s = add_product(b, s, splat(b, b.load(b.gep(x, [I32(i)])), LANES), weight)
            store(b, s, to)
        return inner.get_dummy_value()

    return types.void(w, index, types.intp, values, y, types.intp), build


@intrinsic
def prefetch_at(context, w, place):
    """Prefetch the cache line with element ``place`` of a contiguous array; it may lie beyond the array's end."""

    def build(inner, b, signature, args):
        prefetch(b, b.gep(data(inner, b, signature.args[:1], args[:1])[0], [args[1]]))
        return inner.get_dummy_value()

    return types.void(w, types.intp), build


@compiled()
def fetch(row, c0, c1):
    """Prefetch elements c0 to c1."""
    for column in range(c0, c1, 64 // row.itemsize):
        prefetch_at(row, column)


@compiled()
def add_channels(w, gathered, start, n, filled, y, c0, c1):
    """``y[r, c0:c1] = sum_k values[r, k] * w[index[k], c0:c1]`` for k from ``start`` to n, a multiple of eight apart.

    Of the ``filled`` channels that were gathered, those after n will be added next.
    """
    index, values, line = gathered.index, gathered.values, 64 // w.itemsize
    for left in range(c0, c1, COLUMNS):
        right = min(left + COLUMNS, c1)
        for r in range(y.shape[0]):
            y[r, left:right] = F0
        begin = right - (right - left) % LANES
        lines = (begin - left + line - 1) // line
        # Hardware fetches ahead of lines that are read in order, and beyond a short row that is mostly in vain. So its
        # second half is read backwards: ahead of it lies what has been read.
        upwards = (lines + 1) // 2
        for k in range(start, n, 8):
            # No hardware prefetcher foresees which rows are next, even if all are kept, since rows are short.
            ahead, shift = min(k + 8, filled - 8), 0
            if k + 8 >= n and right < c1:
                ahead, shift = start, right - left
            for step in range(lines):
                first = left + (step if step < upwards else lines - 1 - step + upwards) * line
                for i in range(8):
                    prefetch_at(w, np.intp(index[ahead + i]) * w.shape[1] + first + shift)
                for j in range(first, min(first + line, begin), LANES):
                    add_eight(w, index, k, values, y, j)
            for r in range(y.shape[0]):
                for j in range(begin, right):
                    for i in range(k, k + 8):
                        y[r, j] += values[r, i] * as_float(w[index[i], j])


@compiled()
def keep(inputs, unit, first, last, gathered, kept, start=0):
    """Gather the channels from ``first`` to ``last`` that any row keeps; a row that does not gets a zero there.

    Args:
        inputs: `hat_lib.engine.arrays.Inputs`. What is NaN is kept: multiplied by zero it is NaN, too.
        unit: float32 ``[C]``.
        gathered: `hat_lib.engine.arrays.Gathered`, filled from ``start``, and with zeros up to a multiple of eight.
        kept: int32 ``[R]``, to which the number of channels that each row kept is added.

    Returns how many there are now.
    """
    n, rows, index, values = start, len(inputs.x), gathered.index, gathered.values
    if rows == 1:
        row, to, bar = inputs.x[0], values[0], inputs.bar[0]
        for i in range(first, last):
            index[n], to[n] = i, row[i]
            n += not abs(row[i]) <= unit[i] * bar
        kept[0] += n - start
    else:
        for i in range(first, last):
            index[n], wanted = i, 0
            for r in range(rows):
                by_row = inputs.runs[r] & (not abs(inputs.x[r, i]) <= unit[i] * inputs.bar[r])
                values[r, n] = inputs.x[r, i] if by_row else F0
                kept[r] += by_row
                wanted |= by_row
            n += wanted
    full = start + (n - start + 7) // 8 * 8
    for k in range(n, full):
        index[k] = index[n - 1]  # a row that has just been read
        for r in range(rows):
            values[r, k] = F0
    return full


@compiled()
def span(n, t, team, step):
    """Where part t of ``team`` parts of ``range(n)`` begins, at a multiple of ``step``; n for ``t == team``."""
    return n if t == team else min(n, (n * t // team + step - 1) // step * step)


@compiled(reorder=True)
def dot(a, b):
    s = F0
    for i in range(b.shape[0]):
        s += as_float(a[i]) * b[i]
    return s
