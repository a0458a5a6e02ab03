"""packed x @ W.T for many rows of x on ARM CPUs that multiply matrices of bytes (i8mm).

As in `cpu_narrow_panel`, but one instruction adds to four int32 the products of two rows of x with
two rows of W, 8 elements each: lane 2 i + j is row i of x with row j of W. Four-bit codes are
centred on the way into the panel, so sums of x are not needed.
"""

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr

from relaxlm.compiler.kernels.builder import T, scratch
from relaxlm.compiler.kernels.cpu_narrow_dots import BLOCK, Dots, intrinsic, shuffle
from relaxlm.compiler.kernels.cpu_narrow_panel import NIBBLES, Panel
from relaxlm.compiler.kernels.packed import GROUP_WORDS
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import multiply_add, splat

LANES = 4
SIDE = 2
# Runs of 8 elements in a group: two of the even elements, two of the odd ones.
RUNS = 4
FLOATS, INTS, BYTES = "float32x4", "int32x4", "int8x16"
# Two vectors' first and second halves.
HALVES = ((0, 1, 4, 5), (2, 3, 6, 7))


class Squares(Panel):
    """The kernel for any number of rows of x, and for 4-bit matrices that `fits`.

    Args:
        vectors: pairs of rows of W that a task takes, an even number.
        tile: rows of x that are multiplied together, a power of two.
    """

    def __init__(self, matrix: StoredMatrix, dots: Dots, vectors: int, tile: int) -> None:
        assert self.fits(matrix, vectors), matrix
        super().__init__(matrix, dots, vectors, tile)
        self.vectors, self.wide = vectors, vectors * SIDE

    @staticmethod
    def fits(matrix: StoredMatrix, vectors: int) -> bool:
        return matrix.quant is not None and matrix.quant.bits == 4 and matrix.n >= vectors * SIDE

    def _pair(self, task: Expr, v: int) -> Expr:
        """The first row of W of a pair."""
        return self._row(task, 0, 0) + v * SIDE

    def _fill(self, words: tirx.Buffer, task: Expr, block: Expr, panel: tirx.Buffer) -> None:
        """Vectors of 8 elements of two rows, run after run."""
        with T.serial(self._count(block)) as g, T.serial(self.vectors) as v:
            both = scratch(SIDE * LANES, "uint32")
            for side in range(SIDE):
                row = self._pair(task, v) + side
                at = row * self.matrix.words + (block * self.depth + g) * BLOCK
                self._put(both, side * LANES, words.vload([at], "uint32x4"))
            for half in range(2):
                parts = []
                for side in range(SIDE):
                    codes = both.vload([side * LANES], "uint32x4")
                    if half:
                        codes = T.shift_right(codes, T.broadcast(T.uint32(4), LANES))
                    codes = T.bitwise_and(codes, T.broadcast(T.uint32(NIBBLES), LANES))
                    parts.append(T.reinterpret(INTS, codes))
                for i, lanes in enumerate(HALVES):
                    run = T.reinterpret(BYTES, shuffle(parts, lanes))
                    centred = run - T.broadcast(tirx.const(-self.start, "int8"), 16)
                    at = ((g * RUNS + half * 2 + i) * self.vectors + v) * LANES
                    self._put(panel, at, T.reinterpret(INTS, centred))

    def _fill_factors(
        self, scales: tirx.Buffer, task: Expr, block: Expr, factors: tirx.Buffer
    ) -> None:
        """Scales of pairs of rows, twice."""
        groups = self.matrix.groups
        with T.serial(self._count(block)) as g, T.serial(self.vectors) as v:
            for side in range(SIDE):
                at = (self._pair(task, v) + side) * groups + block * self.depth + g
                for i in (side, SIDE + side):
                    place = (g * self.vectors + v) * LANES + i
                    T.buffer_store(factors, T.cast(scales[at], "float32"), [place])

    def _multiply(
        self,
        packed: tirx.Buffer,
        words: tirx.Buffer,
        task: Expr,
        block: Expr,
        first: Expr,
        rows: int,
        panel: tirx.Buffer,
        factors: tirx.Buffer,
        carried: tirx.Buffer | None,
        out: tirx.Buffer,
    ) -> None:
        # A row alone is a pair with itself.
        pairs = [(first + i, first + min(i + 1, rows - 1)) for i in range(0, rows, SIDE)]
        tile = [(p, v) for p in range(len(pairs)) for v in range(self.vectors)]
        sums = scratch(len(tile) * LANES, "float32")

        def kept(p: int, v: int) -> Expr:
            return ((first // SIDE + p) * self.vectors + v) * LANES

        for i, (p, v) in enumerate(tile):
            begin = splat(0.0, LANES)
            if carried is not None:
                begin = T.Select(block == 0, begin, carried.vload([kept(p, v)], FLOATS))
            self._put(sums, i * LANES, begin)
        with T.serial(self._count(block)) as g:
            self._fetch_ahead(words, task, block, first // self.tile, g)
            self._add_squares(packed, pairs, block * self.depth + g, g, panel, factors, sums)

        def store() -> None:
            column = T.cast(self._row(task, 0, 0), "int32")
            for i in range(0, len(tile), 2):
                p, v = tile[i]
                both = [sums.vload([(i + half) * LANES], FLOATS) for half in range(2)]
                for row, lanes in list(zip(pairs[p], HALVES, strict=True))[:rows]:
                    place = [row, T.ramp(column + v * SIDE, 1, LANES)]
                    T.buffer_store(out, shuffle(both, lanes), place)

        if carried is None:
            store()
            return
        with T.If(block < self.k_blocks - 1):
            with T.Then():
                for i, (p, v) in enumerate(tile):
                    self._put(carried, kept(p, v), sums.vload([i * LANES], FLOATS))
            with T.Else():
                store()

    def _add_squares(
        self,
        packed: tirx.Buffer,
        pairs: Sequence[tuple[Expr, Expr]],
        group: Expr,
        g: Expr,
        panel: tirx.Buffer,
        factors: tirx.Buffer,
        sums: tirx.Buffer,
    ) -> None:
        """Group `group` of K, the g-th of the panel, for a tile of pairs of rows of x."""
        tile = [(p, v) for p in range(len(pairs)) for v in range(self.vectors)]
        totals = scratch(len(tile) * LANES, "int32")
        for i in range(len(tile)):
            self._put(totals, i * LANES, self.dots.nothing())
        for run in range(RUNS):
            for i, (p, v) in enumerate(tile):
                at = group * GROUP_WORDS + run // 2 * BLOCK
                x = shuffle([packed.vload([row, at], INTS) for row in pairs[p]], HALVES[run % 2])
                codes = panel.vload([((g * RUNS + run) * self.vectors + v) * LANES], INTS)
                total = intrinsic(
                    INTS,
                    "llvm.aarch64.neon.smmla",
                    totals.vload([i * LANES], INTS),
                    T.reinterpret(BYTES, x),
                    T.reinterpret(BYTES, codes),
                )
                self._put(totals, i * LANES, total)
        for i, (p, v) in enumerate(tile):
            bits = [packed[row, self.place.scales + group] for row in pairs[p]]
            scale = shuffle(
                [T.reinterpret("float32", bits[lane // SIDE]) for lane in range(4)], range(4)
            )
            factor = factors.vload([(g * self.vectors + v) * LANES], FLOATS)
            total = T.cast(totals.vload([i * LANES], INTS), FLOATS)
            before = sums.vload([i * LANES], FLOATS)
            self._put(sums, i * LANES, multiply_add(total, factor * scale, before))
