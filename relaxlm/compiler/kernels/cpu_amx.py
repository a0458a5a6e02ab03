"""x @ W.T for many rows of x on CPUs with AMX: tiles of bfloat16, sums in float32.

The form "bf16" of x [m, K]: a row of `packed [m, row_words(K)] int32` holds its elements rounded to
bfloat16, two to a word, the one with the even number below, and zeros up to a multiple of 32.

A task takes the outputs of some rows of x by some rows of W. W is dequantized into panels of 32 of
its rows by a block of K, which all of the task's rows of x pass over; the panel being read stays
in the first-level cache, x streams from the second, and the next panel is filled between the tile
instructions, which leave the vector units idle. Sums of all of K stay in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, flat, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_amx_fill import FILL, TRANSPOSE, fill_ir, transpose_ir
from relaxlm.compiler.kernels.isa import Isa
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import to_float32, vector

# Elements of K that one tile instruction multiplies; a group of 4-bit weights.
DEPTH = 32
# Words of a row of a tile, and rows of a tile; a line of the cache.
LINE_WORDS = 16
TILE_WORDS = 16 * LINE_WORDS
# Rows of x and of W that a step multiplies: two tiles each, four tiles of sums.
ROWS = 32
PANEL = 32
# Groups of K in a panel at most: 32 KiB of bfloat16, two thirds of the first-level cache.
BLOCK = 16
# Rows of x, and panels at most, that a task takes. A block of K of x is read once for all panels,
# and that and the task's sums fit into the second-level cache.
TASK_ROWS = 256
TASK_PANELS = 8

Value = Callable[[Expr | int, int], Expr]


def row_words(k: int) -> int:
    """The int32 words of a packed row of K elements: an odd number of cache lines.

    So no 64 rows in a row share a set of the cache.
    """
    return (-(-k // DEPTH) | 1) * LINE_WORDS


def emit_pack(k: int, value: Value, packed: tirx.Buffer, row: Expr | int, m: Expr | int) -> None:
    """Emit the statements that write one row.

    Args:
        value: (i, lanes) -> float32 elements i .. i + lanes of the row, lanes 16 or fewer, i a
            multiple of lanes, i + lanes <= K. Called once for each element.
        packed: [m, at least row_words(K)] int32.
        m: the number of rows.
    """
    words = packed.shape[1]
    halves = T.decl_buffer((m * words * 2,), "uint16", data=packed.data)

    def store(i: Expr | int, lanes: int) -> None:
        at = row * words * 2 + i
        T.buffer_store(halves, _bfloat16(value(i, lanes), lanes), [_ramp(at, lanes)])

    if k // LINE_WORDS:
        with T.serial(k // LINE_WORDS) as chunk:
            store(chunk * LINE_WORDS, LINE_WORDS)
    done = k // LINE_WORDS * LINE_WORDS
    for lanes in (8, 4, 2, 1):
        if k & lanes:
            store(done, lanes)
            done += lanes
    if k % DEPTH:
        with T.serial(-k % DEPTH) as i:
            T.buffer_store(halves, T.uint16(0), [row * words * 2 + k + i])


def pack_kernel(k: int) -> tirx.PrimFunc:
    """(x [m, K] float32, packed [m, row_words(K)] int32)."""

    def body() -> None:
        m = length("m")
        x = tensor("x", (m, k), "float32")
        packed = tensor("packed", (m, row_words(k)), "int32")
        with T.parallel(m) as row:
            emit_pack(k, lambda i, n: x.vload([row, i], vector("float32", n)), packed, row, m)

    return emit(body)


def supports(matrix: StoredMatrix, isa: Isa) -> bool:
    """Whether a matrix can be multiplied here: 16 rows at least."""
    quant = matrix.quant
    return (
        isa == "amx"
        and matrix.n >= LINE_WORDS
        and quant is not None
        and (quant.bits, quant.group, quant.layout) == (4, DEPTH, "NK")
    )


def imports(matrix: StoredMatrix, isa: Isa) -> list[str]:
    """LLVM IR that `emit_matmul` needs."""
    return [fill_ir(), transpose_ir()]


@dataclass(frozen=True)
class Blocks:
    """How a matrix [n, k] is cut."""

    n: int
    groups: int

    @property
    def panels(self) -> int:
        return -(-self.n // PANEL)

    @property
    def task_panels(self) -> int:
        """Panels that a task takes, one after the other; all tasks about as many."""
        return -(-self.panels // -(-self.panels // TASK_PANELS))

    @property
    def tasks(self) -> int:
        """For each of the blocks of rows of x."""
        return -(-self.panels // self.task_panels)

    @property
    def count(self) -> int:
        """Of blocks of K."""
        return -(-self.groups // BLOCK)

    @property
    def depth(self) -> int:
        """Groups in a block of K; the last may have fewer."""
        return -(-self.groups // self.count)


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
        m: rows of x, int64, at least 1.
        packed: [m, at least row_words(K)] int32, of the form "bf16".
        weight, scale: the stored matrix.
        out: [m, N] float32.
    """
    assert supports(matrix, isa) and scale is not None, matrix
    blocks = Blocks(matrix.n, matrix.groups)
    with T.parallel((m + TASK_ROWS - 1) // TASK_ROWS * blocks.tasks) as task:
        _Task(matrix, blocks, m, packed, flat(weight), flat(scale), out, task).emit()


class _Task:
    """The statements of one task."""

    def __init__(
        self,
        matrix: StoredMatrix,
        blocks: Blocks,
        m: Expr,
        packed: tirx.Buffer,
        words: tirx.Buffer,
        scales: tirx.Buffer,
        out: tirx.Buffer,
        task: Expr,
    ) -> None:
        self.matrix, self.blocks, self.m = matrix, blocks, m
        self.row_words = packed.shape[1]
        self.x = T.decl_buffer((m * self.row_words,), "int32", data=packed.data)
        self.out = T.decl_buffer((m * matrix.n,), "float32", data=out.data)
        self.words, self.scales = words, scales
        self.first_row = task // blocks.tasks * TASK_ROWS
        self.first_panel = task % blocks.tasks * blocks.task_panels
        self.panels = T.min(blocks.task_panels, blocks.panels - self.first_panel)
        self.tiles = (T.min(m - self.first_row, TASK_ROWS) + ROWS - 1) // ROWS
        self.stages = self.panels * blocks.count
        panel = blocks.depth * 2 * TILE_WORDS
        self.panel = scratch(2 * panel, "int32")
        self.panel_words = panel
        self.factors = scratch(BLOCK * PANEL, "float32")
        self.rows = scratch(16 * _STAGED, "float32")
        sums = TASK_ROWS // ROWS * blocks.task_panels * 4 * TILE_WORDS if blocks.count > 1 else 1
        self.sums = scratch(sums, "float32")
        self.config = scratch(64, "uint8")

    def emit(self) -> None:
        self._configure()
        self._prepare(T.int64(0))
        with T.serial(self._units(T.int64(0))) as unit:
            self._fill(T.int64(0), unit)
        with T.serial(self.stages) as stage:
            with T.If(stage + 1 < self.stages):
                with T.Then():
                    self._prepare(stage + 1)
            with T.serial(self.tiles) as tile:
                self._multiply(stage, tile)
        T.evaluate(_tile("tilerelease"))

    def _configure(self) -> None:
        """Eight tiles of 64 bytes a row; those of x and of sums have no more rows than x."""
        used = T.cast(T.min(self.m, LINE_WORDS), "uint8")
        with T.serial(64) as i:
            T.buffer_store(self.config, T.uint8(0), [i])
        T.buffer_store(self.config, T.uint8(1), [0])
        for tile in range(8):
            T.buffer_store(self.config, T.uint8(64), [16 + 2 * tile])
            rows = T.uint8(16) if tile in _B_TILES else used
            T.buffer_store(self.config, rows, [48 + tile])
        T.evaluate(_tile("ldtilecfg", T.address_of(self.config[0])))

    # Where a stage is: panel number `stage % panels` of the task, block `stage // panels` of K.

    def _first_group(self, stage: Expr) -> Expr:
        return stage // self.panels * self.blocks.depth

    def _steps(self, stage: Expr) -> Expr:
        return T.min(self.blocks.depth, self.blocks.groups - self._first_group(stage))

    def _units(self, stage: Expr) -> Expr:
        """Tiles of a stage's panel; none after the last stage."""
        return T.if_then_else(stage < self.stages, 2 * self._steps(stage), T.int64(0))

    def _column(self, stage: Expr, half: Expr | int) -> Expr:
        """The first of 16 rows of W; those beyond the last are others again."""
        panel = self.first_panel + stage % self.panels
        return T.min(panel * PANEL + half * LINE_WORDS, self.matrix.n - LINE_WORDS)

    def _panel(self, stage: Expr) -> Expr:
        return stage % 2 * self.panel_words

    def _prepare(self, stage: Expr) -> None:
        """Scales of a stage's panel, as float32 [group, row of W]."""
        groups = self.blocks.groups
        wide = max(w for w in (1, 2, 4, 8, 16) if w <= groups)
        first = self._first_group(stage)
        for half in range(2):
            with T.serial(LINE_WORDS) as row:
                for chunk in range(-(-self.blocks.depth // wide)):
                    # Vectors beyond the row's end are moved back, over what is there already.
                    group = T.min(first + chunk * wide, groups - wide)
                    at = (self._column(stage, half) + row) * groups + group
                    values = self.scales.vload([at], vector(self.matrix.dtype, wide))
                    place = row * _STAGED + LINE_WORDS + group - first
                    T.buffer_store(self.rows, to_float32(values, wide), [_ramp(place, wide)])
            T.evaluate(
                T.call_extern(
                    "int32",
                    TRANSPOSE,
                    T.address_of(self.rows[LINE_WORDS]),
                    T.int64(_STAGED * 4),
                    T.address_of(self.factors[half * LINE_WORDS]),
                    T.int64(PANEL * 4),
                )
            )

    def _fill(self, stage: Expr, unit: Expr) -> None:
        """Fill one tile of a stage's panel."""
        row_words = self.matrix.words
        step, half = unit // 2, unit % 2
        group = self._first_group(stage) + step
        at = self._column(stage, half) * row_words + group * self.matrix.group_words
        T.evaluate(
            T.call_extern(
                "int32",
                FILL,
                T.address_of(self.words[at]),
                T.int64(row_words * 4),
                T.address_of(self.factors[step * PANEL + half * LINE_WORDS]),
                T.address_of(self.panel[self._panel(stage) + unit * TILE_WORDS]),
            )
        )

    def _row(self, tile: Expr, half: int) -> Expr:
        """The first of 16 rows of x; those beyond the last are others again."""
        start = self.first_row + tile * ROWS + half * LINE_WORDS
        return T.max(T.min(start, self.m - LINE_WORDS), 0)

    def _fetch_x(self, stage: Expr, tile: Expr, step: Expr) -> None:
        """Fetch x of the next block of K; every panel's turn fetches a share of the rows."""
        if self.blocks.count == 1:
            return
        share = -(-ROWS // self.blocks.task_panels)
        block = stage // self.panels
        group = (block + 1) % self.blocks.count * self.blocks.depth + step
        for i in range(share):
            row = self.first_row + tile * ROWS + stage % self.panels * share + i
            at = T.min(row, self.m - 1) * self.row_words + group * LINE_WORDS
            T.evaluate(_prefetch(T.address_of(self.x[at]), write=0, level=2))

    def _fetch_out(self, stage: Expr, tile: Expr, step: Expr) -> None:
        lines = 2 * ROWS
        share = -(-lines // self.blocks.depth)
        for i in range(share):
            line = T.min(step * share + i, lines - 1)
            row = T.min(self.first_row + tile * ROWS + line // 2, self.m - 1)
            at = row * self.matrix.n + self._column(stage, line % 2)
            T.evaluate(_prefetch(T.address_of(self.out[at]), write=1, level=3))

    def _multiply(self, stage: Expr, tile: Expr) -> None:
        """32 rows of x times a panel, while part of the next one is filled."""
        steps = self._steps(stage)
        units = self._units(stage + 1)
        block = stage // self.panels
        sums = (stage % self.panels * (TASK_ROWS // ROWS) + tile) * 4 * TILE_WORDS

        def due(step: Expr) -> Expr:
            return (tile * steps + step) * units // (self.tiles * steps)

        def row(half: int) -> Expr:
            return self._row(tile, half)

        def kept(i: int) -> Expr:
            return T.address_of(self.sums[sums + i * TILE_WORDS])

        line = T.int64(64)
        with T.If(block == 0):
            with T.Then():
                for i in range(4):
                    T.evaluate(_tile("tilezero", _number(i)))
            with T.Else():
                for i in range(4):
                    T.evaluate(_tile("tileloadd64", _number(i), kept(i), line))
        with T.serial(steps) as step:
            x = [
                T.address_of(
                    self.x[
                        row(half) * self.row_words + (block * self.blocks.depth + step) * LINE_WORDS
                    ]
                )
                for half in range(2)
            ]
            w = [
                T.address_of(self.panel[self._panel(stage) + (step * 2 + half) * TILE_WORDS])
                for half in range(2)
            ]
            x_stride = T.int64(self.row_words * 4)
            T.evaluate(_tile("tileloadd64", _number(6), w[0], line))
            T.evaluate(_tile("tileloaddt164", _number(4), x[0], x_stride))
            T.evaluate(_tile("tdpbf16ps", _number(0), _number(4), _number(6)))
            T.evaluate(_tile("tileloadd64", _number(7), w[1], line))
            T.evaluate(_tile("tdpbf16ps", _number(1), _number(4), _number(7)))
            T.evaluate(_tile("tileloaddt164", _number(5), x[1], x_stride))
            T.evaluate(_tile("tdpbf16ps", _number(2), _number(5), _number(6)))
            T.evaluate(_tile("tdpbf16ps", _number(3), _number(5), _number(7)))
            self._fetch_x(stage, tile, step)
            with T.If(block == self.blocks.count - 1):
                with T.Then():
                    self._fetch_out(stage, tile, step)
            with T.serial(due(step), due(step + 1)) as unit:
                self._fill(stage + 1, unit)
        with T.If(block == self.blocks.count - 1):
            with T.Then():
                for i in range(4):
                    at = row(i // 2) * self.matrix.n + self._column(stage, i % 2)
                    stride = T.int64(self.matrix.n * 4)
                    T.evaluate(
                        _tile("tilestored64", _number(i), T.address_of(self.out[at]), stride)
                    )
            with T.Else():
                for i in range(4):
                    T.evaluate(_tile("tilestored64", _number(i), kept(i), line))


# Tiles 0 .. 3 are sums, 4 and 5 rows of x, 6 and 7 the panel.
_B_TILES = (6, 7)
# Floats of a row of scales on their way: a vector may start 16 before the block's first group.
_STAGED = 3 * LINE_WORDS


def _tile(name: str, *operands: Expr) -> Expr:
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
    return T.call_llvm_intrin("void", intrinsic, *operands)


def _prefetch(address: Expr, write: int, level: int) -> Expr:
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.prefetch")
    return T.call_llvm_intrin(
        "void", intrinsic, address, T.int32(write), T.int32(level), T.int32(1)
    )


def _number(tile: int) -> Expr:
    return tirx.const(tile, "int8")


def _ramp(at: Expr | int, lanes: int) -> Expr | int:
    return T.ramp(at, 1, lanes) if lanes > 1 else at


def _bfloat16(value: Expr, lanes: int) -> Expr:
    """The bits of float32 lanes rounded to the nearest bfloat16, ties to even, as uint16."""

    def wide(number: int) -> Expr:
        return T.broadcast(T.uint32(number), lanes) if lanes > 1 else T.uint32(number)

    bits = T.reinterpret(vector("uint32", lanes), value)
    odd = T.bitwise_and(T.shift_right(bits, wide(16)), wide(1))
    return T.cast(T.shift_right(bits + odd + wide(0x7FFF), wide(16)), vector("uint16", lanes))
