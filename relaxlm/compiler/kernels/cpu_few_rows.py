"""x @ W.T for 1 to 16 rows of x rounded to int8, 4-bit weights as they are stored: AVX-512 VNNI.

    y[m, n] = sum over groups g: x_scale[m, g] * scale[n, g] * (dot[m, n, g] - 7 * x_sum[m, g])
    dot     = the sum over the 32 of a group of x_code[m, k] * code[n, k], exact, in int32

A line, 64 bytes of W, is four groups of a row. The low nibbles of its bytes are the even elements,
the high ones the odd elements; `packed` has x in that order.

    rows of x    how W is read
    1            line by line, unless the kernel is to be invariant
    2 - 16       four lines at a time, of four rows of W, whose words are exchanged so that lanes
                 are [row, group] and the eight dot products of a group add up before scaling;
                 more than 8 rows of x are done in two passes over the four rows of W; where
                 there are tiles (`cpu_few_rows_amx`), those do more than 8

From 2 on, lane g of the four of a row of W has the groups g, g + 4, .., in this order, and the four
are added in pairs: `invariant` kernels do the same for any number of rows (`QUARTERS`).

Memory is asked for ahead, so that what four rows of W need next arrives as one stream.
"""

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels import cpu_few_rows_amx, tuning
from relaxlm.compiler.kernels.builder import flat, scratch
from relaxlm.compiler.kernels.isa import Isa
from relaxlm.compiler.kernels.packed import (
    BLOCK_GROUPS,
    BLOCK_WORDS,
    FEW,
    GROUP,
    SINGLE_WORDS,
    PackedRow,
    weaves,
    woven_rows,
)
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import multiply_add, splat, spread, to_float32

LANES = 16
# Rows of W whose lines are exchanged.
ROWS = 4
# Rows of x whose sums stay in registers.
TILE = 8
# Sums of a product that are made side by side: of every fourth group.
QUARTERS = 4
# Lines of rows this many bytes apart get into each other's way; as measured, and see `_few`.
SETS = 1024
NIBBLES = 0x0F0F0F0F


def supports(matrix: StoredMatrix, isa: Isa) -> bool:
    """Whether `emit_matmul` can multiply with a matrix."""
    quant = matrix.quant
    return (
        weaves(isa)
        and quant is not None
        and (quant.bits, quant.group, quant.layout) == (4, GROUP, "NK")
        and (woven_rows(matrix.k, isa) == FEW or cpu_few_rows_amx.supports(matrix))
    )


def imports(matrix: StoredMatrix, isa: Isa) -> list[str]:
    """LLVM IR that the kernel needs."""
    if woven_rows(matrix.k, isa) != FEW:
        return cpu_few_rows_amx.imports()
    if matrix.groups % BLOCK_GROUPS == 0:
        return []
    return [_load_ir("i32", LANES), _load_ir(_INTEGERS[matrix.dtype][1], BLOCK_GROUPS)]


def emit_matmul(
    matrix: StoredMatrix,
    isa: Isa,
    m: Expr,
    packed: tirx.Buffer,
    weight: tirx.Buffer,
    scale: tirx.Buffer,
    out: tirx.Buffer,
    invariant: bool = False,
) -> None:
    """Emit out [m, N] float32 = x @ W.T for 1 <= m <= FEW.

    Args:
        packed: [m, row_words(K)] int32, as `pack_kernel` makes it, without the order `single` if
            `invariant`.
        weight: [N, words] uint32.
        scale: [N, groups] of the matrix's dtype.
        invariant: whether a row's result may not depend on m.
    """
    assert supports(matrix, isa), matrix
    stored = _Stored(matrix, flat(weight), flat(scale))

    def few(rows: int) -> Callable[[], None]:
        return lambda: _few(stored, m, packed, out, rows)

    def tiles() -> None:
        cpu_few_rows_amx.emit_matmul(
            matrix, m, packed, weight, scale, out, QUARTERS if invariant else 1
        )

    one = few(1) if invariant else lambda: _one(stored, packed, out)
    kernels = [(1, one), (2, few(2)), (4, few(4))]
    if woven_rows(matrix.k, isa) < FEW:
        kernels += [(woven_rows(matrix.k, isa), few(TILE)), (FEW, tiles)]
    else:
        kernels += [(FEW, few(TILE))]
    _choose(m, kernels)


def _choose(m: Expr, kernels: list[tuple[int, Callable[[], None]]]) -> None:
    """Emit the first kernel whose number of rows is enough for m."""
    (rows, kernel), *more = kernels
    if not more:
        kernel()
        return
    with T.If(m <= rows):
        with T.Then():
            kernel()
        with T.Else():
            _choose(m, more)


class _Stored:
    """A matrix, read by lines: step s of a row has its words 16 s .. 16 s + 15 and their scales."""

    def __init__(self, matrix: StoredMatrix, words: tirx.Buffer, scales: tirx.Buffer) -> None:
        self.matrix, self.words, self.scales = matrix, words, scales
        self.steps = -(-matrix.groups // BLOCK_GROUPS)
        # Groups of the last step, if that is not full.
        self.rest = matrix.groups % BLOCK_GROUPS

    def line(self, row: Expr, step: Expr) -> Expr:
        """16 words, uint32; 0 beyond the end of a row."""
        at = row * self.matrix.words + step * LANES
        if self.rest == 0:
            return self.words.vload([at], "uint32x16")
        address = T.address_of(self.words[at])
        mask = self._mask(step, self.rest * LANES // BLOCK_GROUPS, LANES)
        return T.call_pure_extern("uint32x16", _load_name("i32", LANES), address, mask)

    def four_scales(self, row: Expr, step: Expr) -> Expr:
        """The scales of a line, float32x4; 0 beyond the end of a row."""
        dtype, (bits, short) = self.matrix.dtype, _INTEGERS[self.matrix.dtype]
        at = row * self.matrix.groups + step * BLOCK_GROUPS
        if self.rest == 0:
            return self.scales.vload([at], f"{dtype}x4")
        address = T.address_of(self.scales[at])
        mask = self._mask(step, self.rest, BLOCK_GROUPS)
        loaded = T.call_pure_extern(f"{bits}x4", _load_name(short, BLOCK_GROUPS), address, mask)
        return T.reinterpret(f"{dtype}x4", loaded)

    def _mask(self, step: Expr, rest: int, lanes: int) -> Expr:
        """A bit for each of the lanes: all, and in the last step the first `rest`."""
        whole, last = (1 << lanes) - 1, (1 << rest) - 1
        return T.Select(step == self.steps - 1, T.uint16(last), T.uint16(whole))

    def fetch(self, row: Expr, line: Expr, ahead: int) -> None:
        """Ask for a line of the rows from `row` on, `ahead` bytes later, if there is one."""
        at = row * self.matrix.words + line * LANES + ahead // 4
        intrinsic = T.llvm_lookup_intrinsic_id("llvm.prefetch")
        # Into the second-level cache: the first has too few places for lines on their way.
        arguments = (T.address_of(self.words[at]), T.int32(0), T.int32(2), T.int32(1))
        T.evaluate(T.call_llvm_intrin("void", intrinsic, *arguments))


def _one(stored: _Stored, packed: tirx.Buffer, out: tirx.Buffer) -> None:
    """One row of x, in the order `single`."""
    n = stored.matrix.n
    with T.parallel(-(-n // ROWS)) as task:
        sums = scratch(ROWS * LANES, "float32")
        with T.serial(ROWS) as r:
            total, dots = scratch(LANES, "float32"), scratch(LANES, "int32")
            row = _row(task, r, n)
            _put(total, 0, splat(0.0, LANES))
            with T.serial(stored.steps) as step:
                stored.fetch(row, step, tuning.current().ahead)

                def x(vector: int, dtype: str = "int32", step: Expr = step) -> Expr:
                    words = packed.vload([0, step * SINGLE_WORDS + vector * LANES], "int32x16")
                    return words if dtype == "int32" else T.reinterpret(f"{dtype}x16", words)

                line, four = stored.line(row, step), stored.four_scales(row, step)
                _put(dots, 0, _dot(_dot(x(3), _low(line), x(0)), _high(line), x(1)))
                factor = spread(to_float32(four, 4), 4, 4) * x(2, "float32")
                product = T.cast(_all(dots), "float32x16")
                _put(total, 0, multiply_add(product, factor, _all(total)))
            T.buffer_store(sums, _all(total), [T.ramp(r * LANES, 1, LANES)])
        four = [sums.vload([r * LANES], "float32x16") for r in range(ROWS)]
        _store_rows(_add_lanes(four), task, n, out, 0)


def _few(stored: _Stored, m: Expr, packed: tirx.Buffer, out: tirx.Buffer, rows: int) -> None:
    """At most `rows` rows of x, in the order `woven`; with `TILE`, any number of such tiles."""
    n, place = stored.matrix.n, PackedRow(stored.matrix.k)
    # Whole fours of rows ahead, so that what is asked for goes on where the last four stopped.
    four_rows = ROWS * stored.matrix.words * 4
    ahead = -(-tuning.current().ahead // four_rows) * four_rows
    # Best is the order of the arithmetic, unless the four lines fall into the same cache sets.
    by_rows = stored.matrix.words * 4 % SETS != 0
    with T.parallel(-(-n // ROWS)) as task:
        tiles = (m + TILE - 1) // TILE if rows == TILE else 1
        with T.serial(tiles) as tile:
            sums, dots = scratch(rows * LANES, "float32"), scratch(LANES, "int32")
            codes, factors = scratch(8 * LANES, "uint32"), scratch(LANES, "float32")

            def x_row(i: int, tile: Expr = tile) -> Expr:
                # Rows beyond the last repeat it, and write the same result.
                return T.min(tile * TILE + i, m - 1)

            for i in range(rows):
                _put(sums, i * LANES, splat(0.0, LANES))
            with T.serial(stored.steps) as step:
                for i in range(ROWS):
                    if by_rows:
                        stored.fetch(_row(task, i, n), step, ahead)
                    else:
                        stored.fetch(_row(task, 0, n), step * ROWS + i, ahead)
                _exchange(stored, task, step, codes)
                four = [stored.four_scales(_row(task, r, n), step) for r in range(ROWS)]
                _put(factors, 0, to_float32(_shuffle(four, range(LANES)), LANES))
                for i in range(rows):

                    def x(at: Expr | int, i: int = i) -> Expr:
                        return _repeat(packed.vload([x_row(i), at], "int32x4"))

                    _put(dots, 0, x(place.starts + step * 4))
                    for j in range(8):
                        code = codes.vload([j * LANES], "uint32x16")
                        _put(dots, 0, _dot(_all(dots), code, x(step * BLOCK_WORDS + j * 4)))
                    scale = T.reinterpret("float32x16", x(place.scales + step * 4))
                    before = sums.vload([i * LANES], "float32x16")
                    product = T.cast(_all(dots), "float32x16")
                    _put(sums, i * LANES, multiply_add(product, _all(factors) * scale, before))
            for i in range(rows):
                total = sums.vload([i * LANES], "float32x16")
                _store_rows(_add_quads(total), task, n, out, x_row(i))


def _exchange(stored: _Stored, task: Expr, step: Expr, codes: tirx.Buffer) -> None:
    """Put vectors (half, j), each [row, group], of a step of four rows into `codes`."""
    n = stored.matrix.n
    lines = [stored.line(_row(task, r, n), step) for r in range(ROWS)]
    for pair in range(2):
        # Of two lines: [j, row, group] for two j.
        order = [j + 4 * g for j in (2 * pair, 2 * pair + 1) for g in range(4)]
        two_rows = [_shuffle([lines[r], lines[r + 1]], _both(order)) for r in (0, 2)]
        for odd in range(2):
            four_rows = [i + odd * 8 for i in range(8)]
            words = _shuffle(two_rows, [*four_rows, *(i + LANES for i in four_rows)])
            j = 2 * pair + odd
            _put(codes, j * LANES, _low(words))
            _put(codes, (4 + j) * LANES, _high(words))


def _both(order: list[int]) -> list[int]:
    """The lanes `order` of one vector and of a second, four at a time."""
    return [i + line * LANES for half in (order[:4], order[4:]) for line in (0, 1) for i in half]


def _row(task: Expr, r: Expr | int, n: int) -> Expr:
    row = T.cast(task, "int64") * ROWS + r
    return row if n % ROWS == 0 else T.min(row, T.int64(n - 1))


def _store_rows(totals: Expr, task: Expr, n: int, out: tirx.Buffer, x_row: Expr | int) -> None:
    """Store the results for four rows of W, float32x4."""
    if n % ROWS == 0:
        T.buffer_store(out, totals, [x_row, T.ramp(task * ROWS, 1, ROWS)])
        return
    kept = scratch(ROWS, "float32")
    _put(kept, 0, totals)
    for r in range(ROWS):
        T.buffer_store(out, kept[r], [x_row, _row(task, r, n)])


def _add_quads(x: Expr) -> Expr:
    """The sums of lanes 0-3, 4-7, 8-11 and 12-15."""
    pairs = _shuffle([x], range(0, 16, 2)) + _shuffle([x], range(1, 16, 2))
    return _shuffle([pairs], range(0, 8, 2)) + _shuffle([pairs], range(1, 8, 2))


def _add_lanes(four: list[Expr]) -> Expr:
    """The sums of all lanes of four vectors each."""
    low, high = range(LANES // 2), range(LANES // 2, LANES)
    halves = [_shuffle([x], low) + _shuffle([x], high) for x in four]
    quarters = [_shuffle([x], range(4)) + _shuffle([x], range(4, 8)) for x in halves]
    return _add_quads(_shuffle(quarters, range(LANES)))


def _shuffle(vectors: list[Expr], lanes) -> Expr:
    return T.Shuffle(vectors, [tirx.const(lane, "int32") for lane in lanes])


def _repeat(four: Expr) -> Expr:
    """Four lanes, four times."""
    return _shuffle([four] * 4, [*range(4)] * 4)


def _low(words: Expr) -> Expr:
    return T.bitwise_and(words, T.broadcast(T.uint32(NIBBLES), LANES))


def _high(words: Expr) -> Expr:
    return _low(T.shift_right(words, T.broadcast(T.uint32(4), LANES)))


def _dot(total: Expr, codes: Expr, x: Expr) -> Expr:
    """total + the sums of four products of unsigned and signed bytes; all int32x16."""
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512")
    unsigned, signed = T.reinterpret("uint8x64", codes), T.reinterpret("int8x64", x)
    return T.call_llvm_pure_intrin("int32x16", intrinsic, total, unsigned, signed)


def _put(buffer: tirx.Buffer, at: int, value: Expr) -> None:
    lanes = LANES if buffer.shape[0] != ROWS else ROWS
    T.buffer_store(buffer, value, [T.ramp(at, 1, lanes)])


def _all(buffer: tirx.Buffer) -> Expr:
    return buffer.vload([0], f"{buffer.dtype}x16")


# Integers of the size of a scale: TIR's name, LLVM's name.
_INTEGERS = {
    "float16": ("uint16", "i16"),
    "bfloat16": ("uint16", "i16"),
    "float32": ("uint32", "i32"),
}


def _load_name(short: str, lanes: int) -> str:
    return f"relaxlm_load_{short}x{lanes}"


def _load_ir(short: str, lanes: int) -> str:
    """A function (pointer, mask): lanes whose bit is 0 are not read, and 0."""
    vector = f"<{lanes} x {short}>"
    load = f"@llvm.masked.load.v{lanes}{short}.p0"
    return f"""
define {vector} @{_load_name(short, lanes)}(ptr %p, i16 %m) alwaysinline nounwind {{
  %t = {"bitcast i16 %m to i16" if lanes == 16 else f"trunc i16 %m to i{lanes}"}
  %b = bitcast i{lanes} %t to <{lanes} x i1>
  %r = call {vector} {load}(ptr align 1 %p, <{lanes} x i1> %b, {vector} zeroinitializer)
  ret {vector} %r
}}
declare {vector} {load}(ptr, <{lanes} x i1>, {vector})
"""
