"""x @ W.T for 9 to 16 rows of x rounded to int8, 4-bit weights as they are stored: AMX's tiles.

For 16 rows of W and a line (four groups of K) of each, words are transposed so that lanes are rows
of W: of each group a tile [8 words][16 rows of W]. A tile [m][8 words] of x, read where `packed`
has it in the order `linear`, times that are the sums of a group, which are scaled and added up in
float32, lanes still being rows of W.

Tile instructions run beside those of vectors. So while a line is multiplied, the next one is
transposed, and the sums of the one before are scaled.
"""

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import flat, scratch
from relaxlm.compiler.kernels.cpu_gemv import fetch
from relaxlm.compiler.kernels.cpu_transpose import transpose_lines
from relaxlm.compiler.kernels.packed import (
    BLOCK,
    BLOCK_GROUPS,
    FEW,
    GROUP_WORDS,
    ZERO_OF_4_BITS,
    PackedRow,
)
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import multiply_add, splat, to_float32

LANES = 16
# Times 16 rows of W that a task takes, with one allocation of memory.
TASK = 4
# Words of a tile of a group of W, of the tiles of a line, and of the sums of a line.
TILE = GROUP_WORDS * LANES
PANEL = BLOCK_GROUPS * TILE
SUMS = BLOCK_GROUPS * FEW * LANES
FILL = "relaxlm_few_rows_fill"
# Tiles: sums of four groups, two of x, two of W.
X, W = (4, 6), (5, 7)


def supports(matrix: StoredMatrix) -> bool:
    """Whether `emit_matmul` can multiply with a 4-bit matrix: whole lines, and 16 rows."""
    return matrix.k % BLOCK == 0 and matrix.n >= LANES


def imports() -> list[str]:
    """LLVM IR that the kernel needs."""
    return [_fill_ir()]


def emit_matmul(
    matrix: StoredMatrix,
    m: Expr,
    packed: tirx.Buffer,
    weight: tirx.Buffer,
    scale: tirx.Buffer,
    out: tirx.Buffer,
    parts: int = 1,
) -> None:
    """Emit out [m, N] float32 = x @ W.T for 1 <= m <= FEW, x in the order `linear`.

    Args:
        parts: 1: groups are added up one after the other; 4: those of each line's first group, of
            its second .., and then the four in pairs, as `cpu_few_rows` does.
    """
    blocks = -(-matrix.n // LANES)
    with T.parallel(-(-blocks // TASK)) as task:
        block = _Block(matrix, m, packed, flat(weight), flat(scale), out, parts)
        block.configure()
        with T.serial(T.min(TASK, blocks - task * TASK)) as i:
            first = T.cast(task * TASK + i, "int64") * LANES
            # The last rows may be others again, which get the same results.
            block.emit(T.min(first, T.int64(matrix.n - LANES)))
        T.evaluate(_tile("tilerelease"))


class _Block:
    """The statements for 16 rows of W."""

    def __init__(
        self,
        matrix: StoredMatrix,
        m: Expr,
        packed: tirx.Buffer,
        words: tirx.Buffer,
        scales: tirx.Buffer,
        out: tirx.Buffer,
        parts: int,
    ) -> None:
        self.parts = parts
        self.matrix, self.m, self.packed, self.out = matrix, m, packed, out
        self.words, self.scales = words, scales
        self.steps = matrix.groups // BLOCK_GROUPS
        self.place = PackedRow(matrix.k)
        # Two panels and two times sums: those being made, and those being used.
        self.room = scratch(2 * PANEL + 2 * SUMS + parts * FEW * LANES, "int32")
        self.totals = 2 * PANEL + 2 * SUMS

    def configure(self) -> None:
        config = scratch(64, "uint8")
        with T.serial(64) as i:
            T.buffer_store(config, T.uint8(0), [i])
        T.buffer_store(config, T.uint8(1), [0])
        rows = T.cast(self.m, "uint8")
        shapes = {**dict.fromkeys(range(BLOCK_GROUPS), (rows, 64)), **dict.fromkeys(X, (rows, 32))}
        shapes |= dict.fromkeys(W, (T.uint8(GROUP_WORDS), 64))
        for tile, (count, width) in shapes.items():
            T.buffer_store(config, T.uint8(width), [16 + 2 * tile])
            T.buffer_store(config, count, [48 + tile])
        T.evaluate(_tile("ldtilecfg", T.address_of(config[0])))

    def emit(self, first: Expr) -> None:
        with T.serial(self.m) as row:
            for part in range(self.parts):
                self._put_total(row, splat(0.0, LANES), part)
        self._fill(first, 0)
        with T.serial(self.steps) as step:
            self._multiply(step)
            self._fill(first, T.min(step + 1, self.steps - 1), (step + 1) % 2)
            with T.If(step > 0):
                with T.Then():
                    self._add(first, step - 1)
            self._store_sums(step)
        self._add(first, self.steps - 1)
        with T.serial(self.m) as row:
            totals = [self._total(row, part) for part in range(self.parts)]
            while len(totals) > 1:
                totals = [a + b for a, b in zip(totals[::2], totals[1::2], strict=True)]
            T.buffer_store(self.out, totals[0], [row, T.ramp(first, 1, LANES)])

    def _fill(self, first: Expr, step: Expr | int, panel: Expr | int = 0) -> None:
        for row in range(LANES):
            at = (first + LANES + row) * self.matrix.words + step * LANES
            fetch(T.address_of(self.words[at]))
        line = T.address_of(self.words[first * self.matrix.words + step * LANES])
        stride = T.int64(self.matrix.words * 4)
        room = T.address_of(self.room[panel * PANEL])
        T.evaluate(T.call_extern("int32", FILL, line, stride, room))

    def _multiply(self, step: Expr) -> None:
        stride = T.cast(self.packed.shape[1] * 4, "int64")
        for g in range(BLOCK_GROUPS):
            x, w = X[g % 2], W[g % 2]
            group = step * BLOCK_GROUPS + g
            panel = T.address_of(self.room[step % 2 * PANEL + g * TILE])
            rows = T.address_of(self.packed[0, group * GROUP_WORDS])
            T.evaluate(_tile("tilezero", _number(g)))
            T.evaluate(_tile("tileloadd64", _number(x), rows, stride))
            T.evaluate(_tile("tileloadd64", _number(w), panel, T.int64(64)))
            T.evaluate(_tile("tdpbssd", _number(g), _number(x), _number(w)))

    def _store_sums(self, step: Expr) -> None:
        for g in range(BLOCK_GROUPS):
            at = T.address_of(self.room[self._sums(step, g, 0)])
            T.evaluate(_tile("tilestored64", _number(g), at, T.int64(64)))

    def _sums(self, step: Expr | int, g: int, row: Expr | int) -> Expr:
        return 2 * PANEL + step % 2 * SUMS + (g * FEW + row) * LANES

    def _add(self, first: Expr, step: Expr | int) -> None:
        """Scale the sums of a line and add them to the totals."""
        scales = scratch(BLOCK_GROUPS * LANES, "float32")
        for g, factor in enumerate(factors(self.matrix, self.scales, first, step)):
            T.buffer_store(scales, factor, [T.ramp(g * LANES, 1, LANES)])
        with T.serial(self.m) as row:
            total = scratch(LANES, "float32")
            for g in range(BLOCK_GROUPS):
                if g < self.parts:
                    T.buffer_store(total, self._total(row, g), [T.ramp(0, 1, LANES)])
                sums = self.room.vload([self._sums(step, g, T.cast(row, "int32"))], "int32x16")
                scale = self.packed[row, self.place.scales + step * BLOCK_GROUPS + g]
                wide = splat(T.reinterpret("float32", scale), LANES)
                both = scales.vload([g * LANES], "float32x16") * wide
                before = total.vload([0], "float32x16")
                added = multiply_add(T.cast(sums, "float32x16"), both, before)
                T.buffer_store(total, added, [T.ramp(0, 1, LANES)])
                if self.parts > 1 or g == BLOCK_GROUPS - 1:
                    self._put_total(row, total.vload([0], "float32x16"), g % self.parts)

    def _total_at(self, row: Expr, part: int) -> Expr:
        return self.totals + (T.cast(row, "int32") * self.parts + part) * LANES

    def _total(self, row: Expr, part: int) -> Expr:
        at = self._total_at(row, part)
        return T.reinterpret("float32x16", self.room.vload([at], "int32x16"))

    def _put_total(self, row: Expr, total: Expr, part: int) -> None:
        ramp = T.ramp(self._total_at(row, part), 1, LANES)
        T.buffer_store(self.room, T.reinterpret("int32x16", total), [ramp])


def factors(matrix: StoredMatrix, scales: tirx.Buffer, first: Expr, step: Expr | int) -> list[Expr]:
    """The scales of a line's four groups, each of 16 rows of W from `first` on, float32x16."""

    def four_rows(row: int) -> Expr:
        """[row, group]"""
        fours = [
            scales.vload(
                [(first + row + i) * matrix.groups + step * BLOCK_GROUPS], f"{matrix.dtype}x4"
            )
            for i in range(4)
        ]
        return to_float32(_shuffle(fours, range(LANES)), LANES)

    def two_groups(row: int, group: int) -> Expr:
        """[group, row], eight rows"""
        picked = [4 * r + g for g in (group, group + 1) for r in (0, 1, 2, 3, 4, 5, 6, 7)]
        return _shuffle([four_rows(row), four_rows(row + 4)], picked)

    vectors = []
    for group in range(BLOCK_GROUPS):
        both = [two_groups(row, group // 2 * 2) for row in (0, 8)]
        eight = [i + group % 2 * 8 for i in range(8)]
        vectors.append(_shuffle(both, [*eight, *(i + LANES for i in eight)]))
    return vectors


def _shuffle(vectors: list[Expr], lanes) -> Expr:
    return T.Shuffle(vectors, [tirx.const(lane, "int32") for lane in lanes])


def _tile(name: str, *operands: Expr) -> Expr:
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
    return T.call_llvm_intrin("void", intrinsic, *operands)


def _number(tile: int) -> Expr:
    return tirx.const(tile, "int8")


def _fill_ir() -> str:
    """i32 FILL(words, bytes from row to row, panel): a line of 16 rows of W.

    `panel` becomes [group][word][row], four groups of 8 words of signed bytes: those of the low
    nibbles of words 0 .. 3 of the group, then those of the high ones, minus the code of zero.
    """
    words, codes = f"<{LANES} x i32>", f"<{LANES * 4} x i8>"
    nibbles = ", ".join([f"i32 {0x0F0F0F0F}"] * LANES)
    fours = ", ".join(["i32 4"] * LANES)
    zeros = ", ".join([f"i8 {ZERO_OF_4_BITS}"] * LANES * 4)
    lines = [
        f"define linkonce_odr i32 @{FILL}(ptr noalias %words, i64 %stride, ptr noalias %panel) "
        "alwaysinline nounwind {"
    ]
    for row in range(LANES):
        lines += [
            f"  %o{row} = mul i64 %stride, {row}",
            f"  %p{row} = getelementptr i8, ptr %words, i64 %o{row}",
            f"  %r{row} = load {words}, ptr %p{row}, align 4",
        ]
    moved, columns = transpose_lines([f"%r{row}" for row in range(LANES)], "i32", "%t")
    lines += moved
    for i, column in enumerate(columns):
        group, j = i // 4, i % 4
        lines.append(f"  %h{i} = lshr {words} {column}, <{fours}>")
        for half, source in enumerate((column, f"%h{i}")):
            name, at = f"{i}.{half}", ((group * 2 + half) * 4 + j) * LANES * 4
            lines += [
                f"  %n{name} = and {words} {source}, <{nibbles}>",
                f"  %b{name} = bitcast {words} %n{name} to {codes}",
                f"  %s{name} = sub {codes} %b{name}, <{zeros}>",
                f"  %a{name} = getelementptr i8, ptr %panel, i64 {at}",
                f"  store {codes} %s{name}, ptr %a{name}, align 64",
            ]
    return "\n".join([*lines, "  ret i32 0", "}", ""])
