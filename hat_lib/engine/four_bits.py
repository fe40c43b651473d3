"""Sparse products of weights in four bits, in groups of 32 channels, as in GGUF's Q4_1.

A weight is ``d * q + m``, q in 0..15, with d and m in float16 for each output and group. Inputs are rounded to eight
bits, ``x ~ s * c`` with c in -127..127, one scale s for what a row keeps of a group. The sum of c q is then an integer,
exact in any order, and a group adds ``s d sum(c q) + m s sum(c)`` to an output, in float32, groups in order. Both terms
use the same c, so that the rounding error of c is weighted by the weight, which is less than its distance from m.

Weights are bytes ``[C / 32 * 40, out / 2]``: for each group, the rows of its 32 channels and, in the space of eight
more, its scales, float16 ``[2, out]``. In a row, eight words of 16 bits hold 32 outputs: word j has outputs j, 8 + j,
16 + j and 24 + j, from its lowest bits to its highest.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from hat_lib.engine.compiling import compiled
from hat_lib.engine.kernels import F0, add_channels, prefetch

GROUP, GROUP_ROWS = 32, 40
"""channels that share a scale, and rows of memory that they and their scales take"""
AHEAD = 32
"""how many kept channels ahead to prefetch: no hardware prefetcher can guess what is skipped"""
I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


def _adds(outputs: int):
    """A function that adds a group to this many outputs, with sums in registers; LLVM splits vectors to fit the CPU."""
    words = outputs // 4

    def splat(builder, value, lanes=8):
        some = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        one = builder.insert_element(some, value, I32(0))
        return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))

    def vector(builder, pointer, kind, lanes=8):
        return builder.bitcast(pointer, ir.VectorType(kind, lanes).as_pointer())

    def from_half(builder, pointer):
        """Eight float16 as float32, by integer operations: exact, and no call if the CPU has no instruction for it."""
        bits = builder.sext(builder.load(vector(builder, pointer, I16), align=1), ir.VectorType(I32, 8))
        bits = builder.and_(builder.shl(bits, splat(builder, I32(13))), splat(builder, I32(0x8FFFFFFF)))
        return builder.fmul(builder.bitcast(bits, ir.VectorType(F32, 8)), splat(builder, F32(2.0**112)))

    def build(context, builder, signature, args):
        w, codes, rows, soon, y = (
            cgutils.create_struct_proxy(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:5], args[:5], strict=True)
        )
        width, column, scales, count, factor, total = args[5:]
        size = column.type
        words_at = builder.gep(w, [builder.udiv(column, size(2))])

        # Minus eight times all codes: sums of c (q - 8) fit 16 bits, whatever overflows on the way.
        eight = builder.mul(total, I32(8))
        start = splat(builder, builder.trunc(builder.neg(eight), I16), words)
        sums = [cgutils.alloca_once_value(builder, start) for _ in range(4)]
        with cgutils.for_range(builder, count) as loop:
            row, later, code = (builder.load(builder.gep(a, [loop.index])) for a in (rows, soon, codes))
            four = builder.load(vector(builder, builder.gep(words_at, [row]), I16, words), align=1)
            code = splat(builder, code, words)
            for nibble, s in enumerate(sums):
                q = builder.lshr(four, splat(builder, I16(4 * nibble), words))
                q = builder.and_(q, splat(builder, I16(15), words))
                builder.store(builder.add(builder.load(s), builder.mul(code, q)), s)
            prefetch(builder, builder.gep(words_at, [later]))

        scales = builder.gep(w, [builder.add(scales, builder.mul(column, size(2)))])
        offset = splat(builder, builder.fmul(factor, builder.sitofp(total, F32)))
        factor, eight = splat(builder, factor), splat(builder, eight)
        for i in range(0, outputs, 8):
            of, lanes = builder.load(sums[i // 8 % 4]), [*range(i // 32 * 8, i // 32 * 8 + 8)]
            s = builder.shuffle_vector(of, of, ir.Constant(ir.VectorType(I32, 8), lanes))
            s = builder.add(builder.sext(s, ir.VectorType(I32, 8)), eight)
            d = builder.gep(scales, [size(2 * i)])
            m = builder.gep(d, [builder.mul(width, size(4))])
            to = vector(builder, builder.gep(y, [builder.add(column, size(i))]), F32)
            more = builder.fmul(builder.sitofp(s, ir.VectorType(F32, 8)), builder.fmul(from_half(builder, d), factor))
            more = builder.fadd(builder.load(to, align=4), more)
            more = builder.fadd(more, builder.fmul(from_half(builder, m), offset))
            builder.store(more, to, align=4)
            if i % 32 == 0:
                for pointer in (d, m):
                    prefetch(builder, builder.gep(pointer, [builder.mul(width, size(GROUP_ROWS))]))  # of the next group
        return context.get_dummy_value()

    @intrinsic
    def add_group(context, w, codes, rows, soon, y, width, column, scales, count, factor, total):
        """Add what is kept of a group to ``y[column : column + outputs]``.

        Args:
            codes: int16 ``[count]``, with sum ``total``, of inputs ``factor * codes``.
            rows, soon: where each one's row begins in w, and a row to fetch meanwhile; in bytes, like ``scales``.
            width: bytes per row.
        """
        return types.void(w, codes, rows, soon, y, *[types.intp] * 4, types.float32, types.int32), build

    return add_group


_add_128, _add_32 = _adds(128), _adds(32)


@compiled(reorder=True)
def encode(values, codes):
    """Round ``values`` of a group to ``scale * codes``; returns the scale and the sum of codes."""
    top, total = F0, np.int32(0)
    for i in range(values.shape[0]):
        top = max(top, abs(values[i]))
    factor = np.float32(127) / top if top > np.float32(1e-30) else F0
    for i in range(values.shape[0]):
        codes[i] = np.rint(values[i] * factor)
        total += codes[i]
    return top / np.float32(127), np.int32(total)


@compiled()
def row_of(channel):
    """The row of a channel."""
    return np.intp(channel) + np.intp(channel) // GROUP * (GROUP_ROWS - GROUP)


@compiled()
def add_groups(w, index, values, start, n, filled, y, c0, c1):
    """Like `hat_lib.engine.kernels.add_channels`, for weights in four bits; c0 and c1 are multiples of 32."""
    width, last = w.shape[1], start
    codes, rows, soon = np.empty(GROUP, np.int16), np.empty(GROUP, np.intp), np.empty(GROUP, np.intp)
    for r in range(y.shape[0]):
        y[r, c0:c1] = F0
    while n > start + 1 and index[n - 1] == index[n - 2]:
        n -= 1  # what only pads to a multiple of eight
    while last < n:
        first, group = last, row_of(index[last]) // GROUP_ROWS
        while last < n and row_of(index[last]) // GROUP_ROWS == group:
            rows[last - first] = width * row_of(index[last])
            soon[last - first] = width * row_of(index[min(last + AHEAD, filled - 1)])
            last += 1
        for r in range(y.shape[0]):
            factor, total = encode(values[r, first:last], codes)
            row, column, scales = y[r], c0, width * (GROUP_ROWS * group + GROUP)
            while column + 128 <= c1:
                _add_128(w, codes, rows, soon, row, width, column, scales, last - first, factor, total)
                column += 128
            while column < c1:
                _add_32(w, codes, rows, soon, row, width, column, scales, last - first, factor, total)
                column += 32


def add(w, index, values, start, n, filled, y, c0, c1):
    """In compiled code: `add_groups` for bytes, `add_channels` for weights of any other type."""


@overload(add)
def _add(w, index, values, start, n, filled, y, c0, c1):
    add_all = add_groups if w.dtype == types.uint8 else add_channels
    return lambda w, index, values, start, n, filled, y, c0, c1: add_all(w, index, values, start, n, filled, y, c0, c1)
