"""float8 e4m3 on CPUs by moving bits: TVM's own casts are slow there, and wrong for subnormals."""

from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.vector import splat, vector


def encode_e4m3(value: Expr) -> Expr:
    """float32 with |value| <= 448 to its e4m3 code (uint8), rounding half to even.

    Below 2**-6 a code counts steps of 2**-9; above, the mantissa is rounded to three bits and the
    exponent moves from bias 127 to bias 7.
    """
    bits = T.reinterpret(value, dtype="uint32")
    sign = T.shift_right(bits, T.uint32(24)) & T.uint32(0x80)
    magnitude = bits & T.uint32(0x7FFFFFFF)
    small = T.cast(T.nearbyint(T.abs(value) * T.float32(512)), "uint32")
    odd = T.shift_right(magnitude, T.uint32(20)) & T.uint32(1)
    rounded = T.shift_right(magnitude + T.uint32(0x7FFFF) + odd, T.uint32(20))
    normal = rounded - T.uint32((127 - 7) << 3)
    code = T.Select(T.abs(value) < T.float32(2**-6), small, T.min(normal, T.uint32(0x7E)))
    return T.cast(sign | code, "uint8")


def decode_e4m3(codes: Expr, lanes: int) -> Expr:
    """e4m3 codes (uint8) to float32: the bits moved into place, the exponent mended by a product.

    A code with exponent 0 becomes a float32 subnormal, which the product also turns into the
    right value.
    """

    def word(value: int) -> Expr:
        return T.uint32(value) if lanes == 1 else T.broadcast(T.uint32(value), lanes)

    wide = T.cast(codes, vector("uint32", lanes))
    magnitude = T.shift_left(wide & word(0x7F), word(20))
    scaled = T.reinterpret(magnitude, dtype=vector("float32", lanes)) * splat(2.0**120, lanes)
    sign = T.shift_left(wide & word(0x80), word(24))
    bits = T.reinterpret(scaled, dtype=vector("uint32", lanes)) | sign
    return T.reinterpret(bits, dtype=vector("float32", lanes))
