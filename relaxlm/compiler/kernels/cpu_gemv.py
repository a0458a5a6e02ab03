"""x @ W.T for a few rows of x: as fast as W can be read from memory.

Lanes run along a row of W as it is stored: a vector of 4-bit words holds every eighth weight in its
lowest codes, the next ones in the codes above, and so on; x is brought into that order once. A step
of the inner loop takes one vector of words from each row of a block, and fetches memory ahead in
the order of addresses, so that the rows of a block are one stream to the memory, not several.
"""

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import scratch
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import (
    VectorUnit,
    multiply_add,
    reduce_sum,
    splat,
    spread,
    to_float32,
    vector,
)

LINE = 64
# How far ahead of the arithmetic memory is fetched, in bytes.
AHEAD = 4096
# Rows of W that share what is read of x, where there is more than one row of x.
BLOCK = 2

# (m, x [m, k], words, scales, out [m, n]): emits out = x @ W.T. `words` and `scales` are views with
# one dimension; `scales` is not read if there are none.
Emitter = Callable[[Expr, tirx.Buffer, tirx.Buffer, tirx.Buffer, tirx.Buffer], None]


def fetch(address: Expr) -> None:
    """Emit a request for a cache line; an address beyond the tensor does no harm.

    Into the second-level cache: the first has too few places for lines on their way to it.
    """
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.prefetch")
    arguments = (address, T.int32(0), T.int32(2), T.int32(1))
    T.evaluate(T.call_llvm_intrin("void", intrinsic, *arguments))


def vector_words(matrix: StoredMatrix, unit: VectorUnit) -> int:
    """Words of a row that one vector holds."""
    return next(width for width in (16, 8, 4, 2, 1) if width <= min(matrix.words, unit.lanes))


def gemv(
    matrix: StoredMatrix,
    out_dtype: str,
    unit: VectorUnit,
    rows: int,
    alike: bool = False,
    together: int = 0,
) -> Emitter:
    """What emits the product for 1 <= m <= `rows`; see `Emitter`.

    The kernel needs `reduce_sum_ir` for `vector_words` lanes.

    Args:
        alike: whether a row's sums are made in the same way whatever `rows` is.
        together: if not 0, the product for any m, so many rows of x at a time, `rows` after `rows`.
    """
    n, k, per_word, quant = matrix.n, matrix.k, matrix.per_word, matrix.quant
    width = vector_words(matrix, unit)
    steps = -(-matrix.words // width)
    block = min(n, 1 if rows == 1 else BLOCK)
    # Scale what the codes of a step come to, not each of them.
    scale_last = quant is not None and (alike or rows == 1)
    group = matrix.group_words
    line = LINE // matrix.word_bytes

    def first_word(step):
        # The last vector ends with the row; it may overlap the one before.
        return T.min(step * width, matrix.words - width) if matrix.words % width else step * width

    def weight_row(task, r):
        return T.min(task * block, n - block) + r

    def place(row, step, i):
        return ((row * steps + step) * per_word + i) * width

    def element(x, row, step, i, lane) -> Expr:
        """The element of x that meets code i in a lane, or 0 where that weight counts elsewhere."""
        at = (first_word(step) + lane) * per_word + i
        counts = T.And(first_word(step) + lane >= step * width, at < k)
        return T.if_then_else(counts, x[row, T.min(at, k - 1)], T.float32(0))

    def lanes(buffer, at) -> Expr:
        return buffer.vload([at], vector("float32", width))

    def scale(scales, task, r, step) -> Expr:
        at = weight_row(task, r) * matrix.groups + first_word(step) // group
        if width <= group:
            return splat(T.cast(scales[at], "float32"), width)
        count = width // group
        values = to_float32(scales.vload([at], vector(matrix.dtype, count)), count)
        return spread(values, count, group)

    def code(words, task, r, step, i) -> Expr:
        at = weight_row(task, r) * matrix.words + first_word(step)
        return matrix.codes(words.vload([at], vector(matrix.word_dtype, width)), i, width)

    def ahead(task, step, i):
        return (task * steps + step) * block * width + AHEAD // matrix.word_bytes + i * line

    def put(buffer, at, value) -> None:
        T.buffer_store(buffer, value, [T.ramp(at, 1, width)])

    def reorder(x, source, ordered, row) -> None:
        with T.serial(steps) as step, T.serial(width) as lane:
            for i in range(per_word):
                value = element(x, source, step, i, lane) * matrix.unshift(i)
                T.buffer_store(ordered, value, [place(row, step, i) + lane])

    def add_scaled(words, ordered, task, step, first, sums, factors) -> None:
        """The sum of a step is scaled, a product for each code of a word."""
        for r, (total, factor) in enumerate(zip(sums, factors, strict=True)):
            for row in range(rows):
                product = code(words, task, r, step, 0) * lanes(
                    ordered, place(first + row, step, 0)
                )
                for i in range(1, per_word):
                    other = lanes(ordered, place(first + row, step, i))
                    product = multiply_add(code(words, task, r, step, i), other, product)
                before = lanes(total, row * width)
                put(total, row * width, multiply_add(product, lanes(factor, 0), before))

    def add_rows(words, ordered, task, step, first, sums, factors, parts) -> None:
        """Some rows of x: weights are scaled, which they share; x is read once for a block."""
        for i in range(per_word):
            for r, (part, factor) in enumerate(zip(parts, factors, strict=True)):
                weight = code(words, task, r, step, i)
                put(part, 0, weight if quant is None else weight * lanes(factor, 0))
            for row in range(rows):
                other = lanes(ordered, place(first + row, step, i))
                for part, total in zip(parts, sums, strict=True):
                    added = multiply_add(lanes(part, 0), other, lanes(total, row * width))
                    put(total, row * width, added)

    def store(task, r, sums, out, source) -> None:
        for row in range(rows):
            total = T.cast(reduce_sum(lanes(sums, row * width), width), out_dtype)
            T.buffer_store(out, total, [source(row), weight_row(task, r)])

    def multiply(words, scales, ordered, task, first, out, source) -> None:
        """Rows of W times `rows` rows of x from `first` on; source(row): which they are."""
        sums = [scratch(rows * width, "float32") for _ in range(block)]
        factors = [scratch(width, "float32") for _ in range(block)]
        parts = [scratch(width, "float32") for _ in range(block)]
        for total in sums:
            for row in range(rows):
                put(total, row * width, splat(0.0, width))
        with T.serial(steps) as step:
            for i in range((block * width + line - 1) // line):
                fetch(T.address_of(words[ahead(task, step, i)]))
            if quant is not None:
                for r, factor in enumerate(factors):
                    put(factor, 0, scale(scales, task, r, step))
            if scale_last:
                add_scaled(words, ordered, task, step, first, sums, factors)
            else:
                add_rows(words, ordered, task, step, first, sums, factors, parts)
        for r, total in enumerate(sums):
            store(task, r, total, out, source)

    def run(
        m: Expr, x: tirx.Buffer, words: tirx.Buffer, scales: tirx.Buffer, out: tirx.Buffer
    ) -> None:
        tasks = (n + block - 1) // block
        ordered = scratch(max(rows, together) * steps * per_word * width, "float32")
        if not together:

            def only(row: Expr | int) -> Expr:
                # Rows beyond the last repeat it, and write the same result.
                return T.min(row, m - 1)

            with T.serial(rows) as row:
                reorder(x, only(row), ordered, row)
            with T.parallel(tasks) as task:
                multiply(words, scales, ordered, task, 0, out, only)
            return
        with T.serial((m + together - 1) // together) as number:
            start = number * together
            tiles = (T.min(m - start, together) + rows - 1) // rows

            def one_of(row: Expr) -> Expr:
                return T.min(start + row, m - 1)

            with T.parallel(tiles * rows) as row:
                reorder(x, one_of(row), ordered, row)
            with T.parallel(tasks) as task, T.serial(tiles) as tile:
                first = tile * rows
                multiply(words, scales, ordered, task, first, out, lambda row: one_of(first + row))

    return run
