"""A small vocabulary for kernels: plain functions that return TIR expressions.

Everything here is generic LLVM, so it compiles for any CPU; vectors wider than the machine's are
split by LLVM.
"""

import math
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class VectorUnit:
    """What decides the tiles of a kernel: float32 lanes of a vector register, and registers."""

    lanes: int
    registers: int


def vector_unit(target: tvm.target.Target | None) -> VectorUnit:
    """The widest vectors that code for a CPU target may use; without one, those of any CPU."""
    if target is None:
        return VectorUnit(4, 16)
    if "aarch64" in str(target.attrs.get("mtriple", "")) or _has(target, "neon"):
        return VectorUnit(4, 32)
    if _has(target, "avx512f"):
        return VectorUnit(16, 32)
    return VectorUnit(8 if _has(target, "avx") else 4, 16)


def _has(target: tvm.target.Target, feature: str) -> bool:
    return bool(tvm.target.codegen.target_has_features(feature, target))


def splat(value: Expr | float, lanes: int) -> Expr:
    """The same float32 in every lane."""
    value = T.float32(value) if isinstance(value, (int, float)) else value
    return T.broadcast(value, lanes) if lanes > 1 else value


def to_float32(value: Expr, lanes: int) -> Expr:
    """Convert a vector of any float dtype to float32."""
    return T.cast(value, "float32" if lanes == 1 else f"float32x{lanes}")


def vector(dtype: str, lanes: int) -> str:
    """The name of a vector dtype: ("float16", 16) -> "float16x16"."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def multiply_add(a: Expr, b: Expr, c: Expr) -> Expr:
    """a * b + c, fused where the CPU can (llvm.fma would be a library call where it can't)."""
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.fmuladd"), a, b, c, dtype=str(a.ty.dtype)
    )


def spread(values: Expr, count: int, times: int) -> Expr:
    """Each of `count` lanes `times` times: (a, b) -> (a, a, b, b)."""
    lanes = [tirx.const(i // times, "int32") for i in range(count * times)]
    # TVM wants as many input lanes as output lanes; LLVM sees that all come from the first vector.
    return tirx.Shuffle([values] * times, lanes) if times > 1 else values


def prefetch(address: Expr) -> Expr:
    """Fetch a cache line into every level; an address beyond the tensor does no harm."""
    return T.evaluate(
        T.call_llvm_intrin(
            T.llvm_lookup_intrinsic_id("llvm.prefetch"),
            address,
            T.int32(0),
            T.int32(3),
            T.int32(1),
            dtype="void",
        )
    )


def exp2(x: Expr, lanes: int) -> Expr:
    """2 ** x for float32 lanes, relative error below 2e-7; anything under -126 gives about 0.

    TVM's own exp2 of a vector is one library call per lane. Minimax polynomial of degree 6 for
    the fraction in [-1/2, 1/2], exponent added to the bits.
    """
    clamped = T.max(x, splat(-126.0, lanes))
    whole = T.nearbyint(clamped)
    fraction = clamped - whole
    result = splat(1.540353e-4, lanes)
    for factor in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
        result = multiply_add(result, fraction, splat(factor, lanes))
    shift = T.int32(23) if lanes == 1 else T.broadcast(T.int32(23), lanes)
    bits = T.reinterpret(result, dtype=vector("int32", lanes))
    exponent = T.shift_left(T.cast(whole, vector("int32", lanes)), shift)
    return T.reinterpret(bits + exponent, dtype=vector("float32", lanes))


def exp(x: Expr, lanes: int = 1) -> Expr:
    """e ** x for float32 lanes, relative error below 2e-7; 0 and infinity beyond what float32 has.

    In plain operations, of which LLVM makes vectors where a loop has this for one lane: TVM's own
    is a library call. x = whole log(2) + rest, the rest by a minimax polynomial of degree 6.
    """
    var = tirx.Var("x", vector("float32", lanes))
    # Adding this rounds to whole numbers, and leaves them in the lowest bits.
    magic = splat(12582912.0, lanes)
    shifted = multiply_add(var, splat(LOG2E, lanes), magic)
    whole = shifted - magic
    # log(2) in two parts, of which the first has few bits.
    rest = multiply_add(whole, splat(-0.693145751953125, lanes), var)
    rest = multiply_add(whole, splat(-1.428606765330187e-06, lanes), rest)
    fraction = tirx.Var("rest", vector("float32", lanes))
    result = splat(1.381459848e-3, lanes)
    for factor in (8.368716887e-3, 4.166838805e-2, 0.1666652063, 0.4999999345, 1.0, 1.0):
        result = multiply_add(result, fraction, splat(factor, lanes))
    shift = T.int32(23) if lanes == 1 else T.broadcast(T.int32(23), lanes)
    bits = vector("int32", lanes)
    exponent = T.shift_left(T.reinterpret(shifted, dtype=bits), shift)
    power = T.reinterpret(
        T.reinterpret(result, dtype=bits) + exponent, dtype=vector("float32", lanes)
    )
    power = tirx.Let(fraction, rest, power)
    power = tirx.Select(var < splat(-87.336, lanes), splat(0.0, lanes), power)
    power = tirx.Select(var > splat(88.72283, lanes), splat(math.inf, lanes), power)
    return tirx.Let(var, x, power)


def silu(x: Expr, lanes: int) -> Expr:
    """x / (1 + exp(-x)) for float32 lanes."""
    return x / (splat(1.0, lanes) + exp(x * splat(-1.0, lanes), lanes))


def gelu(x: Expr, lanes: int) -> Expr:
    """x times the normal distribution's cumulative function, for float32 lanes.

    TVM's own erf of a vector is one library call per lane. Absolute error of the function below
    1e-7 (Abramowitz and Stegun 1964, 7.1.26).
    """
    size = T.max(x, -x)
    t = splat(1.0, lanes) / multiply_add(
        size, splat(0.3275911 * 0.5**0.5, lanes), splat(1.0, lanes)
    )
    tail = splat(0.5 * 1.061405429, lanes)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = multiply_add(tail, t, splat(0.5 * factor, lanes))
    tail = tail * t * exp2(x * x * splat(-0.5 * LOG2E, lanes), lanes)
    return x * T.Select(x >= splat(0.0, lanes), splat(1.0, lanes) - tail, tail)


def reduce_max(x: Expr) -> Expr:
    """The largest lane of a float32 vector without NaN.

    LLVM looks for NaN lane after lane, but reduces whole numbers in a tree: those that have the
    order of the floats.
    """
    lanes = tvm.DataType(str(x.ty.dtype)).lanes
    bits = T.reinterpret(x, dtype=vector("int32", lanes))
    negative = T.shift_right(bits, T.broadcast(T.int32(31), lanes))
    ordered = bits ^ (negative & T.broadcast(T.int32(0x7FFFFFFF), lanes))
    largest = T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.vector.reduce.smax"), ordered, dtype="int32"
    )
    magnitude = T.shift_right(largest, T.int32(31)) & T.int32(0x7FFFFFFF)
    return T.reinterpret(largest ^ magnitude, dtype="float32")


def reduce_sum(x: Expr, lanes: int) -> Expr:
    """The sum of a float32 vector, in tree order; its kernel imports `reduce_sum_ir`."""
    return T.call_pure_extern("float32", f"relaxlm_reduce_sum_{lanes}", x)


def reduce_sum_ir(lanes: int) -> str:
    """LLVM IR of the function behind `reduce_sum`, for a kernel's `imports`.

    The plain LLVM intrinsic adds lanes one after the other unless it carries the flag `reassoc`,
    which TIR can't set. Functions are linked by name across a module, so the width is in the name.
    """
    return f"""
define float @relaxlm_reduce_sum_{lanes}(<{lanes} x float> %v) alwaysinline nounwind readnone {{
  %r = call reassoc float @llvm.vector.reduce.fadd.v{lanes}f32(float 0.0, <{lanes} x float> %v)
  ret float %r
}}
declare float @llvm.vector.reduce.fadd.v{lanes}f32(float, <{lanes} x float>)
"""
