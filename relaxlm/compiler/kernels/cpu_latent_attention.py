"""Multi-head latent attention on CPUs (DeepSeek-AI 2024, arXiv:2405.04434).

The cache holds one vector per token and layer, whatever the number of heads: the latent, which all
heads read as key and as value, and behind it the rotated key [latent + rope]. Queries come with the
up-projection of the keys multiplied in, so each scores against those vectors directly.

A task is a block of query rows, (token, head) in this order, of one sequence. It goes through the
context in parts of `PART` tokens: a part is collected for itself and added to what the parts before
it gave. With few rows in the step, each part is a task of its own, and they are added at the end.
Parts have fixed places and an order, so what a row finds depends on nothing but its position.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import PAGE_SIZE, PageTensor
from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.vector import (
    LOG2E,
    VectorUnit,
    exp2,
    multiply_add,
    reduce_max,
    reduce_sum,
    reduce_sum_ir,
    splat,
    to_float32,
    vector,
    vector_unit,
)
from relaxlm.compiler.kernels.work_queue import FETCH_ADD_IR, WORKERS, fetch_add
from relaxlm.quantization.kv_cache import KVFormat

# Query rows of a task. Reading a token's vector into float32 costs about as much as one row.
ROWS = 32
# Tokens between two updates of the online softmax, two pages.
ROUND = 32
# Tokens of a part of the context.
PART = 512
# Parts are tasks of their own up to so many query rows in a step: more are tasks enough,
FEW_ROWS = 512
# and up to so many rows of parts, each with a latent in float32.
PART_ROWS = 40_000
# Vectors of a row, or tokens, of a block of sums in registers.
WIDE = 4
# Below any real score, but finite.
MASKED = -1e30


@dataclass(frozen=True)
class LatentShape:
    """What is fixed when a kernel is compiled: heads, features of the latent and of the rotated
    key, and the factor of scores before the softmax."""

    heads: int
    latent: int
    rope: int
    scale: float

    @property
    def width(self) -> int:
        """Values in the cache per token."""
        return self.latent + self.rope

    def lanes(self, unit: VectorUnit) -> int:
        """Float32 lanes of the vectors that both parts are made of."""
        return math.gcd(self.latent, self.rope, unit.lanes)


def page_tensors(latent: int, rope: int, format: KVFormat) -> tuple[PageTensor, ...]:
    """The tensors of one layer's cache."""
    return (PageTensor("latent", (PAGE_SIZE, latent + rope), format.dtype),)


def attend_workspace_bytes(shape: LatentShape, threads: int) -> int:
    """The most memory that a call of `attend_kernel` takes from TVM's pools, in bytes."""
    task = ROWS * (shape.width + 2 * shape.latent + ROUND + 4) + ROUND * shape.width
    return 4 * (threads * task + PART_ROWS * (shape.latent + 2))


def _get(buffer: tirx.Buffer, at, lanes: int) -> Expr:
    *outer, i = at if isinstance(at, list) else [at]
    return buffer.vload([*outer, i], vector(str(buffer.dtype), lanes))


def _put(buffer: tirx.Buffer, value: Expr, at, lanes: int) -> None:
    *outer, i = at if isinstance(at, list) else [at]
    T.buffer_store(buffer, value, [*outer, T.ramp(i, 1, lanes) if lanes > 1 else i])


def _sum(value: Expr, lanes: int) -> Expr:
    return reduce_sum(value, lanes) if lanes > 1 else value


def _block_rows(unit: VectorUnit) -> int:
    """Rows of a block of sums: with `WIDE` columns they take half of the registers."""
    return 4 if unit.registers >= 32 else 2


def _dots(
    rows: int,
    columns: int,
    size: int,
    lanes: int,
    row: Callable[[int, Expr], Expr],
    column: Callable[[int, Expr], Expr],
    store: Callable[[int, int, Expr], None],
) -> None:
    """The products of every row with every column, vectors of `size` features each.

    Args:
        row, column: (number, first feature) -> a float32 vector of features.
        store: takes (row, column, product).
    """
    sums = [[scratch(lanes, "float32") for _ in range(columns)] for _ in range(rows)]
    for r in range(rows):
        for c in range(columns):
            _put(sums[r][c], splat(0.0, lanes), 0, lanes)
    with T.serial(size // lanes) as i:
        for r in range(rows):
            for c in range(columns):
                product = multiply_add(
                    row(r, i * lanes), column(c, i * lanes), _get(sums[r][c], 0, lanes)
                )
                _put(sums[r][c], product, 0, lanes)
    for r in range(rows):
        for c in range(columns):
            store(r, c, _sum(_get(sums[r][c], 0, lanes), lanes))


@functools.cache  # every layer asks
def append_kernel(shape: LatentShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """(latent [n, latent], k_rope [n, rope], slots [n], pages) -> pages, written in place."""
    lanes = math.gcd(shape.latent, shape.rope, 16)

    def body() -> None:
        n, total = length("n"), length("pages")
        latent = tensor("latent", (n, shape.latent), dtype)
        k_rope = tensor("k_rope", (n, shape.rope), dtype)
        slots = tensor("slots", (n,), "int32")
        pages = tensor("pages", (total, PAGE_SIZE, shape.width), format.dtype)
        with T.parallel(n) as t:
            # 64 bits: a cache may hold more than 2**31 elements.
            place = [T.Cast("int64", slots[t] // PAGE_SIZE), slots[t] % PAGE_SIZE]
            for source, first in ((latent, 0), (k_rope, shape.latent)):
                with T.serial(source.shape[1] // lanes) as i:
                    value = T.cast(_get(source, [t, i * lanes], lanes), vector(format.dtype, lanes))
                    _put(pages, value, [*place, first + i * lanes], lanes)

    return emit(body)


@dataclass(frozen=True)
class _Found:
    """Per row: what weights are relative to, their sum, and the sum of the weighted latents."""

    best: tirx.Buffer
    total: tirx.Buffer
    sums: tirx.Buffer
    size: int
    lanes: int

    @staticmethod
    def declare(rows: Expr | int, size: int, lanes: int) -> "_Found":
        return _Found(
            scratch(rows, "float32"), scratch(rows, "float32"), scratch(rows * size, "float32"),
            size, lanes,
        )  # fmt: skip

    def clear(self, row: Expr) -> None:
        T.buffer_store(self.best, T.float32(MASKED), [row])
        T.buffer_store(self.total, T.float32(0), [row])
        with T.serial(self.size // self.lanes) as i:
            _put(self.sums, splat(0.0, self.lanes), row * self.size + i * self.lanes, self.lanes)

    def copy(self, row: Expr, source: "_Found", source_row: Expr) -> None:
        T.buffer_store(self.best, source.best[source_row], [row])
        T.buffer_store(self.total, source.total[source_row], [row])
        lanes = self.lanes
        with T.serial(self.size // lanes) as i:
            value = _get(source.sums, source_row * self.size + i * lanes, lanes)
            _put(self.sums, value, row * self.size + i * lanes, lanes)

    def absorb(self, row: Expr, part: "_Found", part_row: Expr) -> None:
        """Add what a later part gave for the same query."""
        lanes, factors = self.lanes, scratch(3, "float32")
        T.buffer_store(factors, T.max(self.best[row], part.best[part_row]), [2])
        T.buffer_store(factors, exp2(self.best[row] - factors[2], 1), [0])
        T.buffer_store(factors, exp2(part.best[part_row] - factors[2], 1), [1])
        T.buffer_store(self.best, factors[2], [row])
        added = part.total[part_row] * factors[1]
        T.buffer_store(self.total, multiply_add(self.total[row], factors[0], added), [row])
        with T.serial(self.size // lanes) as i:
            at = row * self.size + i * lanes
            added = _get(part.sums, part_row * self.size + i * lanes, lanes)
            added = added * splat(factors[1], lanes)
            kept = _get(self.sums, at, lanes)
            _put(self.sums, multiply_add(kept, splat(factors[0], lanes), added), at, lanes)


@functools.cache
def _attend(shape: LatentShape, format: KVFormat, dtype: str, unit: VectorUnit) -> tirx.PrimFunc:
    heads, width, lanes = shape.heads, shape.width, shape.lanes(unit)
    block = _block_rows(unit)
    columns = math.gcd(shape.latent // lanes, WIDE)

    def body() -> None:
        n, batch, table, pages_held = (length(name) for name in ("n", "batch", "table", "pages"))
        q_latent = tensor("q_latent", (n, heads, shape.latent), dtype)
        q_rope = tensor("q_rope", (n, heads, shape.rope), dtype)
        positions = tensor("positions", (n,), "int32")
        row_offsets = tensor("row_offsets", (batch + 1,), "int32")
        page_offsets = tensor("page_offsets", (batch + 1,), "int32")
        page_ids = tensor("page_ids", (table,), "int32")
        tensor("kv_lengths", (batch,), "int32")  # gives `batch` its value
        pages = tensor("latent_pages", (pages_held, PAGE_SIZE, width), format.dtype)
        out = tensor("out", (n, heads, shape.latent), dtype)

        def rows_of(sequence: Expr) -> Expr:
            return (row_offsets[sequence + 1] - row_offsets[sequence]) * heads

        def tokens_of(sequence: Expr) -> Expr:
            return positions[row_offsets[sequence + 1] - 1] + 1

        def parts_of(sequence: Expr) -> Expr:
            return (tokens_of(sequence) + PART - 1) // PART

        def blocks_of(sequence: Expr) -> Expr:
            return (rows_of(sequence) + ROWS - 1) // ROWS

        def store(found: _Found, row: Expr, token: Expr, head: Expr) -> None:
            factor = scratch(1, "float32")
            T.buffer_store(factor, T.float32(1) / found.total[row], [0])
            with T.serial(shape.latent // lanes) as i:
                value = _get(found.sums, row * shape.latent + i * lanes, lanes)
                value = T.cast(value * splat(factor[0], lanes), vector(dtype, lanes))
                _put(out, value, [token, head, i * lanes], lanes)

        # Enough for every sequence's rows of parts, from lengths known before the first loop.
        most = (n - batch + 1) * heads * (table * PAGE_SIZE // PART + batch)
        splits = T.And(n * heads <= FEW_ROWS, most <= PART_ROWS)
        left = _Found.declare(T.if_then_else(splits, most, 1), shape.latent, lanes)
        # Of the sequences before each: tasks, and rows of parts.
        before, slots = scratch(batch + 1, "int32"), scratch(batch + 1, "int32")
        next_task = scratch(16, "int32")
        T.buffer_store(next_task, 0, [0])
        T.buffer_store(before, 0, [0])
        T.buffer_store(slots, 0, [0])
        with T.serial(batch) as i:
            tasks = blocks_of(i) * T.if_then_else(splits, parts_of(i), 1)
            T.buffer_store(before, before[i] + tasks, [i + 1])
            T.buffer_store(slots, slots[i] + rows_of(i) * parts_of(i), [i + 1])

        with T.parallel(T.min(before[batch], WORKERS)):
            task = scratch(4, "int32")
            queries = scratch(ROWS * width, "float32")
            panel = scratch(ROUND * width, "float32")
            weights = scratch(ROWS * ROUND, "float32")
            sees = scratch(ROWS, "int32")
            whole, part = (_Found.declare(ROWS, shape.latent, lanes) for _ in range(2))

            def take() -> None:
                # The last tasks of a prompt first: they see most.
                T.buffer_store(task, before[batch] - 1 - fetch_add(next_task, 0), [0])

            def load_queries(sequence: Expr, first: Expr, count: Expr, padded: Expr) -> None:
                factor = splat(shape.scale * LOG2E, lanes)
                with T.serial(padded) as r:
                    index = first + T.min(r, count - 1)
                    token = row_offsets[sequence] + index // heads
                    T.buffer_store(sees, positions[token], [r])
                    for source, at in ((q_latent, 0), (q_rope, shape.latent)):
                        with T.serial(source.shape[2] // lanes) as i:
                            value = _get(source, [token, index % heads, i * lanes], lanes)
                            value = to_float32(value, lanes) * factor
                            _put(queries, value, r * width + at + i * lanes, lanes)

            def load_tokens(sequence: Expr, start: Expr, last: Expr) -> None:
                """A round of tokens; those after `last` are zeros, for what never was written may
                be NaN."""
                with T.serial(ROUND) as t, T.If(start + t <= last):
                    with T.Then():
                        page = page_ids[page_offsets[sequence] + (start + t) // PAGE_SIZE]
                        place = [T.Cast("int64", page), (start + t) % PAGE_SIZE]
                        with T.serial(width // lanes) as i:
                            value = to_float32(_get(pages, [*place, i * lanes], lanes), lanes)
                            _put(panel, value, t * width + i * lanes, lanes)
                    with T.Else(), T.serial(width // lanes) as i:
                        _put(panel, splat(0.0, lanes), t * width + i * lanes, lanes)

            def scores(padded: Expr) -> None:
                with T.serial(padded // block) as rb, T.serial(ROUND // WIDE) as tb:
                    _dots(
                        block,
                        WIDE,
                        width,
                        lanes,
                        lambda r, i: _get(queries, (rb * block + r) * width + i, lanes),
                        lambda t, i: _get(panel, (tb * WIDE + t) * width + i, lanes),
                        lambda r, t, value: T.buffer_store(
                            weights, value, [(rb * block + r) * ROUND + tb * WIDE + t]
                        ),
                    )

            def soften(r: Expr, start: Expr) -> None:
                """Scores of a row to weights, relative to the best one so far."""
                step = unit.lanes
                state, largest = scratch(2, "float32"), scratch(step, "float32")
                added = scratch(step, "float32")

                def is_seen(i: int) -> Expr:
                    token = T.ramp(start + i, 1, step)
                    return token <= T.broadcast(sees[r], step)

                def score(i: int) -> Expr:
                    return T.Select(
                        is_seen(i), _get(weights, r * ROUND + i, step), splat(MASKED, step)
                    )

                _put(largest, splat(MASKED, step), 0, step)
                for i in range(0, ROUND, step):
                    _put(largest, T.max(_get(largest, 0, step), score(i)), 0, step)
                best = reduce_max(_get(largest, 0, step))
                T.buffer_store(state, T.max(best, part.best[r]), [0])
                T.buffer_store(state, exp2(part.best[r] - state[0], 1), [1])
                T.buffer_store(part.best, state[0], [r])
                _put(added, splat(0.0, step), 0, step)
                for i in range(0, ROUND, step):
                    weight = exp2(_get(weights, r * ROUND + i, step) - splat(state[0], step), step)
                    weight = T.Select(is_seen(i), weight, splat(0.0, step))
                    _put(weights, weight, r * ROUND + i, step)
                    _put(
                        added,
                        _get(added, 0, step) + _get(weights, r * ROUND + i, step),
                        0,
                        step,
                    )
                total = multiply_add(
                    part.total[r], state[1], reduce_sum(_get(added, 0, step), step)
                )
                T.buffer_store(part.total, total, [r])
                with T.If(state[1] != T.float32(1)), T.Then():
                    with T.serial(shape.latent // lanes) as i:
                        at = r * shape.latent + i * lanes
                        value = _get(part.sums, at, lanes) * splat(state[1], lanes)
                        _put(part.sums, value, at, lanes)

            def add_values(padded: Expr) -> None:
                strip = columns * lanes
                with T.serial(padded // block) as rb, T.serial(shape.latent // strip) as cb:
                    sums = [
                        [scratch(lanes, "float32") for _ in range(columns)] for _ in range(block)
                    ]

                    def place(r: int, c: int) -> Expr:
                        return (rb * block + r) * shape.latent + cb * strip + c * lanes

                    for r in range(block):
                        for c in range(columns):
                            _put(sums[r][c], _get(part.sums, place(r, c), lanes), 0, lanes)
                    with T.serial(ROUND) as t:
                        for r in range(block):
                            for c in range(columns):
                                value = _get(panel, t * width + cb * strip + c * lanes, lanes)
                                weight = splat(weights[(rb * block + r) * ROUND + t], lanes)
                                added = multiply_add(weight, value, _get(sums[r][c], 0, lanes))
                                _put(sums[r][c], added, 0, lanes)
                    for r in range(block):
                        for c in range(columns):
                            _put(part.sums, _get(sums[r][c], 0, lanes), place(r, c), lanes)

            def collect(sequence: Expr, index: Expr, padded: Expr, last: Expr) -> None:
                """Part `index` of the context for the rows of this task."""
                with T.serial(padded) as r:
                    part.clear(r)
                tokens = T.min(last + 1 - index * PART, PART)
                with T.serial(T.max((tokens + ROUND - 1) // ROUND, 0)) as round:
                    start = index * PART + round * ROUND
                    load_tokens(sequence, start, last)
                    scores(padded)
                    with T.serial(padded) as r:
                        soften(r, start)
                    add_values(padded)

            take()
            with T.While(task[0] >= 0):
                T.buffer_store(task, 0, [1])
                with T.While(before[task[1] + 1] <= task[0]):
                    T.buffer_store(task, task[1] + 1, [1])
                sequence, index = task[1], task[0] - before[task[1]]
                first = index % blocks_of(sequence) * ROWS
                count = T.min(rows_of(sequence) - first, ROWS)
                padded = (count + block - 1) // block * block
                last = positions[row_offsets[sequence] + (first + count - 1) // heads]
                load_queries(sequence, first, count, padded)
                with T.If(splits):
                    with T.Then():
                        number = index // blocks_of(sequence)
                        collect(sequence, number, padded, last)
                        with T.serial(count) as r:
                            place = slots[sequence] + number * rows_of(sequence) + first + r
                            left.copy(place, part, r)
                    with T.Else():
                        with T.serial(padded) as r:
                            whole.clear(r)
                        with T.serial(last // PART + 1) as number:
                            collect(sequence, number, padded, last)
                            with T.serial(padded) as r:
                                whole.absorb(r, part, r)
                        with T.serial(count) as r:
                            token = row_offsets[sequence] + (first + r) // heads
                            store(whole, r, token, (first + r) % heads)
                take()

        with T.If(splits), T.Then(), T.parallel(n) as token:
            at = scratch(1, "int32")
            merged = _Found.declare(1, shape.latent, lanes)
            T.buffer_store(at, 0, [0])
            with T.While(row_offsets[at[0] + 1] <= T.cast(token, "int32")):
                T.buffer_store(at, at[0] + 1, [0])
            with T.serial(heads) as head:
                row = (T.cast(token, "int32") - row_offsets[at[0]]) * heads + head
                merged.clear(0)
                with T.serial(positions[token] // PART + 1) as number:
                    place = slots[at[0]] + number * rows_of(at[0]) + row
                    merged.absorb(0, left, place)
                store(merged, 0, token, head)

    return emit(body, [FETCH_ADD_IR, *(reduce_sum_ir(x) for x in {lanes, unit.lanes} - {1})])


def attend_kernel(shape: LatentShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """Attention of n tokens over the pages of their sequences, with an online softmax.

    (q_latent [n, heads, latent], q_rope [n, heads, rope], positions [n], row_offsets [b + 1],
    page_offsets [b + 1], page_ids [p], kv_lengths [b], pages) -> [n, heads, latent], what the
    weights make of the latents. A row's result is the same, bit by bit, whatever else the step has.
    """
    unit = vector_unit(tvm.target.Target.current(allow_none=True))
    return _attend(shape, format, dtype, unit)


@functools.cache
def _head_matmul(
    heads: int, outputs: int, inputs: int, weight_dtype: str, dtype: str, unit: VectorUnit
) -> tirx.PrimFunc:
    lanes = math.gcd(inputs, unit.lanes)
    rows, columns = math.gcd(outputs, WIDE), _block_rows(unit)
    # Outputs of a task: the weights of one are read once for all tokens.
    each = math.gcd(outputs, 64)

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, heads, inputs), dtype)
        weight = tensor("weight", (heads, outputs, inputs), weight_dtype)
        out = tensor("out", (n, heads, outputs), dtype)

        def tile(head: Expr, first: Expr, token: Expr, tokens: int) -> None:
            def weights(r: int, i: Expr) -> Expr:
                return to_float32(_get(weight, [head, first + r, i], lanes), lanes)

            def features(c: int, i: Expr) -> Expr:
                return to_float32(_get(x, [token + c, head, i], lanes), lanes)

            def store(r: int, c: int, value: Expr) -> None:
                T.buffer_store(out, T.cast(value, dtype), [token + c, head, first + r])

            _dots(rows, tokens, inputs, lanes, weights, features, store)

        with T.parallel(heads * (outputs // each)) as task:
            head, start = task // (outputs // each), task % (outputs // each) * each
            with T.serial(n // columns) as t, T.serial(each // rows) as j:
                tile(head, start + j * rows, t * columns, columns)
            with T.serial(n % columns) as t, T.serial(each // rows) as j:
                tile(head, start + j * rows, n // columns * columns + t, 1)

    return emit(body, [reduce_sum_ir(lanes)] if lanes > 1 else [])


def head_matmul_kernel(
    heads: int, outputs: int, inputs: int, weight_dtype: str, dtype: str
) -> tirx.PrimFunc:
    """(x [n, heads, inputs], weight [heads, outputs, inputs]) -> [n, heads, outputs]: every head
    has a matrix of its own."""
    unit = vector_unit(tvm.target.Target.current(allow_none=True))
    return _head_matmul(heads, outputs, inputs, weight_dtype, dtype, unit)
