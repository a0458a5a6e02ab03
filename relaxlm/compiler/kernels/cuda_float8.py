"""float8 e4m3 <-> float32 by integer operations, exactly, on every GPU.

e4m3 has 1 sign, 4 exponent (bias 7) and 3 mantissa bits, no infinity, and NaN at 0x7F and 0xFF.
CUDA's own conversions need sm_89; TVM's casts are wrong for subnormals on other targets.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T


def decode_e4m3(code: Expr) -> Expr:
    """uint8 code -> float32.

    The seven bits below the sign, moved to float16's exponent and mantissa, are a float16 that is
    2 ** 8 too small (the biases are 7 and 15), subnormals included. NaN codes, which `encode_e4m3`
    never makes, come out as 480.
    """
    bits = T.cast(code, "uint16")
    sign = T.shift_left(T.bitwise_and(bits, T.uint16(0x80)), T.uint16(8))
    magnitude = T.shift_left(T.bitwise_and(bits, T.uint16(0x7F)), T.uint16(7))
    half = T.reinterpret(T.bitwise_or(sign, magnitude), dtype="float16")
    return T.cast(half, "float32") * T.float32(256)


def encode_e4m3(value: Expr) -> Expr:
    """float32 -> uint8 code, to nearest even; magnitudes from 448 on become 448."""
    limited = T.min(T.abs(value), T.float32(448))
    bits = T.reinterpret(limited, dtype="uint32")
    # Normal: drop 20 of 23 mantissa bits, rounding; then the exponent's bias is 120 too large.
    odd = T.bitwise_and(T.shift_right(bits, T.uint32(20)), T.uint32(1))
    rounded = T.shift_right(bits + T.uint32(0x7FFFF) + odd, T.uint32(20))
    normal = rounded - T.uint32(120 << 3)
    # Subnormal, in steps of 2 ** -9: adding 2 ** 14 leaves room for exactly that step.
    shifted = T.reinterpret(limited + T.float32(2.0**14), dtype="uint32")
    subnormal = shifted - T.uint32((127 + 14) << 23)
    magnitude = T.if_then_else(limited < T.float32(2.0**-6), subnormal, normal)
    sign = T.shift_left(
        T.shift_right(T.reinterpret(value, dtype="uint32"), T.uint32(31)), T.uint32(7)
    )
    return T.cast(T.bitwise_or(magnitude, sign), "uint8")
