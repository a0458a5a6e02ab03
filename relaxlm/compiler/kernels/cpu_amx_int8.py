"""x @ W.T for more than 16 rows of x rounded to int8, 4-bit weights: AMX's tiles of bytes.

For kernels that have to be invariant: the same as what `cpu_few_rows` computes for a row, to the
last bit. Dot products of groups are exact; scaled in float32, those of every fourth group are added
up in order, and the four sums in pairs.

A task unpacks panels of 16 rows of W once, and passes with tiles of 16 rows of x over all of them.
A tile by a group are 256 dot products. They are made in tiles, go through memory, and are scaled
and added up in registers, 16 vectors for as many rows of x. What bounds the speed is that scaling:
three instructions for 16 dot products, of which a tile makes 256 in 16 cycles.
"""

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels import cpu_few_rows_amx
from relaxlm.compiler.kernels.builder import flat, scratch
from relaxlm.compiler.kernels.cpu_attention_tiles import instruction
from relaxlm.compiler.kernels.cpu_few_rows_amx import BLOCK_GROUPS, FILL, TILE, W, X, factors
from relaxlm.compiler.kernels.isa import Isa
from relaxlm.compiler.kernels.packed import GROUP_WORDS, PackedRow
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import multiply_add, splat

LANES = 16
# Panels of a task at most, and bytes of them: they stay in the second-level cache.
PANELS, PANEL_BYTES = 16, 1024 << 10
# Bytes of x that a task passes over.
TASK_BYTES = 1024 << 10
# Groups whose dot products are made together; a matrix has a multiple of them.
DEPTH = 2
# Batches of them after which they are scaled: stores of tiles take long to arrive in memory.
LATER = 2
# Batches that there is room for.
SLOTS = 4
SQUARE = LANES * LANES
# A panel and a tile of x, 16 bytes for each element of K, leave the first-level cache beyond that;
# `cpu_int8_gemm` is as fast then.
LONGEST = 2048
# Buffers of 1024 bytes would not be registers.
HALF = LANES // 2


def supports(matrix: StoredMatrix, isa: Isa) -> bool:
    """Whether a matrix can be multiplied here, fast: short rows of whole lines, and 16 of them."""
    quant = matrix.quant
    return (
        isa == "amx"
        and matrix.k <= LONGEST
        and quant is not None
        and (quant.bits, quant.group, quant.layout) == (4, 32, "NK")
        and cpu_few_rows_amx.supports(matrix)
    )


def imports(matrix: StoredMatrix, isa: Isa) -> list[str]:
    """LLVM IR that `emit_matmul` needs."""
    return cpu_few_rows_amx.imports()


def emit_matmul(
    matrix: StoredMatrix,
    isa: Isa,
    m: Expr,
    packed: tirx.Buffer,
    weight: tirx.Buffer,
    scale: tirx.Buffer | None,
    out: tirx.Buffer,
) -> None:
    """Emit out = x @ W.T.

    Args:
        m: rows of x, int64, at least 16.
        packed: [m, at least packed.row_words(K)] int32, of the form "int8", linear.
        weight, scale: the stored matrix.
        out: [m, N] float32.
    """
    assert supports(matrix, isa) and scale is not None, matrix
    panels = -(-matrix.n // LANES)
    together = max(1, min(PANELS, PANEL_BYTES // (matrix.groups * TILE * 4)))
    columns = -(-panels // together)
    rows = max(TASK_BYTES // matrix.k // LANES, 1) * LANES
    with T.parallel((m + rows - 1) // rows * columns) as task:
        first_row, first_panel = task // columns * rows, task % columns * together
        count = T.min(together, panels - first_panel)
        block = _Task(matrix, together, packed, flat(weight), flat(scale), out)
        block.configure()

        def column(panel: Expr) -> Expr:
            # The last rows of W, and of x, may be others again, which get the same results.
            start = T.cast(first_panel + panel, "int64") * LANES
            return T.min(start, T.int64(matrix.n - LANES))

        with T.serial(count) as panel:
            block.fill(panel, column(panel))
        with T.serial((T.min(m - first_row, rows) + LANES - 1) // LANES) as tile:
            row = T.min(first_row + tile * LANES, m - LANES)
            block.take(row)
            with T.serial(count) as panel:
                block.multiply(panel, column(panel), row)
        instruction("tilerelease")


class _Task:
    """The statements for panels of 16 rows of W and tiles of 16 rows of x.

    Groups lie in the order in which they are added up: every fourth one, from the first on, then
    those from the second on, and so on.
    """

    def __init__(
        self,
        matrix: StoredMatrix,
        panels: int,
        packed: tirx.Buffer,
        words: tirx.Buffer,
        scales: tirx.Buffer,
        out: tirx.Buffer,
    ) -> None:
        self.matrix, self.packed, self.out = matrix, packed, out
        self.words, self.scales = words, scales
        # Groups of each of the sums that are made side by side.
        self.steps = matrix.groups // BLOCK_GROUPS
        self.place = PackedRow(matrix.k)
        self.panels = scratch(panels * matrix.groups * TILE, "int32")
        self.factors = scratch(panels * matrix.groups * LANES, "float32")
        self.x = scratch(matrix.groups * TILE, "int32")
        self.x_scales = scratch(matrix.groups * LANES, "float32")
        self.line = scratch(BLOCK_GROUPS * TILE, "int32")
        self.dots = scratch(SLOTS * DEPTH * SQUARE, "int32")
        self.sums = scratch(BLOCK_GROUPS * SQUARE, "float32")
        self.totals = [scratch(HALF * LANES, "float32") for _ in range(2)]

    def configure(self) -> None:
        """Give this thread its tiles: of dot products, of x and of W."""
        config = scratch(64, "uint8")
        T.buffer_store(config, T.broadcast(T.uint8(0), 64), [T.ramp(0, 1, 64)])
        T.buffer_store(config, T.uint8(1), [0])
        shapes = {**dict.fromkeys(range(DEPTH), (LANES, 64)), **dict.fromkeys(X, (LANES, 32))}
        shapes |= dict.fromkeys(W, (GROUP_WORDS, 64))
        for tile, (count, width) in shapes.items():
            T.buffer_store(config, T.uint8(width), [16 + 2 * tile])
            T.buffer_store(config, T.uint8(count), [48 + tile])
        instruction("ldtilecfg", T.address_of(config[0]))

    def _order(self, step: Expr, g: Expr | int) -> Expr:
        """Where group g of a line comes."""
        return g * self.steps + step

    def fill(self, panel: Expr, column: Expr) -> None:
        """Unpack all groups of the rows of W from `column` on."""
        row_words, groups = self.matrix.words, self.matrix.groups
        with T.serial(self.steps) as step:
            line = T.address_of(self.words[column * row_words + step * LANES])
            stride = T.int64(row_words * 4)
            T.evaluate(T.call_extern("int32", FILL, line, stride, T.address_of(self.line[0])))
            for g, factor in enumerate(factors(self.matrix, self.scales, column, step)):
                at = panel * groups + self._order(step, g)
                T.buffer_store(self.factors, factor, [T.ramp(at * LANES, 1, LANES)])
                for i in range(0, TILE, LANES):
                    words = self.line.vload([g * TILE + i], "int32x16")
                    T.buffer_store(self.panels, words, [T.ramp(at * TILE + i, 1, LANES)])

    def take(self, row: Expr) -> None:
        """Bring 16 rows of x from `row` on close together."""
        with T.serial(LANES) as r, T.serial(self.steps) as step:
            for g in range(BLOCK_GROUPS):
                group, at = step * BLOCK_GROUPS + g, self._order(step, g)
                words = self.packed.vload([row + r, group * GROUP_WORDS], "int32x8")
                T.buffer_store(self.x, words, [T.ramp(at * TILE + r * GROUP_WORDS, 1, GROUP_WORDS)])
                scale = T.reinterpret("float32", self.packed[row + r, self.place.scales + group])
                T.buffer_store(self.x_scales, scale, [at * LANES + r])

    def multiply(self, panel: Expr, column: Expr, row: Expr) -> None:
        """A panel times the 16 rows of x that were taken last."""
        batches = -(-self.matrix.groups // DEPTH)
        self._clear()
        with T.serial(batches + LATER) as batch:
            with T.If(batch < batches), T.Then():
                self._multiply_batch(panel, batch)
            with T.If(batch >= LATER), T.Then():
                self._scale_batch(panel, batch - LATER)
            with T.If(batch < batches), T.Then():
                for i in range(DEPTH):
                    at = T.address_of(self.dots[self._dots(batch, i, 0)])
                    instruction("tilestored64", i, at, T.int64(64))
        with T.serial(LANES) as r:
            sums = [
                self.sums.vload([(part * LANES + r) * LANES], "float32x16")
                for part in range(BLOCK_GROUPS)
            ]
            both = (sums[0] + sums[1]) + (sums[2] + sums[3])
            T.buffer_store(self.out, both, [row + r, T.ramp(column, 1, LANES)])

    def _dots(self, batch: Expr, i: int, r: int) -> Expr:
        return (batch % SLOTS * DEPTH + i) * SQUARE + r * LANES

    def _multiply_batch(self, panel: Expr, batch: Expr) -> None:
        for i in range(DEPTH):
            x, w, at = X[i % 2], W[i % 2], batch * DEPTH + i
            instruction("tilezero", i)
            instruction("tileloadd64", x, T.address_of(self.x[at * TILE]), T.int64(32))
            words = self.panels[(panel * self.matrix.groups + at) * TILE]
            instruction("tileloadd64", w, T.address_of(words), T.int64(64))
            instruction("tdpbssd", i, x, w)

    def _scale_batch(self, panel: Expr, batch: Expr) -> None:
        """Scale a batch and add it to the totals; where a sum ends, put it by."""
        for i in range(DEPTH):
            at = batch * DEPTH + i
            place = (panel * self.matrix.groups + at) * LANES
            factor = self.factors.vload([place], "float32x16")
            for r in range(LANES):
                dots = self.dots.vload([self._dots(batch, i, r)], "int32x16")
                both = factor * splat(self.x_scales[at * LANES + r], LANES)
                self._put_total(r, multiply_add(T.cast(dots, "float32x16"), both, self._total(r)))
            with T.If((at + 1) % self.steps == 0), T.Then():
                for r in range(LANES):
                    kept = (at // self.steps * LANES + r) * LANES
                    T.buffer_store(self.sums, self._total(r), [T.ramp(kept, 1, LANES)])
                self._clear()

    def _clear(self) -> None:
        for r in range(LANES):
            self._put_total(r, splat(0.0, LANES))

    def _total(self, r: int) -> Expr:
        return self.totals[r // HALF].vload([r % HALF * LANES], "float32x16")

    def _put_total(self, r: int, value: Expr) -> None:
        T.buffer_store(self.totals[r // HALF], value, [T.ramp(r % HALF * LANES, 1, LANES)])
