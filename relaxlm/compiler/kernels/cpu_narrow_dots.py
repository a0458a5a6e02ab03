"""Dot products of weight codes with int8 activations on CPUs without AVX-512: one class per kind.

A vector has `lanes` int32 words, each of four bytes. A dot product adds to every lane the products
of four codes and four activations. Sums are exact.

                codes      lanes    an instruction multiplies and adds
    avxvnni     unsigned   8        4 bytes to a lane                              vpdpbusd
    avx2        unsigned   8        2 bytes to 16 bits; those are then added up    vpmaddubsw
    dotprod     signed     4        4 bytes to a lane                              sdot

Four-bit codes are used as they are, since they are the same signed and unsigned. Eight-bit codes
are moved to signed ones where products want that. `start` says what the moved zero point costs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr

from relaxlm.compiler.kernels.builder import T
from relaxlm.compiler.kernels.isa import Isa

# Lanes of a block within which x86 shuffles at full speed.
BLOCK = 4


def intrinsic(dtype: str, name: str, *arguments: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, T.llvm_lookup_intrinsic_id(name), *arguments)


def shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """Lanes of the concatenation of vectors; as many lanes as that has, or as one vector has."""
    return T.Shuffle(list(vectors), [tirx.const(lane, "int32") for lane in lanes])


class Dots(ABC):
    """Four products of bytes, added to int32, in one instruction.

    Args:
        lanes: of a vector.
        bits: of a code, 4 or 8.
    """

    signed = False
    # LLVM's letter for a vector register, if `in_turn` has something to do.
    register = ""

    def __init__(self, lanes: int, bits: int) -> None:
        self.lanes, self.bits = lanes, bits

    @property
    def int32(self) -> str:
        return f"int32x{self.lanes}"

    @property
    def partial(self) -> str:
        """The dtype of a sum that is not finished."""
        return self.int32

    def start(self, zero: int) -> int:
        """What a sum starts from, per unit of the activations' sum, if a weight is code - zero."""
        return (128 if self.moved else 0) - zero

    @property
    def imports(self) -> list[str]:
        """LLVM IR of the function behind `in_turn`: no instruction, but it keeps its place."""
        if not self.register:
            return []
        lanes, bits = self._partial_lanes, 32 * self.lanes // self._partial_lanes
        kind = f"<{lanes} x i{bits}>"
        return [
            f"""
define {kind} @relaxlm_in_turn_{self.partial}({kind} %v) alwaysinline nounwind {{
  %r = call {kind} asm sideeffect "", "={self.register},0"({kind} %v) nounwind memory(none)
  ret {kind} %r
}}
"""
        ]

    @property
    def moved(self) -> bool:
        return self.signed and self.bits == 8

    def codes(self, bytes_: Expr) -> Expr:
        """Codes, one per byte of the vector, as `add` takes them."""
        if not self.moved:
            return bytes_
        return T.bitwise_xor(bytes_, T.broadcast(T.int32(-0x7F7F7F80), self.lanes))

    def nothing(self) -> Expr:
        return T.broadcast(tirx.const(0, self.partial.split("x")[0]), self._partial_lanes)

    @property
    def _partial_lanes(self) -> int:
        return int(self.partial.split("x")[1])

    def bytes(self, words: Expr, signed: bool) -> Expr:
        return T.reinterpret(f"{'' if signed else 'u'}int8x{4 * self.lanes}", words)

    @abstractmethod
    def add(self, total: Expr, codes: Expr, x: Expr) -> Expr:
        """total + the products of codes and x, both int32 vectors of bytes."""

    def in_turn(self, total: Expr) -> Expr:
        """A sum of `add`, computed when it is this one's turn in the program.

        LLVM would take the products of one sum after the other, and reads the codes anew for each.
        """
        if not self.register:
            return total
        return T.call_pure_extern(self.partial, f"relaxlm_in_turn_{self.partial}", total)

    def word(self, packed: tirx.Buffer, row: Expr, at: Expr, j: int) -> Expr:
        """Word at + j of a row of x in all lanes."""
        return T.broadcast(packed[row, at + j], self.lanes)

    def finish(self, total: Expr) -> Expr:
        """The int32 vector of what was added up for one group of 32."""
        return total

    def fold(self, totals: Sequence[Expr]) -> Expr:
        """The sums of the lanes of each block of four vectors, each with two dot products.

        Lane b * 4 + v is the sum of block b of vector v.
        """
        low, high = self._pairs(*totals[:2]), self._pairs(*totals[2:])
        return self._pairs(low, high)

    def _pairs(self, a: Expr, b: Expr) -> Expr:
        """Neighbours added, within blocks: (a0 + a1, a2 + a3, b0 + b1, b2 + b3)."""
        even = [
            vector + block + lane
            for block in range(0, self.lanes, BLOCK)
            for vector in (0, self.lanes)
            for lane in (0, 2)
        ]
        return shuffle([a, b], even) + shuffle([a, b], [lane + 1 for lane in even])


class VnniDots(Dots):
    def add(self, total: Expr, codes: Expr, x: Expr) -> Expr:
        return intrinsic(
            self.int32,
            f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}",
            total,
            self.bytes(codes, signed=False),
            self.bytes(x, signed=True),
        )


class PairDots(Dots):
    """Products of 8-bit codes by pairs in 16 bits, widened at once.

    Codes lend their sign to x: the other operand has to be unsigned, and 255 * 127 twice is
    beyond 16 bits, where 128 * 127 twice is not.
    """

    signed = True

    @property
    def _wide(self) -> bool:
        return self.lanes == 8

    def _multiply(self, codes: Expr, x: Expr) -> Expr:
        name = "avx2.pmadd.ub.sw" if self._wide else "ssse3.pmadd.ub.sw.128"
        return intrinsic(f"int16x{2 * self.lanes}", f"llvm.x86.{name}", codes, x)

    def _widen(self, pairs: Expr) -> Expr:
        name = "avx2.pmadd.wd" if self._wide else "sse2.pmadd.wd"
        ones = T.broadcast(tirx.const(1, "int16"), 2 * self.lanes)
        return intrinsic(self.int32, f"llvm.x86.{name}", pairs, ones)

    def add(self, total: Expr, codes: Expr, x: Expr) -> Expr:
        signed = self.bytes(codes, signed=True)
        magnitude = self._with_sign(signed, signed)
        other = self._with_sign(self.bytes(x, signed=True), signed)
        return total + self._widen(self._multiply(magnitude, other))

    def _with_sign(self, a: Expr, b: Expr) -> Expr:
        """a * sign(b), by bytes."""
        name = "avx2.psign.b" if self._wide else "ssse3.psign.b.128"
        return intrinsic(f"int8x{4 * self.lanes}", f"llvm.x86.{name}", a, b)


class NibblePairDots(PairDots):
    """Products of 4-bit codes, all 32 of a group added up in 16 bits: at most 16 * 15 * 127."""

    register = "x"

    @property
    def partial(self) -> str:
        return f"int16x{2 * self.lanes}"

    def add(self, total: Expr, codes: Expr, x: Expr) -> Expr:
        unsigned = self.bytes(codes, signed=False)
        return total + self._multiply(unsigned, self.bytes(x, signed=True))

    def finish(self, total: Expr) -> Expr:
        return self._widen(total)

    def fold(self, totals: Sequence[Expr]) -> Expr:
        return self._widen(super().fold(totals))

    def _pairs(self, a: Expr, b: Expr) -> Expr:
        name = "avx2.phadd.w" if self._wide else "ssse3.phadd.w.128"
        return intrinsic(self.partial, f"llvm.x86.{name}", a, b)


class ArmDots(Dots):
    signed = True
    register = "w"

    def word(self, packed: tirx.Buffer, row: Expr, at: Expr, j: int) -> Expr:
        # Instructions take a word of a register in place.
        four = packed.vload([row, at + j // BLOCK * BLOCK], "int32x4")
        return shuffle([four], [j % BLOCK] * BLOCK)

    def add(self, total: Expr, codes: Expr, x: Expr) -> Expr:
        return intrinsic(
            self.int32,
            "llvm.aarch64.neon.sdot",
            total,
            self.bytes(codes, signed=True),
            self.bytes(x, signed=True),
        )


def dots(isa: Isa, lanes: int, bits: int) -> Dots:
    """The dot products of a CPU."""
    if isa == "avxvnni":
        return VnniDots(lanes, bits)
    if isa == "avx2":
        return NibblePairDots(lanes, bits) if bits == 4 else PairDots(lanes, bits)
    assert isa in ("dotprod", "i8mm"), isa
    return ArmDots(lanes, bits)
