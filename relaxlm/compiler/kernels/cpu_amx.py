"""x @ W.T for many rows of x on CPUs with AMX: tiles of bfloat16, sums in float32.

The form "bf16" of x [m, K] in `packed [m, row_words(K)] int32`: elements rounded to bfloat16, two
to a word, the one with the even number below, and zeros up to a multiple of 32. What a tile of 16
rows by 32 elements holds lies together, [rows / 16][K / 32][16 rows][16 words], so that tiles are
read as one stream; the last rows are a tile of fewer rows.

A task takes the outputs of some rows of x by some rows of W. W is dequantized into panels of 32 of
its rows by a block of K, which all of the task's rows of x pass over; the panel being read stays
in the first-level cache, x streams from the second. Tile instructions leave the vector units idle,
so between them the next panel is filled, and the sums of the tiles before are added up and stored.

Of a gated matrix, the first half of whose rows gates the second, a panel holds 16 rows of each
half, so that what a tile's row stores is act(gate) * up of 16 columns, rounded for the next
matmul: a quarter of the bytes that both would take, and they need not come back from memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels import tuning
from relaxlm.compiler.kernels.activations import ACTIVATIONS
from relaxlm.compiler.kernels.builder import emit, flat, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_amx_fill import (
    FILL,
    GATHER,
    GATHERED,
    GROUP_WORDS,
    TRANSPOSE,
    fill_ir,
    gather_ir,
    transpose_ir,
)
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
# Panels at most that a task takes. A block of K of its rows of x (`Tuning.task_rows`) is read once
# for all panels, and that and the task's sums should fit into the second-level cache.
TASK_PANELS = 8

Value = Callable[[Expr | int, int], Expr]


def row_words(k: int) -> int:
    """The int32 words of a packed row of K elements."""
    return -(-k // DEPTH) * LINE_WORDS


def emit_pack(k: int, value: Value, packed: tirx.Buffer, row: Expr | int, m: Expr | int) -> None:
    """Emit the statements that write one row.

    Args:
        value: (i, lanes) -> float32 elements i .. i + lanes of the row, lanes 16 or fewer, i a
            multiple of lanes, i + lanes <= K. Called once for each element.
        packed: [m, at least row_words(K)] int32.
        m: the number of rows.
    """
    width = packed.shape[1]
    halves = T.decl_buffer((m * width * 2,), "uint16", data=packed.data)

    def place(i: Expr | int) -> Expr:
        return _place(row, i, m, width)

    def store(i: Expr | int, lanes: int) -> None:
        T.buffer_store(halves, _bfloat16(value(i, lanes), lanes), [_ramp(place(i), lanes)])

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
            T.buffer_store(halves, T.uint16(0), [place(k + i)])


def _place(row: Expr, i: Expr | int, m: Expr, width: int) -> Expr:
    """Where element i of a row lies, in halves of words."""
    tile = _start(row, width) + i // DEPTH * _rows(row, m) * LINE_WORDS
    return tile * 2 + row % LINE_WORDS * DEPTH + i % DEPTH


def _start(row: Expr, width: int) -> Expr:
    """The first word of the tiles that a row is in."""
    return row // LINE_WORDS * (LINE_WORDS * width)


def _rows(row: Expr, m: Expr) -> Expr:
    """Rows of the tiles that a row is in."""
    return T.min(m - row // LINE_WORDS * LINE_WORDS, LINE_WORDS)


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
    return [gather_ir(), fill_ir(), transpose_ir()]


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


def supports_gated(matrix: StoredMatrix, isa: Isa) -> bool:
    """Whether act(x @ W1.T) * (x @ W2.T) can be computed here for W = [W1, W2]."""
    return supports(matrix, isa) and matrix.n % (2 * DEPTH) == 0


def emit_matmul(
    matrix: StoredMatrix,
    isa: Isa,
    m: Expr,
    packed: tirx.Buffer,
    weight: tirx.Buffer,
    scale: tirx.Buffer | None,
    out: tirx.Buffer,
    gate: str | None = None,
) -> None:
    """Emit out = x @ W.T.

    Args:
        m: rows of x, int64, at least 1.
        packed: [m, at least row_words(K)] int32, of the form "bf16".
        weight, scale: the stored matrix.
        out: [m, N] float32; with `gate`, [m, at least row_words(N / 2)] int32, of the form "bf16".
        gate: the activation by which the first half of the outputs gates the second.
    """
    assert (supports_gated if gate else supports)(matrix, isa) and scale is not None, matrix
    blocks = Blocks(matrix.n, matrix.groups)
    task_rows = tuning.current().task_rows
    with T.parallel((m + task_rows - 1) // task_rows * blocks.tasks) as task:
        _Task(matrix, blocks, m, packed, flat(weight), flat(scale), out, task, gate).emit()


class _Task:
    """The statements of one task.

    It goes through stages, one for each of its panels in each block of K, and in a stage through
    tiles of 32 rows of x.
    """

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
        gate: str | None,
    ) -> None:
        self.matrix, self.blocks, self.m, self.gate = matrix, blocks, m, gate
        self.width = packed.shape[1]
        self.x = T.decl_buffer((m * self.width,), "int32", data=packed.data)
        self.out_width = out.shape[1]
        stored = 2 * self.out_width if gate else self.out_width
        self.out = T.decl_buffer((m * stored,), "uint16" if gate else "float32", data=out.data)
        self.words, self.scales = words, scales
        self.task_rows = tuning.current().task_rows
        self.first_row = task // blocks.tasks * self.task_rows
        self.first_panel = task % blocks.tasks * blocks.task_panels
        self.panels = T.min(blocks.task_panels, blocks.panels - self.first_panel)
        self.tiles = (T.min(m - self.first_row, self.task_rows) + ROWS - 1) // ROWS
        self.stages = self.panels * blocks.count
        # Two panels, of which one is read while the other is filled, and gathered words.
        self.panel_words = blocks.depth * 2 * TILE_WORDS
        self.panel = scratch(2 * self.panel_words + GATHERED, "int32")
        self.factors = scratch(BLOCK * PANEL, "float32")
        self.staged = scratch(LINE_WORDS * _STAGED, "float32")
        sums = self.task_rows // ROWS * blocks.task_panels * 4 * TILE_WORDS
        self.sums = scratch(sums if blocks.count > 1 else 1, "float32")
        self.last = scratch(4 * TILE_WORDS, "float32")
        self.config = scratch(64, "uint8")
        # Parts of the next panel that were filled, and how much of the next part is due.
        self.filled, self.credit = scratch(1, "int32"), scratch(1, "int32")

    def emit(self) -> None:
        start = T.int64(0)
        self._prepare(start)
        with T.serial(self._parts(start)) as part:
            self._fill(start, T.cast(part, "int32"))
        with T.serial(64) as i:
            T.buffer_store(self.config, T.uint8(0), [i])
        T.buffer_store(self.config, T.uint8(1), [0])
        for tile in range(8):
            T.buffer_store(self.config, T.uint8(64), [16 + 2 * tile])
        self._configure(LINE_WORDS, LINE_WORDS)
        with T.serial(self.stages) as stage:
            with T.If(stage + 1 < self.stages):
                with T.Then():
                    self._prepare(stage + 1)
            T.buffer_store(self.filled, T.int32(0), [0])
            T.buffer_store(self.credit, T.int32(0), [0])
            with T.serial(self.tiles) as tile:
                self._multiply(stage, tile)
        with T.serial(ROWS) as row:
            self._flush(self.stages - 1, self.tiles - 1, row)
        T.evaluate(_tile("tilerelease"))

    def _configure(self, first: Expr | int, second: Expr | int) -> None:
        """Tiles of 64 bytes a row; rows of the two tiles of x and of their sums."""
        rows = (first, first, second, second, first, second, LINE_WORDS, LINE_WORDS)
        for tile, count in enumerate(rows):
            T.buffer_store(self.config, T.cast(count, "uint8"), [48 + tile])
        T.evaluate(_tile("ldtilecfg", T.address_of(self.config[0])))

    # Where a stage is: panel number `stage % panels` of the task, block `stage // panels` of K.

    def _first_group(self, stage: Expr) -> Expr:
        return stage // self.panels * self.blocks.depth

    def _steps(self, stage: Expr) -> Expr:
        return T.min(self.blocks.depth, self.blocks.groups - self._first_group(stage))

    def _parts(self, stage: Expr) -> Expr:
        """Quarters of tiles of a stage's panel; none after the last stage."""
        parts = 2 * GROUP_WORDS * self._steps(stage)
        return T.if_then_else(stage < self.stages, parts, T.int64(0))

    def _column(self, stage: Expr, half: Expr | int) -> Expr:
        """The first of 16 rows of W; those beyond the last are others again."""
        panel = self.first_panel + stage % self.panels
        if self.gate:
            return panel * LINE_WORDS + half * (self.matrix.n // 2)
        return T.min(panel * PANEL + half * LINE_WORDS, self.matrix.n - LINE_WORDS)

    def _panel(self, stage: Expr) -> Expr:
        return stage % 2 * self.panel_words

    def _row(self, tile: Expr) -> Expr:
        return self.first_row + tile * ROWS

    def _sums(self, stage: Expr, tile: Expr) -> Expr:
        return (stage % self.panels * (self.task_rows // ROWS) + tile) * 4 * TILE_WORDS

    def _prepare(self, stage: Expr) -> None:
        """Scales of a stage's panel, as float32 [group, row of W]; the next panel's are fetched."""
        groups = self.blocks.groups
        wide = max(w for w in (1, 2, 4, 8, 16) if w <= groups)
        first = self._first_group(stage)
        for half in range(2):
            with T.serial(LINE_WORDS) as row:
                later = (self._column(stage + 1, half) + row) * groups
                _prefetch(self.scales, later + self._first_group(stage + 1))
                for chunk in range(-(-self.blocks.depth // wide)):
                    # Vectors beyond the row's end are moved back, over what is there already.
                    group = T.min(first + chunk * wide, groups - wide)
                    at = (self._column(stage, half) + row) * groups + group
                    values = self.scales.vload([at], vector(self.matrix.dtype, wide))
                    place = row * _STAGED + LINE_WORDS + group - first
                    T.buffer_store(self.staged, to_float32(values, wide), [_ramp(place, wide)])
            _call(
                TRANSPOSE,
                T.address_of(self.staged[LINE_WORDS]),
                T.int64(_STAGED * 4),
                T.address_of(self.factors[half * LINE_WORDS]),
                T.int64(PANEL * 4),
            )

    def _fill(self, stage: Expr, part: Expr) -> None:
        """Fill a quarter of a tile of a stage's panel, and fetch words of the next one."""
        row_words = self.matrix.words
        unit, word = part // GROUP_WORDS, part % GROUP_WORDS
        step, half = unit // 2, unit % 2
        with T.If(word == 0):
            with T.Then():
                group = self._first_group(stage) + step
                at = self._column(stage, half) * row_words + group * GROUP_WORDS
                _call(
                    GATHER,
                    T.address_of(self.words[at]),
                    T.int64(row_words * 4),
                    T.address_of(self.panel[2 * self.panel_words]),
                )
        row = self._column(stage + 1, half) + step % _LINE_GROUPS * GROUP_WORDS + word
        line = self._first_group(stage + 1) // _LINE_GROUPS + step // _LINE_GROUPS
        _prefetch(self.words, row * row_words + line * LINE_WORDS)
        _call(
            FILL,
            T.address_of(self.panel[2 * self.panel_words + word * (GATHERED // GROUP_WORDS)]),
            T.address_of(self.factors[step * PANEL + half * LINE_WORDS]),
            T.address_of(self.panel[self._panel(stage) + part * (TILE_WORDS // GROUP_WORDS)]),
        )

    def _fill_due(self, stage: Expr, tile_steps: Expr) -> None:
        self._fill(stage, self.filled[0])
        T.buffer_store(self.filled, self.filled[0] + 1, [0])
        T.buffer_store(self.credit, self.credit[0] - T.cast(tile_steps, "int32"), [0])

    def _multiply(self, stage: Expr, tile: Expr) -> None:
        """32 rows of x times a panel, while part of the next one is filled."""
        first = self._first_group(stage)
        steps = self._steps(stage)
        tile_steps = self.tiles * steps
        rows = self.m - self._row(tile)
        line = T.int64(LINE_WORDS * 4)

        def configure(partly: bool) -> None:
            with T.If(rows < ROWS):
                with T.Then():
                    if partly:
                        first = T.min(rows, LINE_WORDS)
                        self._configure(first, T.max(rows - LINE_WORDS, 1))
                    else:
                        self._configure(LINE_WORDS, LINE_WORDS)

        def x(half: int, step: Expr) -> Expr:
            # Without a second half, the first is multiplied again.
            row = T.min(self._row(tile) + half * LINE_WORDS, self.m - 1)
            at = _start(row, self.width) + (first + step) * _rows(row, self.m) * LINE_WORDS
            return T.address_of(self.x[at])

        def w(half: int, step: Expr) -> Expr:
            return T.address_of(self.panel[self._panel(stage) + (step * 2 + half) * TILE_WORDS])

        configure(True)
        for i in range(4):
            T.evaluate(_tile("tilezero", _number(i)))
        with T.serial(steps) as step:
            credit = self.credit[0] + T.cast(self._parts(stage + 1), "int32")
            T.buffer_store(self.credit, credit, [0])
            T.evaluate(_tile("tileloadd64", _number(6), w(0, step), line))
            T.evaluate(_tile("tileloaddt164", _number(4), x(0, step), line))
            T.evaluate(_tile("tdpbf16ps", _number(0), _number(4), _number(6)))
            T.evaluate(_tile("tileloadd64", _number(7), w(1, step), line))
            T.evaluate(_tile("tdpbf16ps", _number(1), _number(4), _number(7)))
            with T.If(self.credit[0] >= T.cast(tile_steps, "int32")):
                with T.Then():
                    self._fill_due(stage + 1, tile_steps)
            T.evaluate(_tile("tileloaddt164", _number(5), x(1, step), line))
            T.evaluate(_tile("tdpbf16ps", _number(2), _number(5), _number(6)))
            T.evaluate(_tile("tdpbf16ps", _number(3), _number(5), _number(7)))
            share = -(-ROWS // self.blocks.depth)
            before = T.if_then_else(tile == 0, stage - 1, stage)
            tile_before = T.if_then_else(tile == 0, self.tiles, tile) - 1
            for i in range(share):
                self._flush(before, tile_before, step * share + i)
            with T.While(self.credit[0] >= T.cast(tile_steps, "int32")):
                self._fill_due(stage + 1, tile_steps)
        with T.serial(steps * share, ROWS) as row:
            self._flush(before, tile_before, row)
        for i in range(4):
            at = T.address_of(self.last[i * TILE_WORDS])
            T.evaluate(_tile("tilestored64", _number(i), at, line))
        configure(False)

    def _flush(self, stage: Expr, tile: Expr, row: Expr) -> None:
        """Add a row of the last tiles of sums to those before; the last block's are the outputs."""
        block = stage // self.panels
        inside = T.And(stage >= 0, T.And(row < ROWS, self._row(tile) + row < self.m))
        with T.If(inside):
            with T.Then():
                places = [
                    (row // LINE_WORDS * 2 + half) * TILE_WORDS + row % LINE_WORDS * LINE_WORDS
                    for half in range(2)
                ]
                kept = [self._sums(stage, tile) + place for place in places]
                new = [self.last.vload([place], "float32x16") for place in places]
                both = new
                if self.blocks.count > 1:
                    both = [
                        one + self.sums.vload([place], "float32x16")
                        for one, place in zip(new, kept, strict=True)
                    ]
                with T.If(block == self.blocks.count - 1):
                    with T.Then():
                        self._store(stage, self._row(tile) + row, both)
                    if self.blocks.count > 1:
                        with T.Else():
                            for half in range(2):
                                first = T.broadcast(block == 0, LINE_WORDS)
                                total = T.Select(first, new[half], both[half])
                                T.buffer_store(self.sums, total, [_ramp(kept[half], LINE_WORDS)])

    def _store(self, stage: Expr, row: Expr, sums: list[Expr]) -> None:
        """Write a row of outputs of both halves of a panel."""
        if self.gate:
            activated = ACTIVATIONS[self.gate](sums[0], LINE_WORDS)
            value = _bfloat16(activated * sums[1], LINE_WORDS)
            at = _place(row, self._column(stage, 0), self.m, self.out_width)
            T.buffer_store(self.out, value, [_ramp(at, LINE_WORDS)])
            return
        for half in range(2):
            at = row * self.matrix.n + self._column(stage, half)
            T.buffer_store(self.out, sums[half], [_ramp(at, LINE_WORDS)])


# Groups in a line of words.
_LINE_GROUPS = 4
# Floats of a row of scales on their way: a vector may start 16 before the block's first group.
_STAGED = 3 * LINE_WORDS


def _tile(name: str, *operands: Expr) -> Expr:
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
    return T.call_llvm_intrin("void", intrinsic, *operands)


def _call(name: str, *operands: Expr) -> None:
    T.evaluate(T.call_extern("int32", name, *operands))


def _prefetch(buffer: tirx.Buffer, at: Expr) -> None:
    """Fetch a line into every cache; an address beyond the tensor does no harm."""
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.prefetch")
    operands = (T.address_of(buffer[at]), T.int32(0), T.int32(3), T.int32(1))
    T.evaluate(T.call_llvm_intrin("void", intrinsic, *operands))


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
