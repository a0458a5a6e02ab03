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


def gemv(matrix: StoredMatrix, out_dtype: str, unit: VectorUnit, rows: int) -> Emitter:
    """What emits the product for 1 <= m <= `rows`; see `Emitter`.

    The kernel needs `reduce_sum_ir` for `vector_words` lanes.
    """
    n, k, per_word, quant = matrix.n, matrix.k, matrix.per_word, matrix.quant
    width = vector_words(matrix, unit)
    steps = -(-matrix.words // width)
    block = min(n, 1 if rows == 1 else BLOCK)
    group = matrix.group_words
    line = LINE // matrix.word_bytes

    def start(step):
        # The last vector ends with the row; it may overlap the one before.
        return T.min(step * width, matrix.words - width) if matrix.words % width else step * width

    def weight_row(task, r):
        return T.min(task * block, n - block) + r

    def place(row, step, i):
        return ((row * steps + step) * per_word + i) * width

    def element(x, m, row, step, i, lane) -> Expr:
        """The element of x that meets code i in a lane, or 0 where that weight counts elsewhere."""
        at = (start(step) + lane) * per_word + i
        counts = T.And(start(step) + lane >= step * width, at < k)
        return T.if_then_else(counts, x[T.min(row, m - 1), T.min(at, k - 1)], T.float32(0))

    def lanes(buffer, at) -> Expr:
        return buffer.vload([at], vector("float32", width))

    def scale(scales, task, r, step) -> Expr:
        at = weight_row(task, r) * matrix.groups + start(step) // group
        if width <= group:
            return splat(T.cast(scales[at], "float32"), width)
        count = width // group
        values = to_float32(scales.vload([at], vector(matrix.dtype, count)), count)
        return spread(values, count, group)

    def code(words, task, r, step, i) -> Expr:
        at = weight_row(task, r) * matrix.words + start(step)
        return matrix.codes(words.vload([at], vector(matrix.word_dtype, width)), i, width)

    def ahead(task, step, i):
        return (task * steps + step) * block * width + AHEAD // matrix.word_bytes + i * line

    def put(buffer, at, value) -> None:
        T.buffer_store(buffer, value, [T.ramp(at, 1, width)])

    def reorder(m, x, ordered) -> None:
        with T.serial(rows) as row, T.serial(steps) as step, T.serial(width) as lane:
            for i in range(per_word):
                value = element(x, m, row, step, i, lane) * matrix.unshift(i)
                T.buffer_store(ordered, value, [place(row, step, i) + lane])

    def add_one(words, ordered, task, step, total, factor) -> None:
        """One row of x: the sum of a step is scaled, a product for each code of a word."""
        product = code(words, task, 0, step, 0) * lanes(ordered, place(0, step, 0))
        for i in range(1, per_word):
            other = lanes(ordered, place(0, step, i))
            product = multiply_add(code(words, task, 0, step, i), other, product)
        put(total, 0, multiply_add(product, lanes(factor, 0), lanes(total, 0)))

    def add_rows(words, ordered, task, step, sums, factors, parts) -> None:
        """Some rows of x: weights are scaled, which they share; x is read once for a block."""
        for i in range(per_word):
            for r, (part, factor) in enumerate(zip(parts, factors, strict=True)):
                weight = code(words, task, r, step, i)
                put(part, 0, weight if quant is None else weight * lanes(factor, 0))
            for row in range(rows):
                other = lanes(ordered, place(row, step, i))
                for part, total in zip(parts, sums, strict=True):
                    added = multiply_add(lanes(part, 0), other, lanes(total, row * width))
                    put(total, row * width, added)

    def store(m, task, r, sums, out) -> None:
        for row in range(rows):
            total = T.cast(reduce_sum(lanes(sums, row * width), width), out_dtype)
            T.buffer_store(out, total, [T.min(row, m - 1), weight_row(task, r)])

    def run(
        m: Expr, x: tirx.Buffer, words: tirx.Buffer, scales: tirx.Buffer, out: tirx.Buffer
    ) -> None:
        ordered = scratch(rows * steps * per_word * width, "float32")
        reorder(m, x, ordered)
        with T.parallel((n + block - 1) // block) as task:
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
                if rows == 1 and quant is not None:
                    add_one(words, ordered, task, step, sums[0], factors[0])
                else:
                    add_rows(words, ordered, task, step, sums, factors, parts)
            for r, total in enumerate(sums):
                store(m, task, r, total, out)

    return run
