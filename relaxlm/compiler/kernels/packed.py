"""Activations as int8 by groups of 32, in one tensor that a matmul reads: the form "int8".

    scale[g] = max |x[k in group g]| / 127           code[k] = round(x[k] / scale[g]), ties to even
    sum[g]   = the sum of the group's codes          elements from K on count as 0

A row of x [m, K] becomes a row of `packed [m, row_words(K)] int32`. Groups come in blocks of four,
the last of which may be partly empty. The codes of a group are 8 words: in half 0 those of its even
elements, in half 1 of its odd ones, words j = 0..3 each, as nibbles of a 4-bit group meet them.
How things lie in a row depends on the number of rows, and on the CPU:

    single   for one row, unless kernels are invariant; a block is 64 words at block * 64:
                 32 codes [half, group, j]
                 16 scale [group, 4 times]
                 16 start [group, 4], of which the last three are 0
    woven    for 2 to `woven_rows`, or 1
                 at 0        codes, block by block, [half, j, group]
                 at scales   scale, one word per group
                 at sums     sum, one word per group
                 at starts   start, one word per group
    linear   for more rows, and for any number on other CPUs: the same, but codes [group, half, j]

A scale is the bits of a float32. `start` is -7 * sum: what a dot product with 4-bit codes starts
from, whose zero is 7.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.isa import Isa
from relaxlm.compiler.kernels.vector import splat, spread, vector

GROUP = 32
GROUP_WORDS = GROUP // 4
# Groups whose codes are ordered together; 64 bytes of 4-bit weights.
BLOCK_GROUPS = 4
BLOCK = BLOCK_GROUPS * GROUP
BLOCK_WORDS = BLOCK // 4
# Words of a block in the order `single`, the longest.
SINGLE_WORDS = 64
# The most rows of x for which kernels are made to read weights at the speed of memory.
FEW = 16
# From how many rows on AMX's tiles are used where they can be: with 8, both ways take as long.
TILES_FROM = 9
# What the dot product with a 4-bit code has too much, per unit of x: the code of zero.
ZERO_OF_4_BITS = 7
# A scale must not be zero; this one makes every code of a group of zeros zero.
SMALLEST = 1e-20
LANES = 16
LINE_WORDS = 16
PAGE_WORDS = 1024
# Elements from which on rows are packed in parallel: about ten times what waking a thread costs.
PARALLEL = 8192

Value = Callable[[Expr | int, int], Expr]


@dataclass(frozen=True)
class PackedRow:
    """Where things lie in a row of K elements, in words."""

    k: int

    @property
    def groups(self) -> int:
        return -(-self.k // GROUP)

    @property
    def blocks(self) -> int:
        return -(-self.k // BLOCK)

    @property
    def scales(self) -> int:
        return self.blocks * BLOCK_WORDS

    @property
    def sums(self) -> int:
        return self.scales + self.blocks * BLOCK_GROUPS

    @property
    def starts(self) -> int:
        return self.sums + self.blocks * BLOCK_GROUPS

    @property
    def words(self) -> int:
        """Of a row: full cache lines, and not a multiple of what makes rows share cache sets."""
        words = self.blocks * SINGLE_WORDS
        return words + (LINE_WORDS if words % PAGE_WORDS == 0 else 0)


def row_words(k: int) -> int:
    """The int32 words of a packed row of K elements."""
    return PackedRow(k).words


def weaves(isa: Isa) -> bool:
    """Whether kernels for few rows on such CPUs want the orders `single` and `woven`."""
    return isa in ("amx", "avx512")


def woven_rows(k: int, isa: Isa) -> int:
    """The most rows of x that lie `woven` on a CPU that weaves; there are always 2."""
    return TILES_FROM - 1 if isa == "amx" and k % BLOCK == 0 else FEW


def emit_pack(
    k: int,
    value: Value,
    packed: tirx.Buffer,
    row: Expr | int,
    m: Expr | int,
    isa: Isa,
    single: bool = True,
) -> None:
    """Emit the statements that write one row.

    Args:
        value: (i, lanes) -> float32 elements i .. i + lanes of the row, lanes 16 or fewer, i a
            multiple of lanes, i + lanes <= K. Called once for each element.
        packed: [m, row_words(K)] int32.
        m: the number of rows, which decides the order.
        single: whether one row has an order of its own.
    """
    whole = k // BLOCK
    if whole:
        with T.serial(whole) as block:
            _pack_block(k, block, BLOCK, value, packed, row, m, isa, single)
    if k % BLOCK:
        _pack_block(k, whole, k % BLOCK, value, packed, row, m, isa, single)


def pack_kernel(k: int, isa: Isa, single: bool = True) -> tirx.PrimFunc:
    """(x [m, K] float32, packed [m, row_words(K)] int32)."""

    def body() -> None:
        m = length("m")
        x = tensor("x", (m, k), "float32")
        packed = tensor("packed", (m, row_words(k)), "int32")

        def pack(row: Expr) -> None:
            def value(i: Expr | int, lanes: int) -> Expr:
                return x.vload([row, i], vector("float32", lanes))

            emit_pack(k, value, packed, row, m, isa, single)

        with T.If(m * k <= PARALLEL):
            with T.Then(), T.serial(m) as row:
                pack(row)
            with T.Else(), T.parallel(m) as row:
                pack(row)

    return emit(body)


def _pack_block(
    k: int,
    block: Expr | int,
    count: int,
    value: Value,
    packed: tirx.Buffer,
    row: Expr | int,
    m: Expr | int,
    isa: Isa,
    single: bool,
) -> None:
    """Pack the `count` elements of a block; the rest of its 128 count as 0."""
    place = PackedRow(k)
    values, codes = scratch(BLOCK, "float32"), scratch(BLOCK, "int32")
    most, sums = scratch(BLOCK_GROUPS, "int32"), scratch(BLOCK_GROUPS, "int32")
    factors = scratch(BLOCK_GROUPS, "float32")
    words = [scratch(BLOCK_WORDS // 2, "int32") for half in range(2)]

    for at in range(0, BLOCK, LANES):
        if at < count:
            _load(values, at, min(LANES, count - at), lambda i, n: value(block * BLOCK + i, n))
        else:
            _put(values, at, LANES, splat(0.0, LANES))

    for g in range(BLOCK_GROUPS):
        # Bits of magnitudes have their order, and LLVM reduces whole numbers in a tree.
        magnitudes = [
            T.bitwise_and(
                T.reinterpret("int32x16", values.vload([at], "float32x16")),
                T.broadcast(T.int32(0x7FFFFFFF), LANES),
            )
            for at in (g * GROUP, g * GROUP + LANES)
        ]
        _put(most, g, 1, _reduce("smax", T.max(*magnitudes)))
    largest = T.max(
        T.reinterpret("float32x4", most.vload([0], "int32x4")), splat(SMALLEST, BLOCK_GROUPS)
    )
    _put(factors, 0, BLOCK_GROUPS, splat(127.0, BLOCK_GROUPS) / largest)

    for g in range(BLOCK_GROUPS):
        for at in (g * GROUP, g * GROUP + LANES):
            steps = values.vload([at], "float32x16") * splat(factors[g], LANES)
            _put(codes, at, LANES, T.cast(T.nearbyint(steps), "int32x16"))
        both = [codes.vload([at], "int32x16") for at in (g * GROUP, g * GROUP + LANES)]
        _put(sums, g, 1, _reduce("add", both[0] + both[1]))
        for half in range(2):
            picked = T.Shuffle(both, [tirx.const(2 * i + half, "int32") for i in range(LANES)])
            four = T.reinterpret("int32x4", T.cast(picked, "int8x16"))
            _put(words[half], g * 4, 4, four)

    def store(at: Expr | int, lanes: int, new: Expr) -> None:
        T.buffer_store(packed, new, [row, T.ramp(at, 1, lanes)])

    def store_words(at: Expr | int, lanes_of: Callable[[int], list[int]]) -> None:
        """Store two vectors of codes; `lanes_of` says which of the 32 words go into each."""
        both = [part.vload([0], "int32x16") for part in words]
        for i in range(2):
            new = T.Shuffle(both, [tirx.const(lane, "int32") for lane in lanes_of(i)])
            store(at + i * LANES, LANES, new)

    def woven(half: int) -> list[int]:
        return [half * LANES + g * 4 + j for j in range(4) for g in range(BLOCK_GROUPS)]

    def alone(half: int) -> list[int]:
        return list(range(half * LANES, (half + 1) * LANES))

    def linear(pair: int) -> list[int]:
        return [
            half * LANES + g * 4 + j
            for g in (2 * pair, 2 * pair + 1)
            for half in range(2)
            for j in range(4)
        ]

    def store_groups() -> None:
        """Store one word for each group, of each kind."""
        for at, new in ((place.scales, scales), (place.sums, four_sums), (place.starts, starts)):
            store(at + block * BLOCK_GROUPS, BLOCK_GROUPS, new)

    scales = T.reinterpret("int32x4", largest * splat(1 / 127, BLOCK_GROUPS))
    four_sums = sums.vload([0], "int32x4")
    starts = four_sums * T.broadcast(T.int32(-ZERO_OF_4_BITS), BLOCK_GROUPS)
    if not weaves(isa):
        store_words(block * BLOCK_WORDS, linear)
        store_groups()
        return

    def store_several() -> None:
        with T.If(m <= woven_rows(k, isa)):
            with T.Then():
                store_words(block * BLOCK_WORDS, woven)
            with T.Else():
                store_words(block * BLOCK_WORDS, linear)
        store_groups()

    if not single:
        store_several()
        return
    with T.If(m == 1):
        with T.Then():
            store_words(block * SINGLE_WORDS, alone)
            store(block * SINGLE_WORDS + BLOCK_WORDS, LANES, spread(scales, BLOCK_GROUPS, 4))
            # Lane 4 is the first of three vectors of zeros.
            lanes = [i // 4 if i % 4 == 0 else BLOCK_GROUPS for i in range(LANES)]
            zeros = T.broadcast(T.int32(0), BLOCK_GROUPS)
            begun = T.Shuffle([starts] + [zeros] * 3, [tirx.const(lane, "int32") for lane in lanes])
            store(block * SINGLE_WORDS + BLOCK_WORDS + LANES, LANES, begun)
        with T.Else():
            store_several()


def _put(buffer: tirx.Buffer, at: int, lanes: int, new: Expr) -> None:
    T.buffer_store(buffer, new, [T.ramp(at, 1, lanes) if lanes > 1 else at])


def _load(values: tirx.Buffer, at: int, count: int, value: Value) -> None:
    """Store `count` elements from `at` on, in vectors as wide as possible, and then zeros."""
    if count < LANES:
        _put(values, at, LANES, splat(0.0, LANES))
    done = 0
    for lanes in (16, 8, 4, 2, 1):
        if count & lanes:
            _put(values, at + done, lanes, value(at + done, lanes))
            done += lanes


def _reduce(name: str, lanes: Expr) -> Expr:
    """The largest of int32 lanes (smax), or their sum (add)."""
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.vector.reduce.{name}")
    return T.call_llvm_pure_intrin("int32", intrinsic, lanes)
