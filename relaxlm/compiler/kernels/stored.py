"""How CPU kernels read a stored matrix: words of codes, or plain values, as float32 vectors."""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.vector import to_float32, vector
from relaxlm.quantization.groupwise import GroupQuant

# A float32 from 2 ** 23 to 2 ** 24 is a whole number with its value in the low bits, so a code
# put there becomes a float without a conversion.
_MAGIC = 2**23
_MAGIC_BITS = 0x4B000000


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [n, k] as it lies in memory.

    Attributes:
        quant: its format; None for plain values of `dtype`.
        dtype: of the scales, or of the plain values.
    """

    n: int
    k: int
    quant: GroupQuant | None
    dtype: str

    @property
    def word_dtype(self) -> str:
        return self.dtype if self.quant is None else "uint32"

    @property
    def word_bytes(self) -> int:
        return {"float16": 2, "bfloat16": 2}.get(self.word_dtype, 4)

    @property
    def per_word(self) -> int:
        return 1 if self.quant is None else self.quant.per_word

    @property
    def group_words(self) -> int:
        """Words that share a scale."""
        return 1 if self.quant is None else self.quant.group // self.quant.per_word

    @property
    def groups(self) -> int:
        """Of one row; 0 if there are no scales."""
        return 0 if self.quant is None else self.quant.groups(self.k)

    @property
    def words(self) -> int:
        """Of one row; the last may be partly filled."""
        return self.k if self.quant is None else self.groups * self.group_words

    @property
    def columns(self) -> bool:
        """Whether it is stored transposed."""
        return self.quant is not None and self.quant.layout == "KN"

    @property
    def word_shape(self) -> tuple[int, int]:
        return (self.words, self.n) if self.columns else (self.n, self.words)

    @property
    def scale_shape(self) -> tuple[int, int]:
        return (self.groups, self.n) if self.columns else (self.n, self.groups)

    def shift(self, i: Expr | int) -> Expr:
        """How far `codes` leaves the code i of a word above the units: a power of two too large."""
        if self.quant is None:
            return T.uint32(0)
        return T.cast(i % -(-self.per_word // 2) * self.quant.bits, "uint32")

    def unshift(self, i: Expr | int) -> Expr:
        """2 ** -shift(i), float32."""
        return T.reinterpret(
            T.shift_left(T.uint32(127) - self.shift(i), T.uint32(23)), dtype="float32"
        )

    def codes(self, words: Expr, i: Expr | int, lanes: int) -> Expr:
        """The value of code i of each word, before the scale, times 2 ** shift(i), exactly.

        Codes in the lower half of a word are used where they are; the upper half is moved down
        once, and LLVM sees that this is the same for all of its codes.
        """
        if self.quant is None:
            return to_float32(words, lanes)
        half, bits, shift = -(-self.per_word // 2), self.quant.bits, self.shift(i)

        def wide(value: Expr) -> Expr:
            return T.broadcast(value, lanes) if lanes > 1 else value

        moved = T.shift_right(
            words, wide(T.if_then_else(i < half, T.uint32(0), T.uint32(half * bits)))
        )
        in_place = T.bitwise_and(moved, wide(T.shift_left(T.uint32((1 << bits) - 1), shift)))
        number = T.reinterpret(
            T.bitwise_or(in_place, wide(T.uint32(_MAGIC_BITS))), dtype=vector("float32", lanes)
        )
        zero = T.uint32(_MAGIC) + T.shift_left(T.uint32(self.quant.max_int), shift)
        return number - wide(T.cast(zero, "float32"))
