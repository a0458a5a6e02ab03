"""x @ W.T for many rows of x: as fast as the CPU can multiply and add.

A task takes the outputs of two vectors of rows of W. It widens them once, a block of K at a time,
into a panel of float32 that stays in the cache, with outputs as lanes, and multiplies the panel
with tiles of a few rows of x, whose sums stay in registers. So a weight is read once per step
whatever the batch, and widening is paid once per step, too.
"""

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import scratch
from relaxlm.compiler.kernels.cpu_gemv import Emitter
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import (
    VectorUnit,
    multiply_add,
    splat,
    to_float32,
    vector,
)

# Elements of K in a panel: 64 KiB with two vectors of 16 lanes.
PANEL = 256


def gemm(matrix: StoredMatrix, out_dtype: str, unit: VectorUnit) -> Emitter:
    """What emits the product for any m."""
    n, k, per_word, quant = matrix.n, matrix.k, matrix.per_word, matrix.quant
    lanes = next(width for width in (16, 8, 4, 2, 1) if width <= min(n, unit.lanes))
    halves = 2 if n >= 2 * lanes else 1
    wide = halves * lanes
    tile = 8 if unit.registers == 32 else 6
    unit_words = matrix.group_words  # a panel is filled in these steps
    unit_columns = unit_words * per_word
    depth = -(-min(PANEL, k) // unit_columns) * unit_columns
    blocks = -(-k // depth)
    units = depth // unit_columns
    all_units = -(-k // unit_columns)

    def first(task, half):
        return T.min(task * wide, n - wide) + half * lanes

    def across(at):
        return T.ramp(at, 1, lanes) if lanes > 1 else at

    def load(buffer, at, dtype, stride=1) -> Expr:
        return buffer[T.ramp(at, stride, lanes) if lanes > 1 else at]

    def word(words, task, half, j) -> Expr:
        """Word j of every row of W of a vector of them."""
        if matrix.columns:
            return load(words, j * n + first(task, half), matrix.word_dtype)
        at = first(task, half) * matrix.words + j
        return load(words, at, matrix.word_dtype, matrix.words)

    def scale(scales, task, half, g) -> Expr:
        if matrix.columns:
            values = load(scales, g * n + first(task, half), matrix.dtype)
        else:
            at = first(task, half) * matrix.groups + g
            values = load(scales, at, matrix.dtype, matrix.groups)
        return to_float32(values, lanes)

    def weight(words, factor, i) -> Expr:
        """Code i of each word as a float32."""
        if quant is None:
            return to_float32(words, lanes)
        shift = T.cast(i * quant.bits, "uint32")
        mask = T.uint32((1 << quant.bits) - 1)
        if lanes > 1:
            shift, mask = T.broadcast(shift, lanes), T.broadcast(mask, lanes)
        code = T.cast(T.bitwise_and(T.shift_right(words, shift), mask), vector("int32", lanes))
        centred = T.cast(code, vector("float32", lanes)) - splat(float(quant.max_int), lanes)
        return centred * factor

    def row_of(m, number, r):
        # Rows beyond the last repeat it, and write the same result.
        return T.min(number * tile + r, m - 1)

    def fill(task, block, words, scales, panel, factor) -> None:
        with T.serial(T.min(units, all_units - block * units)) as u:
            for half in range(halves):
                if quant is not None:
                    put(factor, 0, scale(scales, task, half, block * units + u))
                with T.serial(unit_words) as j:
                    values = word(words, task, half, (block * units + u) * unit_words + j)
                    for i in range(per_word):
                        at = (((u * unit_words + j) * per_word + i) * halves + half) * lanes
                        put(panel, at, weight(values, load(factor, 0, "float32"), i))

    def multiply(m, x, out, task, block, number, panel, sums, carried) -> None:
        """One tile of rows of x; `sums` are as many buffers as there are halves."""

        def place(half, r):
            return ((number * halves + half) * tile + r) * lanes

        for half, total in enumerate(sums):
            for r in range(tile):
                before = load(carried, place(half, r), "float32")
                put(total, r * lanes, T.Select(block == 0, splat(0.0, lanes), before))
        with T.serial(T.min(depth, k - block * depth)) as i:
            for r in range(tile):
                factor = splat(x[row_of(m, number, r), block * depth + i], lanes)
                for half, total in enumerate(sums):
                    weights = load(panel, i * wide + half * lanes, "float32")
                    product = multiply_add(factor, weights, load(total, r * lanes, "float32"))
                    put(total, r * lanes, product)
        with T.If(block < blocks - 1):
            with T.Then():
                for half, total in enumerate(sums):
                    for r in range(tile):
                        put(carried, place(half, r), load(total, r * lanes, "float32"))
            with T.Else():
                for half, total in enumerate(sums):
                    for r in range(tile):
                        value = T.cast(load(total, r * lanes, "float32"), vector(out_dtype, lanes))
                        place_out = [row_of(m, number, r), across(first(task, half))]
                        T.buffer_store(out, value, place_out)

    def put(buffer, at, value) -> None:
        T.buffer_store(buffer, value, [across(at)])

    def run(
        m: Expr, x: tirx.Buffer, words: tirx.Buffer, scales: tirx.Buffer, out: tirx.Buffer
    ) -> None:
        with T.parallel((n + wide - 1) // wide) as task:
            panel = scratch(depth * wide, "float32")
            # Sums between blocks of K. Not in `out`: the last tasks may overlap.
            carried = scratch(
                (m + tile - 1) // tile * (tile * wide if blocks > 1 else 0), "float32"
            )
            factor = scratch(lanes, "float32")
            left, right = scratch(tile * lanes, "float32"), scratch(tile * lanes, "float32")
            with T.serial(blocks) as block:
                fill(task, block, words, scales, panel, factor)
                with T.serial((m + tile - 1) // tile) as number:
                    multiply(m, x, out, task, block, number, panel, [left, right][:halves], carried)

    return run
