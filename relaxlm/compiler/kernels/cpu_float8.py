"""float8 e4m3 on CPUs by moving bits: TVM's own casts are slow there, and wrong for subnormals."""

from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.vector import splat, vector


def encode_e4m3(value: Expr, lanes: int = 1) -> Expr:
    """float32 lanes with |value| <= 448 to their e4m3 codes (uint8), rounding half to even.

    Below 2**-6 a code counts steps of 2**-9; above, the mantissa is rounded to three bits and the
    exponent moves from bias 127 to bias 7.
    """

    def word(number: int) -> Expr:
        return _word(number, lanes)

    bits = T.reinterpret(value, dtype=vector("uint32", lanes))
    sign = T.shift_right(bits, word(24)) & word(0x80)
    magnitude = bits & word(0x7FFFFFFF)
    size = T.reinterpret(magnitude, dtype=vector("float32", lanes))
    small = T.cast(T.nearbyint(size * splat(512.0, lanes)), vector("uint32", lanes))
    odd = T.shift_right(magnitude, word(20)) & word(1)
    rounded = T.shift_right(magnitude + word(0x7FFFF) + odd, word(20))
    normal = T.min(rounded - word((127 - 7) << 3), word(0x7E))
    code = T.Select(size < splat(2.0**-6, lanes), small, normal)
    return T.cast(sign | code, vector("uint8", lanes))


def decode_e4m3(codes: Expr, lanes: int) -> Expr:
    """e4m3 codes (uint8) to float32: the bits moved into place, the exponent mended by a product.

    A code with exponent 0 becomes a float32 subnormal, which the product also turns into the
    right value.
    """

    def word(number: int) -> Expr:
        return _word(number, lanes)

    wide = T.cast(codes, vector("uint32", lanes))
    magnitude = T.shift_left(wide & word(0x7F), word(20))
    scaled = T.reinterpret(magnitude, dtype=vector("float32", lanes)) * splat(2.0**120, lanes)
    sign = T.shift_left(wide & word(0x80), word(24))
    bits = T.reinterpret(scaled, dtype=vector("uint32", lanes)) | sign
    return T.reinterpret(bits, dtype=vector("float32", lanes))


def _word(number: int, lanes: int) -> Expr:
    return T.uint32(number) if lanes == 1 else T.broadcast(T.uint32(number), lanes)
