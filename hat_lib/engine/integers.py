"""Sparse products in integers, of weights in four or eight bits; see `hat_lib.engine.weights` for how they are stored.

Inputs are rounded to eight bits, ``x ~ s c`` with c in -127..127, and one scale s for what a row keeps of a block of 16
channels. Sums over a block, of c and a weight's code, are integers, exact in any order; then times s in float32, blocks
in their order. So the bits are the same whether a channel is skipped or multiplied by zero, and on every CPU that fuses
products and sums alike: the instructions used differ, their sums do not.

Rows of a weight are cut into tiles of 64 bytes, and one of 32 and one of 16 for what is left. Four rows are interleaved
so that the bytes of an output's four channels are neighbours, as ``vpdpbusd`` multiplies them. The order of outputs
inside a tile is such that sums come out as they are stored (`tile_order`).
"""

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic, overload

from hat_lib.engine.arrays import BLOCK, GROUP, GROUP_ROWS, MIDDLE, OFFSET
from hat_lib.engine.compiling import compiled
from hat_lib.engine.kernels import F0, add_channels, prefetch_at
from hat_lib.engine.vectors import (
    F32,
    I8,
    I16,
    I32,
    add_product,
    call,
    data,
    every,
    load,
    prefetch,
    shuffle,
    splat,
    store,
    vector,
)

STEP = 4
"""channels at a time; those of a block are filled up with codes of zero"""
AHEAD = 32, 12
"""how many kept channels ahead to prefetch, since no hardware prefetcher can guess what is skipped; and once more, for
a CPU drops what it has no room for"""
AT_FIRST = 1024
"""bytes of a row to prefetch before a product begins, for as many channels"""


NEEDS = {"vnni": {"+avx512vnni", "+avx512vl", "+avx512bw"}, "avxvnni": {"+avxvnni"}, "avx2": {"+avx2"}, "any": set()}
"""ways to multiply bytes, fastest first, and what a CPU needs for them; "any" is plain code"""


def instructions() -> str:
    """The fastest of `NEEDS` on the CPU that numba compiles for."""
    found = config.CPU_FEATURES
    if found is None:
        found = "" if config.CPU_NAME == "generic" else llvmlite.binding.get_host_cpu_features().flatten()
    return next(how for how, needed in NEEDS.items() if needed <= set(found.split(",")))


def tile_order(outputs: int, bits: int) -> np.ndarray:
    """The outputs of each byte of a row, ``[out * bits / 8, 8 / bits]``, lower bits first; ``out * bits`` is a multiple
    of 128."""
    tiles, column, of_byte = [], 0, 8 // bits
    while column < outputs:
        size = next(n for n in (64, 32, 16) if n * of_byte <= outputs - column)
        sixteen, four, half, byte = np.ogrid[: size // 16, :4, :of_byte, :4]
        order = column + (of_byte * four + half) * size // 4 + 4 * sixteen + byte
        tiles.append(order.transpose(0, 1, 3, 2).reshape(size, of_byte))
        column += size * of_byte
    return np.concatenate(tiles)


def _interleaved(b, left, right, size: int, last: bool):
    """In each 16 bytes, the first or the last half of the elements of two vectors, of ``size`` bytes, in turn."""
    of_lane, wide = 16 // size, vector(ir.IntType(8 * size), left.type.count // size)
    half = range(of_lane // 2 * last, of_lane // 2 * (1 + last))
    order = [k for lane in range(0, wide.count, of_lane) for j in half for k in (lane + j, wide.count + lane + j)]
    return b.bitcast(shuffle(b, b.bitcast(left, wide), b.bitcast(right, wide), order), left.type)


def dot_pairs(b, left, right, how: str = ""):
    """int32 sums of two neighbouring products of int16."""
    n, how = left.type.count // 2, how or instructions()
    if n == 16 and how.startswith("avx"):
        halves = (dot_pairs(b, *(shuffle(b, v, v, [*range(i, i + n)]) for v in (left, right)), how) for i in (0, n))
        return shuffle(b, *halves, [*range(n)])
    if how == "any":
        products = b.mul(*(b.sext(v, vector(I32, 2 * n)) for v in (left, right)))
        return b.add(*(shuffle(b, products, products, [*range(i, 2 * n, 2)]) for i in (0, 1)))
    name = {16: "avx512.pmaddw.d.512", 8: "avx2.pmadd.wd", 4: "sse2.pmadd.wd"}[n]
    return call(b, f"x86.{name}", vector(I32, n), left, right)


def _dot_bytes(b, left, right):
    """int16 sums of two neighbouring products of unsigned and signed bytes, which LLVM does not find by itself."""
    n = left.type.count
    name = {32: "avx2.pmadd.ub.sw", 16: "ssse3.pmadd.ub.sw.128"}[n]
    return call(b, f"x86.{name}", vector(I16, n // 2), left, right)


class _Quads:
    """Sums of four rows at a time, in int32."""

    def __init__(self, b, lanes: int, bits: int, total, how: str):
        self.b, self.lanes, self.bits, self.how = b, lanes, bits, how
        self.units = (1, 1 / 16) if bits == 4 else (1,)
        # Sums of c (q - 8), and of c (q - 8) + 16 c (q' - 8) for the bytes q + 16 q'; or of c w.
        starts = (-17 * MIDDLE, -MIDDLE) if bits == 4 else (-128,) if "vnni" in how else (0,)
        starts = [splat(b, b.mul(total, I32(start)), lanes // 4) for start in starts]
        self.sums = [[cgutils.alloca_once_value(b, start) for start in starts] for _ in range(4)]

    def add(self, rows, codes):
        b = self.b
        four = [load(b, row, I8, self.lanes) for row in rows]
        code = splat(b, b.load(b.bitcast(codes, I32.as_pointer()), align=1), self.lanes // 4)
        for last in (False, True):
            left, right = (_interleaved(b, *four[i : i + 2], 1, last) for i in (0, 2))
            for end in (False, True):
                parts = [_interleaved(b, left, right, 2, end)]
                if self.bits == 4:
                    parts.append(b.and_(parts[0], every(15, parts[0])))
                for s, part in zip(self.sums[2 * last + end], parts, strict=True):
                    b.store(self._dot(b.load(s), part, code), s)

    def _dot(self, s, part, code):
        b, n = self.b, self.lanes
        if "vnni" in self.how:
            part = part if self.bits == 4 else b.xor(part, every(-128, part))
            return call(b, f"x86.avx512.vpdpbusd.{8 * n}", s.type, s, b.bitcast(part, s.type), code)
        code = b.bitcast(code, part.type)
        if self.how == "avx2":
            name = {32: "avx2.psign.b", 16: "ssse3.psign.b.128"}[n]
            signed = call(b, f"x86.{name}", part.type, part, code)
            pairs = _dot_bytes(b, call(b, f"abs.v{n}i8", part.type, code, ir.IntType(1)(0)), signed)
            return b.add(s, dot_pairs(b, pairs, every(1, pairs), self.how))
        wide = (b.zext if self.bits == 4 else b.sext)(part, vector(I32, n))
        products = b.mul(wide, b.sext(code, wide.type))
        for i in range(4):
            s = b.add(s, shuffle(b, products, products, [*range(i, n, 4)]))
        return s

    def vectors(self):
        """int32 sums, in the order of outputs, each in one of its ``units`` in turn."""
        b, loaded = self.b, [[self.b.load(s) for s in of_four] for of_four in self.sums]
        if self.bits == 8:
            return [s for (s,) in loaded]
        return [s for whole, low in loaded for s in (low, b.sub(whole, low))]


class _Pairs:
    """Sums of two rows at a time, for four bits, in int16: those of a block fit, whatever overflows on the way."""

    units = (1,)

    def __init__(self, b, lanes: int, total):
        self.b, self.lanes = b, lanes
        start = splat(b, b.trunc(b.mul(total, I32(-MIDDLE)), I16), lanes // 2)
        # Of halves of each 16 bytes, and of halves of a byte.
        self.sums = [[cgutils.alloca_once_value(b, start) for _ in range(2)] for _ in range(2)]

    def add(self, rows, codes):
        b, n = self.b, self.lanes
        for i in (0, 2):
            code = b.load(b.bitcast(b.gep(codes, [I32(i)]), I16.as_pointer()), align=1)
            code = b.bitcast(splat(b, code, n // 2), vector(I8, n))
            two = [load(b, row, I8, n) for row in rows[i : i + 2]]
            for last in (False, True):
                lower = _interleaved(b, *two, 1, last)
                words = b.bitcast(lower, vector(I16, n // 2))
                upper = b.bitcast(b.lshr(words, every(4, words)), lower.type)
                for s, q in zip(self.sums[last], (lower, upper), strict=True):
                    b.store(b.add(b.load(s), _dot_bytes(b, b.and_(q, every(15, q)), code)), s)

    def vectors(self):
        """As of `_Quads`."""
        b, made = self.b, []
        for four in range(4):
            for s in self.sums[four // 2]:
                order = [at + i for at in range(4 * (four % 2), self.lanes // 2, 8) for i in range(4)]
                words = b.load(s)
                made.append(b.sext(shuffle(b, words, words, order), vector(I32, self.lanes // 4)))
        return made


def _adds(bits: int, outputs: int, how: str):
    """A function that adds a group to this many outputs, with sums in registers."""
    of_byte = 8 // bits
    tile = min(64, outputs // of_byte)
    size = min(tile, 32) if how.startswith("avx") else tile  # bytes of a row at a time

    def build(context, b, signature, args):
        w, codes, rows, y = data(context, b, signature.args[:4], args[:4])
        column, scales, offsets, next_group, at, counts, factors, totals = args[4:]
        integer, n, starts = column.type, size // 4, range(0, outputs // of_byte, size)
        words, found, of_totals = b.gep(w, [b.udiv(column, integer(of_byte))]), [], []
        for block in range(GROUP // BLOCK):
            total = b.extract_value(totals, block)
            if how == "avx2" and bits == 4:
                sums = [_Pairs(b, size, total) for _ in starts]
            else:
                sums = [_Quads(b, size, bits, total, how) for _ in starts]
            full = b.and_(b.add(b.extract_value(counts, block), integer(STEP - 1)), integer(-STEP))
            with cgutils.for_range_slice(b, integer(0), full, integer(STEP)) as (i, _):
                slots = [b.gep(rows, [b.add(b.add(at, i), integer(k))]) for k in range(STEP)]
                here = [b.gep(words, [b.load(slot)]) for slot in slots]
                soon = [b.gep(words, [b.load(b.gep(slot, [integer(a)]))]) for a in AHEAD for slot in slots]
                for start, s in zip(starts, sums, strict=True):
                    s.add([b.gep(row, [integer(start)]) for row in here], b.gep(codes, [i]))
                    for row in soon if start % 64 == 0 else ():
                        prefetch(b, b.gep(row, [integer(start)]))
            codes, at = b.gep(codes, [integer(BLOCK)]), b.add(at, full)
            factor = b.extract_value(factors, block)
            units = [splat(b, b.fmul(factor, F32(unit)), n) for unit in sums[0].units]
            found.append(([s.vectors() for s in sums], units))
            of_totals.append(splat(b, b.fmul(b.sitofp(b.shl(total, I32(OFFSET)), F32), factor), n))

        d_at, m_at = b.gep(w, [b.add(scales, column)]), b.gep(w, [b.add(offsets, b.mul(column, integer(2)))])
        for k, start in enumerate(starts):
            for j in range(4 * of_byte):
                output = start // tile * tile * of_byte + tile // 4 * j + start % tile // 4
                to = b.gep(y, [b.add(column, integer(output))])
                s = load(b, to, F32, n)
                blocks = [(b.sitofp(vectors[k][j], s.type), units[j % len(units)]) for vectors, units in found]
                if bits == 4:
                    places = b.gep(d_at, [integer(output)]), b.gep(m_at, [integer(2 * output)])
                    for place, line in zip(places, (64, 32), strict=True):
                        if output % line == 0:
                            prefetch(b, b.gep(place, [next_group]))
                    d = b.uitofp(load(b, places[0], I8, n), s.type)
                    m = b.sitofp(load(b, places[1], I16, n), s.type)
                    # Never two products in one sum: which of them is fused would be the compiler's choice.
                    blocks = [(v, b.fmul(d, unit)) for v, unit in blocks] + [(m, total) for total in of_totals]
                for block in blocks:
                    s = add_product(b, s, *block)
                store(b, s, to)
        return context.get_dummy_value()

    @intrinsic
    def add_group(context, w, codes, rows, y, column, scales, offsets, next_group, at, counts, factors, totals):
        """Add what is kept of a group to ``y[column : column + outputs]``.

        Args:
            codes: int8 ``[GROUP]``, those of its two blocks, each with zeros after the ``counts`` that are kept.
            rows: where the row of each begins in w, from ``at``, and those of the next ones, to prefetch.
            scales, offsets: where those of the group begin; in bytes, like ``next_group``, from a group to the next.
            factors, totals: of each block, inputs are ``factor * codes``, and the sum of codes.
        """
        blocks = (types.UniTuple(kind, GROUP // BLOCK) for kind in (types.intp, types.float32, types.int32))
        return types.void(w, codes, rows, y, *[types.intp] * 5, *blocks), build

    return add_group


@intrinsic
def encode(context, values, first, count, codes):
    """Round ``count`` inputs of a block, ``values[first:]``, to ``scale * codes``, with zeros up to its width.

    Returns the scale, NaN if one of them is NaN or infinite, and the sum of codes.
    """

    def build(inner, b, signature, args):
        values, codes = data(inner, b, signature.args[::3], args[::3])
        floats, ints = vector(F32, BLOCK), vector(I32, BLOCK)
        kept = b.icmp_signed("<", ir.Constant(ints, [*range(BLOCK)]), splat(b, b.trunc(args[2], I32), BLOCK))
        v = b.select(kept, load(b, b.gep(values, [args[1]]), F32, BLOCK), ir.Constant(floats, None))
        size, zeros = call(b, f"fabs.v{BLOCK}f32", floats, v), b.fmul(v, ir.Constant(floats, None))
        top = call(b, f"vector.reduce.fmax.v{BLOCK}f32", F32, size, fastmath=("nnan", "nsz"))
        check = call(b, f"vector.reduce.fadd.v{BLOCK}f32", F32, F32(0), zeros, fastmath=("reassoc",))
        factor = b.select(b.fcmp_ordered(">", top, F32(1e-30)), b.fdiv(F32(127), top), F32(0))
        code = call(b, f"nearbyint.v{BLOCK}f32", floats, b.fmul(v, splat(b, factor, BLOCK)))
        code = call(b, f"fptosi.sat.v{BLOCK}i32.v{BLOCK}f32", ints, code)  # of NaN: 0
        store(b, b.trunc(code, vector(I8, BLOCK)), codes)
        total = call(b, f"vector.reduce.add.v{BLOCK}i32", I32, code)
        return inner.make_tuple(b, signature.return_type, [b.fadd(b.fdiv(top, F32(127)), check), total])

    return types.Tuple((types.float32, types.int32))(values, types.intp, types.intp, codes), build


def _add_by(bits: int, how: str):
    """`hat_lib.engine.kernels.add_channels` for weights of so many bits; c0 and c1 are multiples of 128, or the end."""
    widest, wide, half, least = (_adds(bits, outputs * 4 // bits, how) for outputs in (256, 128, 64, 32))
    most, group_rows, group_width = 1024 // bits, GROUP_ROWS if bits == 4 else GROUP, np.uint64(GROUP)

    @compiled()
    def add_groups(w, gathered, start, n, filled, y, c0, c1):
        index, values, rows, width = gathered.index, gathered.values, gathered.rows, w.shape[1]
        codes, group_bytes = np.empty(GROUP, np.int8), width * group_rows
        for r in range(y.shape[0]):
            y[r, c0:c1] = F0
        while n > start + 1 and index[n - 1] == index[n - 2]:
            n -= 1  # what only pads to a multiple of eight
        # Where rows begin. Those of a block are filled up with its last one.
        slot, k, soon = 0, start, min(filled, n + AHEAD[0])
        while k < soon:
            block = index[k] // np.uint64(BLOCK)
            skipped = index[k] // group_width * np.uint64(group_rows - GROUP)
            while k < soon and index[k] // np.uint64(BLOCK) == block:
                rows[slot] = np.uint64(width) * (index[k] + skipped)
                slot += 1
                k += 1
            while slot % STEP:
                rows[slot] = rows[slot - 1]
                slot += 1
        rows[slot : slot + AHEAD[0] + STEP] = rows[slot - 1]
        left = c0 * bits // 8
        for at in range(left, min(c1 * bits // 8, left + AT_FIRST), 64):
            for i in range(min(slot, AHEAD[0])):
                prefetch_at(w[0], np.intp(rows[i]) + at)
        slot, last = 0, start
        while last < n:
            first, group = last, index[last] // group_width
            while last < n and index[last] < group * group_width + np.uint64(BLOCK):
                last += 1
            middle = last
            while last < n and index[last] // group_width == group:
                last += 1
            counts, scales = (middle - first, last - middle), group_bytes * np.intp(group) + width * GROUP
            offsets = scales + 2 * width
            for r in range(y.shape[0]):
                factor, total = encode(values[r], first, counts[0], codes)
                factor_2, total_2 = encode(values[r], middle, counts[1], codes[BLOCK:])
                factors, totals, row, at = (factor, factor_2), (total, total_2), y[r], c0
                while at + most <= c1:
                    widest(w, codes, rows, row, at, scales, offsets, group_bytes, slot, counts, factors, totals)
                    at += most
                if at + most // 2 <= c1:
                    wide(w, codes, rows, row, at, scales, offsets, group_bytes, slot, counts, factors, totals)
                    at += most // 2
                if at + most // 4 <= c1:
                    half(w, codes, rows, row, at, scales, offsets, group_bytes, slot, counts, factors, totals)
                    at += most // 4
                if at < c1:
                    least(w, codes, rows, row, at, scales, offsets, group_bytes, slot, counts, factors, totals)
            for count in counts:
                slot += (count + STEP - 1) // STEP * STEP

    return add_groups


_four, _eight = (_add_by(bits, instructions()) for bits in (4, 8))


def add(w, gathered, start, n, filled, y, c0, c1):
    """In compiled code: a product in integers for weights that are bytes, `add_channels` for those of other types."""


@overload(add)
def _add(w, gathered, start, n, filled, y, c0, c1):
    add_all = {types.uint8: _four, types.int8: _eight}.get(w.dtype, add_channels)
    return lambda w, gathered, start, n, filled, y, c0, c1: add_all(w, gathered, start, n, filled, y, c0, c1)
