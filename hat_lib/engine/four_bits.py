"""Sparse products of weights in four bits, in groups of 32 channels, as in GGUF's Q4_1.

A weight is ``D (d (q - 8) + 4 m)``: q in 0..15; d in 0..127 and m in -127..127 for each output and group; D in float32
for each output, applied by the caller. Inputs are rounded to eight bits, ``x ~ s c`` with c in -127..127, one scale s
for what a row keeps of a group. So a group adds ``s (d sum(c (q - 8)) + 4 m sum(c))`` to an output: an integer, exact
in any order, times s in float32, groups in order.

Weights are bytes ``[C / 32 * 36, out / 2]``: for each group, the rows of its 32 channels and, in the space of four
more, its pairs of d and m. In a row, eight bytes hold 16 outputs: byte j has output j in its lower bits and output
8 + j in its upper ones.
"""

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic, overload

from hat_lib.engine.arrays import GROUP, GROUP_ROWS
from hat_lib.engine.compiling import compiled
from hat_lib.engine.kernels import F0, add_channels, prefetch

MIDDLE, OFFSET = 8, 4
"""what is taken from q, so that sums fit 16 bits, and the unit of m, so that 4 sum(c) does"""
AHEAD = 32
"""how many kept channels ahead to prefetch: no hardware prefetcher can guess what is skipped"""
I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


def has_avx2() -> bool:
    """Whether numba compiles for a CPU with AVX2."""
    features = config.CPU_FEATURES
    if features is None:
        features = "" if config.CPU_NAME == "generic" else llvmlite.binding.get_host_cpu_features().flatten()
    return "+avx2" in features


def _vector(kind, n: int):
    return ir.VectorType(kind, n)


def _load(builder, pointer, kind, n):
    return builder.load(builder.bitcast(pointer, _vector(kind, n).as_pointer()), align=1)


def _shuffle(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(_vector(I32, len(order)), order))


def _splat(builder, value, n):
    one = builder.insert_element(ir.Constant(_vector(value.type, n), ir.Undefined), value, I32(0))
    return _shuffle(builder, one, one, [0] * n)


def _dot_pairs(builder, a, b):
    """Sums of two neighbouring products each."""
    products = builder.mul(a, b)
    even, odd = (_shuffle(builder, products, products, [*range(i, a.type.count, 2)]) for i in (0, 1))
    return builder.add(even, odd)


def _dot_bytes(builder, q, codes, avx2: bool):
    """The same of bytes, q unsigned and codes signed, as int16; LLVM does not find the instruction by itself."""
    n = q.type.count
    if not avx2:
        return _dot_pairs(builder, builder.zext(q, _vector(I16, n)), builder.sext(codes, _vector(I16, n)))
    name = {32: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.ssse3.pmadd.ub.sw.128"}[n]
    kind = ir.FunctionType(_vector(I16, n // 2), [q.type, codes.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [q, codes])


def _adds(outputs: int, avx2: bool):
    """A function that adds a group to this many outputs, with sums in registers."""
    lanes = min(32, outputs // 2)  # bytes of a row at a time
    words = lanes // 2
    # Bytes of two rows in turn, in each half of a vector: the first eight of the half, or the last.
    mixes = [[k for i in range(0, lanes, 16) for j in range(i, i + 8) for k in (j + e, lanes + j + e)] for e in (0, 8)]

    def build(context, builder, signature, args):
        w, codes, rows, soon, y = (
            cgutils.create_struct_proxy(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:5], args[:5], strict=True)
        )
        column, scales, next_group, pairs, factor, total = args[5:]
        size = column.type
        words_at = builder.gep(w, [builder.udiv(column, size(2))])
        codes = builder.bitcast(codes, I16.as_pointer())

        # Sums of c (q - 8) fit 16 bits, whatever overflows on the way.
        start = _splat(builder, builder.trunc(builder.mul(total, I32(-MIDDLE)), I16), words)
        sums = [cgutils.alloca_once_value(builder, start) for _ in range(outputs // words)]
        with cgutils.for_range(builder, pairs) as loop:
            code = _splat(builder, builder.load(builder.gep(codes, [loop.index]), align=1), words)
            code = builder.bitcast(code, _vector(I8, lanes))
            first = builder.add(loop.index, loop.index)
            two = first, builder.add(first, size(1))
            here = [builder.gep(words_at, [builder.load(builder.gep(rows, [i]))]) for i in two]
            to = iter(sums)
            for part in range(0, outputs // 2, lanes):
                a, b = (_load(builder, builder.gep(row, [size(part)]), I8, lanes) for row in here)
                for mix in mixes:
                    lower = _shuffle(builder, a, b, mix)
                    upper = builder.lshr(builder.bitcast(lower, start.type), _splat(builder, I16(4), words))
                    for q in lower, builder.bitcast(upper, lower.type):
                        more = _dot_bytes(builder, builder.and_(q, _splat(builder, I8(15), lanes)), code, avx2)
                        s = next(to)
                        builder.store(builder.add(builder.load(s), more), s)
            for i in two:
                prefetch(builder, builder.gep(words_at, [builder.load(builder.gep(soon, [i]))]))

        scales = builder.gep(w, [builder.add(scales, builder.mul(column, size(2)))])
        offset = _splat(builder, builder.shl(builder.mul(total, I32(OFFSET)), I32(16)), 8)
        factor = _splat(builder, factor, 8)
        for i in range(0, outputs, 8):
            part, at = divmod(i, 2 * lanes)
            s = builder.load(sums[4 * part + at // 8 % 4])
            s = _shuffle(builder, s, s, [*range(at // 32 * 8, at // 32 * 8 + 8)])
            both = builder.or_(builder.zext(s, _vector(I32, 8)), offset)  # the sum of c (q - 8), and 4 sum(c)
            both = builder.sext(builder.bitcast(both, _vector(I16, 16)), _vector(I32, 16))
            place = builder.gep(scales, [size(2 * i)])
            if i % 32 == 0:
                prefetch(builder, builder.gep(place, [next_group]))
            more = _dot_pairs(builder, both, builder.sext(_load(builder, place, I8, 16), both.type))
            more = builder.fmul(builder.sitofp(more, _vector(F32, 8)), factor, flags=("contract",))
            to = builder.bitcast(builder.gep(y, [builder.add(column, size(i))]), more.type.as_pointer())
            builder.store(builder.fadd(builder.load(to, align=4), more, flags=("contract",)), to, align=4)
        return context.get_dummy_value()

    @intrinsic
    def add_group(context, w, codes, rows, soon, y, column, scales, next_group, pairs, factor, total):
        """Add what is kept of a group to ``y[column : column + outputs]``.

        Args:
            codes: int8 ``[2 * pairs]``, with sum ``total``, of inputs ``factor * codes``.
            rows, soon: where each one's row begins in w, and a row to fetch meanwhile; in bytes, like ``scales``.
            next_group: bytes from a group to the next.
        """
        return types.void(w, codes, rows, soon, y, *[types.intp] * 4, types.float32, types.int32), build

    return add_group


_add_128, _add_64, _add_32 = (_adds(outputs, has_avx2()) for outputs in (128, 64, 32))


@compiled(numbers=True)
def magnitude(values):
    """The largest."""
    top = F0
    for i in range(values.shape[0]):
        top = max(top, abs(values[i]))
    return top


@compiled(reorder=True)
def encode(values, codes):
    """Round ``values`` of a group to ``scale * codes``; returns the scale, NaN if one of them is NaN or infinite, and
    the sum of codes."""
    top, total, check = magnitude(values), np.int32(0), F0
    for i in range(values.shape[0]):
        check += values[i] * F0
    factor = np.float32(127) / top if top > np.float32(1e-30) else F0
    for i in range(values.shape[0]):
        code = np.int32(np.rint(values[i] * factor))
        codes[i] = np.int8(code)
        total += code
    return top / np.float32(127) + check, np.int32(total)


@compiled()
def row_of(channel):
    """The row of a channel."""
    return channel + channel // np.uint64(GROUP) * np.uint64(GROUP_ROWS - GROUP)


@compiled()
def add_groups(w, gathered, start, n, filled, y, c0, c1):
    """Like `hat_lib.engine.kernels.add_channels`, for weights in four bits; c0 and c1 are multiples of 32."""
    index, values, last = gathered.index, gathered.values, start
    width, group_bytes = np.uint64(w.shape[1]), w.shape[1] * GROUP_ROWS
    x, codes = np.empty(GROUP, np.float32), np.empty(GROUP, np.int8)
    rows, soon = np.empty(GROUP, np.uint64), np.empty(GROUP, np.uint64)
    for r in range(y.shape[0]):
        y[r, c0:c1] = F0
    while n > start + 1 and index[n - 1] == index[n - 2]:
        n -= 1  # what only pads to a multiple of eight
    while last < n:
        first, group = last, index[last] // np.uint64(GROUP)
        while last < n and index[last] // np.uint64(GROUP) == group:
            last += 1
        count = last - first
        for k in range(count):
            rows[k] = width * row_of(index[first + k])
            soon[k] = width * row_of(index[min(first + k + AHEAD, filled - 1)])
        if count % 2:  # the last one's pair, with a code of zero
            rows[count], soon[count] = rows[count - 1], soon[count - 1]
        scales = group_bytes * np.intp(group) + w.shape[1] * GROUP
        for r in range(y.shape[0]):
            x[:] = F0
            for k in range(count):
                x[k] = values[r, first + k]
            factor, total = encode(x, codes)
            row, column, pairs = y[r], c0, (count + 1) // 2
            while column + 128 <= c1:
                _add_128(w, codes, rows, soon, row, column, scales, group_bytes, pairs, factor, total)
                column += 128
            if column + 64 <= c1:
                _add_64(w, codes, rows, soon, row, column, scales, group_bytes, pairs, factor, total)
                column += 64
            if column < c1:
                _add_32(w, codes, rows, soon, row, column, scales, group_bytes, pairs, factor, total)


def add(w, gathered, start, n, filled, y, c0, c1):
    """In compiled code: `add_groups` for bytes, `add_channels` for weights of any other type."""


@overload(add)
def _add(w, gathered, start, n, filled, y, c0, c1):
    add_all = add_groups if w.dtype == types.uint8 else add_channels
    return lambda w, gathered, start, n, filled, y, c0, c1: add_all(w, gathered, start, n, filled, y, c0, c1)
