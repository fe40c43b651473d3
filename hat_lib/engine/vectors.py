"""Vectors in LLVM's own language, for what LLVM does not find by itself; ``b`` is llvmlite's builder."""

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64, F32 = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
FUSED = ("contract",)
"""a product and a sum may be rounded once"""


def vector(kind, n: int):
    return ir.VectorType(kind, n)


def data(context, b, kinds, arrays) -> list:
    """Where arrays begin in memory."""
    return [
        cgutils.create_struct_proxy(kind)(context, b, array).data for kind, array in zip(kinds, arrays, strict=True)
    ]


def load(b, pointer, kind, n: int):
    return b.load(b.bitcast(pointer, vector(kind, n).as_pointer()), align=1)


def store(b, value, pointer):
    b.store(value, b.bitcast(pointer, value.type.as_pointer()), align=1)


def every(number, like):
    """A constant in each lane of a vector like another."""
    return ir.Constant(like.type, [number] * like.type.count)


def shuffle(b, left, right, order):
    return b.shuffle_vector(left, right, ir.Constant(vector(I32, len(order)), order))


def splat(b, value, n: int):
    """A value in each of n lanes."""
    one = b.insert_element(ir.Constant(vector(value.type, n), ir.Undefined), value, I32(0))
    return shuffle(b, one, one, [0] * n)


def call(b, name: str, result, *args, fastmath=()):
    """Call one of LLVM's functions."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}"), args, fastmath=fastmath)


def add_product(b, s, left, right):
    """``s + left * right``, fused where the CPU can."""
    return b.fadd(s, b.fmul(left, right, flags=FUSED), flags=FUSED)


def prefetch(b, pointer):
    """Prefetch a cache line into the second-level cache: the first is full of what is being added."""
    call(b, "prefetch.p0", ir.VoidType(), b.bitcast(pointer, I8.as_pointer()), I32(0), I32(2), I32(1))
