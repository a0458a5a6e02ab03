"""x @ W.T for many rows of x in int8 on CPUs with AVX-512 VNNI, from 4-bit and 8-bit weights.

x has the form "int8" (`packed`), in its order `linear`:

    y[m, n] = sum over g: x_scale[m, g] * scale[n, g]
                          * (sum over k in g: code[n, k] * x_code[m, k] - zero * x_sum[m, g])

A task takes the outputs of some rows of x by 32 rows of W. It turns their stored words into a
panel once, with rows of W as lanes: squares of 16 rows by 16 words are transposed in registers, and
bytes are put in the order of x. Tiles of a few rows of x then pass over the panel, while words of
the next one are fetched.
"""

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import flat, scratch
from relaxlm.compiler.kernels.cpu_amx_fill import TRANSPOSE, transpose_ir
from relaxlm.compiler.kernels.cpu_transpose import LANES, transpose_lines
from relaxlm.compiler.kernels.isa import Isa
from relaxlm.compiler.kernels.packed import GROUP, GROUP_WORDS, PackedRow
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import multiply_add, splat, to_float32, vector

# Rows of x in a tile: its sums, its dot products and their operands fit the 32 registers.
TILE = 6
# Bytes of x that a task passes over for its panel, so that they stay in the second-level cache.
TASK_BYTES = 512 << 10
# Lines of the next panel's words that a tile fetches per group.
FETCH = 2


def supports(matrix: StoredMatrix, isa: Isa) -> bool:
    """Whether a matrix can be multiplied here: a square of words at least."""
    quant = matrix.quant
    return (
        isa in ("avx512", "amx")
        and quant is not None
        and quant.bits in (4, 8)
        and (quant.group, quant.layout) == (GROUP, "NK")
        and matrix.words >= LANES
        and matrix.n >= LANES
    )


def imports(matrix: StoredMatrix, isa: Isa) -> list[str]:
    """LLVM IR that `emit_matmul` needs."""
    return [_panel_ir(_bits(matrix), _halves(matrix)), transpose_ir()]


def emit_matmul(
    matrix: StoredMatrix,
    isa: Isa,
    m: Expr,
    packed: tirx.Buffer,
    weight: tirx.Buffer,
    scale: tirx.Buffer | None,
    out: tirx.Buffer,
    parts: int = 1,
) -> None:
    """Emit out = x @ W.T.

    Args:
        m: rows of x, int64, at least 1.
        packed: [m, at least packed.row_words(K)] int32, of the form "int8", linear.
        weight, scale: the stored matrix.
        out: [m, N] float32.
        parts: 1: groups are added up one after the other; 4: the first group and every fourth from
            there, then from the second .., and then the four in pairs, as `cpu_few_rows` does.
    """
    assert supports(matrix, isa) and scale is not None, matrix
    n, groups = matrix.n, matrix.groups
    wide = _halves(matrix) * LANES
    panels = -(-n // wide)
    rows = max(TASK_BYTES // (groups * GROUP) // TILE, 8) * TILE
    words, scales = flat(weight), flat(scale)
    with T.parallel((m + rows - 1) // rows * panels) as task:
        first_row, first = task // panels * rows, T.min(task % panels * wide, n - wide)
        panel = scratch(groups * GROUP_WORDS * wide, "int32")
        factors = scratch(_staged(matrix) + LANES * LANES, "float32")
        sums, dots = scratch(TILE * wide, "float32"), scratch(TILE * wide, "int32")
        kept = scratch(parts * TILE * wide, "float32") if parts > 1 else sums
        _fill(matrix, first, words, panel)
        _fill_scales(matrix, first, scales, factors)
        tiles = (T.min(m - first_row, rows) + TILE - 1) // TILE
        with T.serial(tiles) as tile:

            def row(i: int) -> Expr:
                # Rows beyond the last repeat it, and write the same result.
                return T.min(first_row + tile * TILE + i, m - 1)

            next_words = (first + wide) * matrix.words
            multiplied = (panel, factors, sums, dots, words, next_words)
            if parts == 1:
                _multiply(matrix, packed, row, tile, *multiplied)
            else:
                with T.serial(parts) as part:
                    _multiply(matrix, packed, row, tile, *multiplied, part, parts)
                    for at in range(0, TILE * wide, LANES):
                        place = T.ramp(part * (TILE * wide) + at, 1, LANES)
                        T.buffer_store(kept, sums.vload([at], "float32x16"), [place])
            for i in range(TILE):
                for at in range(0, wide, LANES):
                    totals = [
                        kept.vload([(part * TILE + i) * wide + at], "float32x16")
                        for part in range(parts)
                    ]
                    while len(totals) > 1:
                        totals = [a + b for a, b in zip(totals[::2], totals[1::2], strict=True)]
                    T.buffer_store(out, totals[0], [row(i), T.ramp(first + at, 1, LANES)])


class Panels:
    """The same for callers with tasks of their own; declares its memory where it is made."""

    def __init__(self, matrix: StoredMatrix) -> None:
        self.matrix, self.wide = matrix, wide(matrix)
        self.panel = scratch(matrix.groups * GROUP_WORDS * self.wide, "int32")
        self.factors = scratch(_staged(matrix) + LANES * LANES, "float32")
        self.sums = scratch(TILE * self.wide, "float32")
        self.dots = scratch(TILE * self.wide, "int32")

    def fill(self, first: Expr, words: tirx.Buffer, scales: tirx.Buffer) -> None:
        """Make a panel of the rows of W from `first` on; it may lie in a stack of matrices."""
        self.words, self.next_words = words, (first + self.wide) * self.matrix.words
        _fill(self.matrix, first, words, self.panel)
        _fill_scales(self.matrix, first, scales, self.factors)

    def multiply(self, packed: tirx.Buffer, row: Callable[[int], Expr], tile: Expr) -> None:
        """Tile number `tile`, whose rows are `row(i)` of x, times the panel."""
        _multiply(
            self.matrix, packed, row, tile, self.panel, self.factors, self.sums, self.dots,
            self.words, self.next_words,
        )  # fmt: skip

    def store(self, out: tirx.Buffer, row: Callable[[int], Expr], first: Expr) -> None:
        """Write the products to rows `row(i)` of out, from column `first` on."""
        for i in range(TILE):
            for at in range(0, self.wide, LANES):
                total = self.sums.vload([i * self.wide + at], "float32x16")
                T.buffer_store(out, total, [row(i), T.ramp(first + at, 1, LANES)])


def wide(matrix: StoredMatrix) -> int:
    """Rows of W in a panel."""
    return _halves(matrix) * LANES


def _bits(matrix: StoredMatrix) -> int:
    assert matrix.quant is not None
    return matrix.quant.bits


def _halves(matrix: StoredMatrix) -> int:
    """Vectors of rows of W in a panel."""
    return 2 if matrix.n >= 2 * LANES else 1


def _staged(matrix: StoredMatrix) -> int:
    """Where the square begins: transposing 16 groups at a time may go beyond the last group.

    Part of the buffer of scales, because TVM gives small buffers that take turns the same memory,
    and too little of it.
    """
    return (matrix.groups + LANES) * _halves(matrix) * LANES


def _fill(matrix: StoredMatrix, first: Expr, words: tirx.Buffer, panel: tirx.Buffer) -> None:
    """The panel [group, word of x, row of W] of a task's rows of W."""
    halves, row_words = _halves(matrix), matrix.words
    with T.serial(-(-row_words // LANES)) as square:
        # The last square is moved back, over what is there already.
        word = T.min(square * LANES, row_words - LANES)
        for half in range(halves):
            group = word // matrix.group_words
            T.evaluate(
                T.call_extern(
                    "int32",
                    _panel_name(_bits(matrix), halves),
                    T.address_of(words[(first + half * LANES) * row_words + word]),
                    T.int64(row_words * 4),
                    T.address_of(panel[(group * GROUP_WORDS * halves + half) * LANES]),
                )
            )


def _fill_scales(
    matrix: StoredMatrix,
    first: Expr,
    scales: tirx.Buffer,
    factors: tirx.Buffer,
) -> None:
    """Scales as float32 [group, row of W]; behind them is room for a square to transpose."""
    groups, wide = matrix.groups, _halves(matrix) * LANES
    lanes = max(width for width in (2, 4, 8, 16) if width <= groups)
    staged = _staged(matrix)
    with T.serial(-(-groups // lanes)) as chunk:
        group = T.min(chunk * lanes, groups - lanes)
        for half in range(_halves(matrix)):
            with T.serial(LANES) as row:
                at = (first + half * LANES + row) * groups + group
                values = to_float32(scales.vload([at], vector(matrix.dtype, lanes)), lanes)
                T.buffer_store(factors, values, [T.ramp(staged + row * LANES, 1, lanes)])
            T.evaluate(
                T.call_extern(
                    "int32",
                    TRANSPOSE,
                    T.address_of(factors[staged]),
                    T.int64(LANES * 4),
                    T.address_of(factors[group * wide + half * LANES]),
                    T.int64(wide * 4),
                )
            )


def _multiply(
    matrix: StoredMatrix,
    packed: tirx.Buffer,
    row,
    tile: Expr,
    panel: tirx.Buffer,
    factors: tirx.Buffer,
    sums: tirx.Buffer,
    dots: tirx.Buffer,
    words: tirx.Buffer,
    next_words: Expr,
    first: Expr | int = 0,
    every: int = 1,
) -> None:
    """Set `sums` to the products of a tile of rows of x with the panel.

    Of the groups, those from `first` on, `every` so many.
    """
    wide = _halves(matrix) * LANES
    place = PackedRow(matrix.k)
    vectors = [(i, at) for i in range(TILE) for at in range(0, wide, LANES)]
    for i, at in vectors:
        T.buffer_store(sums, splat(0.0, LANES), [T.ramp(i * wide + at, 1, LANES)])
    lines = wide * matrix.words // LANES
    fetching = -(-lines // (matrix.groups * FETCH))
    with T.serial((matrix.groups - first + every - 1) // every) as step:
        g = first + step * every
        with T.If(tile < fetching):
            with T.Then():
                for i in range(FETCH):
                    line = (tile * matrix.groups + g) * FETCH + i
                    _prefetch(T.address_of(words[next_words + line * LANES]))
        for i, at in vectors:
            if _bits(matrix) == 4:
                start = packed[row(i), place.starts + g]
            else:
                zero = (1 << (_bits(matrix) - 1)) - 1
                start = packed[row(i), place.sums + g] * T.int32(-zero)
            T.buffer_store(dots, T.broadcast(start, LANES), [T.ramp(i * wide + at, 1, LANES)])
        for j in range(GROUP_WORDS):
            for i, at in vectors:
                codes = panel.vload([(g * GROUP_WORDS + j) * wide + at], "int32x16")
                x = T.broadcast(packed[row(i), g * GROUP_WORDS + j], LANES)
                dot = _dot(dots.vload([i * wide + at], "int32x16"), codes, x)
                T.buffer_store(dots, dot, [T.ramp(i * wide + at, 1, LANES)])
        for i, at in vectors:
            x_scale = T.reinterpret("float32", packed[row(i), place.scales + g])
            both = factors.vload([g * wide + at], "float32x16") * splat(x_scale, LANES)
            dot = T.cast(dots.vload([i * wide + at], "int32x16"), "float32x16")
            total = multiply_add(dot, both, sums.vload([i * wide + at], "float32x16"))
            T.buffer_store(sums, total, [T.ramp(i * wide + at, 1, LANES)])


def _dot(total: Expr, codes: Expr, x: Expr) -> Expr:
    """total + the sums of four products of unsigned codes and signed x; all int32x16."""
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512")
    return T.call_llvm_pure_intrin(
        "int32x16",
        intrinsic,
        total,
        T.reinterpret("uint8x64", codes),
        T.reinterpret("int8x64", x),
    )


def _prefetch(address: Expr) -> None:
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.prefetch")
    T.evaluate(T.call_llvm_intrin("void", intrinsic, address, T.int32(0), T.int32(2), T.int32(1)))


def _panel_name(bits: int, halves: int) -> str:
    return f"relaxlm_int8_panel_{bits}_{halves}"


def _panel_ir(bits: int, halves: int) -> str:
    """i32 panel(words, bytes from row to row, panel): 16 rows by 16 words.

    A vector of the panel holds four elements of each row, in the order of x: of eight consecutive
    elements first those with even numbers, then the odd ones; vectors are `halves` * 64 bytes
    apart.
    """
    square = f"<{LANES} x i32>"
    lines = [
        f"define linkonce_odr i32 @{_panel_name(bits, halves)}(ptr noalias %words, i64 %stride, "
        "ptr noalias %panel) alwaysinline nounwind {"
    ]
    for row in range(LANES):
        lines += [
            f"  %o{row} = mul i64 %stride, {row}",
            f"  %p{row} = getelementptr i8, ptr %words, i64 %o{row}",
            f"  %r{row} = load {square}, ptr %p{row}, align 4",
        ]
    moved, words = transpose_lines([f"%r{row}" for row in range(LANES)], "i32", "%t")
    lines += moved

    def store(group: int, odd: int, j: int, value: str) -> None:
        step = group * GROUP_WORDS + odd * 4 + j
        lines.extend(
            [
                f"  %d{step} = getelementptr i8, ptr %panel, i64 {step * halves * LANES * 4}",
                f"  store {square} {value}, ptr %d{step}, align 64",
            ]
        )

    def splatted(value: int) -> str:
        return "<" + ", ".join([f"i32 {value}"] * LANES) + ">"

    if bits == 4:
        for i, word in enumerate(words):
            lines += [
                f"  %e{i} = and {square} {word}, {splatted(0x0F0F0F0F)}",
                f"  %s{i} = lshr {square} {word}, {splatted(4)}",
                f"  %f{i} = and {square} %s{i}, {splatted(0x0F0F0F0F)}",
            ]
            store(i // 4, 0, i % 4, f"%e{i}")
            store(i // 4, 1, i % 4, f"%f{i}")
    else:
        for i in range(0, LANES, 2):
            for k in range(2):
                lines.append(f"  %b{i + k} = bitcast {square} {words[i + k]} to <64 x i8>")
            for odd in range(2):
                lanes = [
                    f"i32 {64 * source + 4 * row + 2 * byte + odd}"
                    for row in range(LANES)
                    for source in range(2)
                    for byte in range(2)
                ]
                lines += [
                    f"  %c{i}.{odd} = shufflevector <64 x i8> %b{i}, <64 x i8> %b{i + 1}, "
                    f"<64 x i32> <{', '.join(lanes)}>",
                    f"  %e{i}.{odd} = bitcast <64 x i8> %c{i}.{odd} to {square}",
                ]
                store(i // 8, odd, i % 8 // 2, f"%e{i}.{odd}")
    return "\n".join([*lines, "  ret i32 0", "}", ""])
