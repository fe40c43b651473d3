"""FFNs of chosen neurons: a preview of all in four bits says which, and only their rows of gate and up are read.

It decides as `hat_lib.model.routers.NeuronRouter`: products of integers are exact. A preview has a row a neuron, so its
memory is one long piece; four rows at a time share the loads of the inputs. Byte j of 32 holds input j of 64 in its
lower bits and input 32 + j in its upper ones, each plus `MIDDLE`.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from hat_lib.engine.compiling import compiled
from hat_lib.engine.four_bits import (
    I8,
    I16,
    I32,
    MIDDLE,
    _dot_bytes,
    _dot_pairs,
    _load,
    _shuffle,
    _splat,
    _vector,
    encode,
    has_avx2,
)
from hat_lib.engine.kernels import F0, F1, as_float, exp, prefetch_at

CHUNK = 64
"""inputs in 32 bytes"""
TOGETHER = 4
"""rows of a preview, and chunks whose sums fit 16 bits: 4 * 4 * 15 * 127 < 2 ** 15"""


def _words(builder, sums, avx2: bool):
    """int16 ``[16]`` to the sums of neighbours, int32 ``[8]``."""
    if not avx2:
        wide = builder.sext(sums, _vector(I32, 16))
        return _dot_pairs(builder, wide, ir.Constant(wide.type, [1] * 16))
    kind = ir.FunctionType(_vector(I32, 8), [sums.type, sums.type])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
    return builder.call(call, [sums, ir.Constant(sums.type, [1] * 16)])


def _four_rows(avx2: bool):
    def build(context, builder, signature, args):
        w, codes, out = (
            cgutils.create_struct_proxy(kind)(context, builder, value).data
            for kind, value in ((signature.args[i], args[i]) for i in (0, 3, 5))
        )
        at, width, total, place = args[1], args[2], args[4], args[6]
        size = at.type
        rows = [builder.gep(w, [builder.add(at, builder.mul(width, size(r)))]) for r in range(TOGETHER)]
        zero = ir.Constant(_vector(I32, 8), [0] * 8)
        wide = [cgutils.alloca_once_value(builder, zero) for _ in rows]

        def chunks(start, count: int):
            """Add this many chunks, from chunk ``start`` on."""
            sums = [None] * len(rows)
            for k in range(count):
                chunk = builder.add(start, size(k))
                inputs = builder.gep(codes, [builder.mul(chunk, size(CHUNK))])
                lower, upper = (_load(builder, builder.gep(inputs, [size(i)]), I8, 32) for i in (0, 32))
                for r, row in enumerate(rows):
                    both = _load(builder, builder.gep(row, [builder.mul(chunk, size(32))]), I8, 32)
                    shifted = builder.lshr(builder.bitcast(both, _vector(I16, 16)), _splat(builder, I16(4), 16))
                    mask = _splat(builder, I8(15), 32)
                    first = _dot_bytes(builder, builder.and_(both, mask), lower, avx2)
                    second = _dot_bytes(builder, builder.and_(builder.bitcast(shifted, both.type), mask), upper, avx2)
                    more = builder.add(first, second)
                    sums[r] = more if sums[r] is None else builder.add(sums[r], more)
            for to, s in zip(wide, sums, strict=True):
                builder.store(builder.add(builder.load(to), _words(builder, s, avx2)), to)

        number = builder.udiv(width, size(32))
        several = builder.udiv(number, size(TOGETHER))
        with cgutils.for_range(builder, several) as loop:
            chunks(builder.mul(loop.index, size(TOGETHER)), TOGETHER)
        done = builder.mul(several, size(TOGETHER))
        with cgutils.for_range(builder, builder.sub(number, done)) as loop:
            chunks(builder.add(done, loop.index), 1)

        # The sums of eight lanes of four rows, by adding halves, then halves of two rows at a time.
        half = [_shuffle(builder, s, s, [*range(8)]) for s in map(builder.load, wide)]
        half = [builder.add(_shuffle(builder, s, s, [0, 1, 2, 3]), _shuffle(builder, s, s, [4, 5, 6, 7])) for s in half]
        pairs = [
            builder.add(_shuffle(builder, a, b, [0, 2, 4, 6]), _shuffle(builder, a, b, [1, 3, 5, 7]))
            for a, b in (half[:2], half[2:])
        ]
        four = builder.add(_shuffle(builder, *pairs, [0, 2, 4, 6]), _shuffle(builder, *pairs, [1, 3, 5, 7]))
        four = builder.sub(four, _splat(builder, builder.mul(total, I32(MIDDLE)), 4))
        builder.store(
            builder.sitofp(four, _vector(ir.FloatType(), 4)),
            builder.bitcast(builder.gep(out, [place]), _vector(ir.FloatType(), 4).as_pointer()),
            align=4,
        )
        return context.get_dummy_value()

    @intrinsic
    def four_rows(context, w, at, width, codes, total, out, place):
        """``out[place : place + 4]``, float32, is what four rows of ``width`` bytes, from byte ``at``, give for int8
        inputs ``codes`` with sum ``total``."""
        return types.void(w, types.intp, types.intp, codes, types.int32, out, types.intp), build

    return four_rows


four_rows = _four_rows(has_avx2())


@intrinsic
def _pointer(context, address, like):
    """An address as a pointer to numbers of ``like``'s type."""
    kind = types.CPointer(like.dtype)

    def build(inner, builder, _, args):
        return builder.inttoptr(args[0], inner.get_value_type(kind))

    return kind(types.uint64, like), build


@compiled(inline=True)
def matrix(address, shape, like):
    """The matrix of ``shape`` at an address, with numbers of ``like``'s type."""
    return carray(_pointer(address, like), shape)


@compiled(reorder=True)
def four_dots(gate_a, up_a, gate_b, up_b, x):
    """Of gate and up of two neurons, which share the loads of x."""
    a, b, c, d = F0, F0, F0, F0
    for i in range(x.shape[0]):
        a += as_float(gate_a[i]) * x[i]
        b += as_float(up_a[i]) * x[i]
        c += as_float(gate_b[i]) * x[i]
        d += as_float(up_b[i]) * x[i]
    return a, b, c, d


@compiled()
def activate(gates, ups, out):
    """``out = silu(gates) * ups``."""
    for i in range(out.shape[0]):
        out[i] = gates[i] / (F1 + exp(-gates[i])) * ups[i]


@compiled(reorder=True)
def amount(x):
    s = F0
    for i in range(x.shape[0]):
        s += x[i]
    return s


@compiled()
def preview(base, layer, x, codes, f0, f1, buffer, out):
    """Set ``out[f0:f1]`` to about the input of down, from ``x [D]``; ``codes`` and ``buffer`` are working memory."""
    width, neurons = x.shape[0], base.neuron_scale.shape[1] // 2
    scale, total = encode(x, codes[:width])
    w, stride, factors = base.neuron_codes[layer].reshape(-1), base.neuron_codes.shape[2], base.neuron_scale[layer]
    gates, ups = buffer, buffer[neurons + TOGETHER :]
    for f in range(f0, f1, TOGETHER):
        four_rows(w, f * stride, stride, codes, total, gates, f)
        four_rows(w, (neurons + f) * stride, stride, codes, total, ups, f)
    for f in range(f0, f1):
        gates[f] *= factors[f] * scale
        ups[f] *= factors[neurons + f] * scale
    activate(gates[f0:f1], ups[f0:f1], out[f0:f1])


@compiled()
def chosen_neurons(
    base, layer, x, threshold, scale, keep_all, runs, z, strength, f0, f1, index, codes, buffer, kept, out
):
    """Set ``out[r, f0:f1]`` to the input of down, ``[R, F]``: exact for the neurons that row r chooses, 0 for others.

    A row chooses neuron f if ``|preview| > threshold[f] * scale[r]``; all if ``keep_all[r]``; none unless ``runs[r]``.
    A neuron is computed for all rows if one of them chooses it. ``buffer`` is ``[R, 2F + 8]``. What a row reads, the
    preview left out, is added to ``kept [R]``, in channels of gate and up.
    """
    count, width, neurons = x.shape[0], x.shape[1], threshold.shape[0]
    for r in range(count):
        row, factor, everything = out[r], scale[r], keep_all[r]
        if runs[r] and not everything:
            preview(base, layer, x[r], codes, f0, f1, buffer[r], row)
        for f in range(f0, f1):
            row[f] = F1 if runs[r] & (everything | (abs(row[f]) > threshold[f] * factor)) else F0
        kept[r] += np.int32(amount(row[f0:f1]) * np.float32(width) / np.float32(neurons) + np.float32(0.5))
    n = 0
    for f in range(f0, f1):
        wanted = False
        for r in range(count):
            wanted |= out[r, f] > F0
        index[n] = f
        n += wanted
    if n == 0:
        return
    index[n] = index[n + 1] = index[n + 2] = index[n - 1]

    gate = matrix(base.neuron_rows[layer, 0], (neurons, width), base.neuron_type)
    up = matrix(base.neuron_rows[layer, 1], (neurons, width), base.neuron_type)
    line, rank = 64 // gate.itemsize, z.shape[1]
    factors, bias, expand = base.gate_up.scale[layer], base.gate_up.bias[layer], base.gate_up.expand[layer]
    for k in range(0, n, 2):
        a, b = np.intp(index[k]), np.intp(index[k + 1])
        for soon in (np.intp(index[min(k + 2, n)]), np.intp(index[min(k + 3, n)])):
            for i in range(0, width, line):
                prefetch_at(gate, soon, i)
                prefetch_at(up, soon, i)
        for r in range(count):
            gates, ups = buffer[r], buffer[r, neurons + TOGETHER :]
            gates[k], ups[k], gates[k + 1], ups[k + 1] = four_dots(gate[a], up[a], gate[b], up[b], x[r])
    for k in range(n):
        f = np.intp(index[k])
        place = f // base.block * 2 * base.block + f % base.block  # of a gate, among alternating blocks
        for r in range(count):
            gates, ups = buffer[r], buffer[r, neurons + TOGETHER :]
            if gate.itemsize == 1:
                gates[k] *= factors[place]
                ups[k] *= factors[place + base.block]
            if bias.shape[0]:
                gates[k] += bias[place]
                ups[k] += bias[place + base.block]
            if strength > F0:
                for i in range(rank + 1):
                    more = strength * (z[r, i] if i < rank else F1)
                    gates[k] += more * as_float(expand[i, place])
                    ups[k] += more * as_float(expand[i, place + base.block])
    for r in range(count):
        gates, ups = buffer[r], buffer[r, neurons + TOGETHER :]
        activate(gates[:n], ups[:n], gates[:n])
        for k in range(n):
            out[r, np.intp(index[k])] *= gates[k]
