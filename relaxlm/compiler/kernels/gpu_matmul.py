"""Products with stored matrices on GPUs of any kind: weights are read as they are stored.

How many rows x has decides which of two kernels runs. Of few rows, `_few`, threads of a workgroup
share out the columns of some rows of the matrix. Each takes whole words, eight weights of 4 bits,
and its sums meet in workgroup memory. Of many, `_many`, a workgroup computes a tile of the result.
Weights and rows of x come into its memory step by step, a weight once for all rows of the tile, and
a thread has 16 sums in registers.

Weights are (code - zero) * scale in float32.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.gpu_activations import ACTIVATIONS
from relaxlm.compiler.kernels.gpu_tiles import length, meet, private, put, shared
from relaxlm.compiler.kernels.product import Product
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.workgroup import grid, reduce, when

# Rows of x that threads share weights for without tiles, and how many of them at once.
FEW, TOKENS = 8, 4
# Of few rows, the threads that share out the columns, and those with other rows of the matrix:
# neighbouring threads read neighbouring words.
LANES, SIDES = 32, 4
COLUMN_LANES, COLUMN_SIDES = 8, 32
# From how many rows on a matrix keeps a GPU busy with four of them per thread, instead of two.
TALL = 8192
# A tile: rows of x and of the matrix, of which a thread has 4 each, and columns of a step.
TILE_TOKENS, TILE_ROWS, TILE_COLUMNS = 32, 64, 32
PER_THREAD = 4


@functools.cache  # every layer asks
def product_kernel(product: Product) -> tirx.PrimFunc:
    """The kernel of any product."""

    def body() -> None:
        tensors = _Tensors(product)
        few = [(1, 1), (FEW, TOKENS)]

        def choose(rows: list[tuple[int, int]]) -> None:
            if not rows:
                _many(tensors)
                return
            (most, tokens), *others = rows
            with T.If(tensors.m <= most):
                with T.Then():
                    _few(tensors, tokens)
                with T.Else():
                    choose(others)

        choose(few)

    return emit(body)


class _Tensors:
    """The parameters of a kernel."""

    def __init__(self, product: Product) -> None:
        self.product = product
        n, k = product.shape
        self.matrix = matrix = StoredMatrix(n, k, product.quant, product.stored)
        self.m = length("m")
        self.x = tensor("x", (self.m, k), product.dtype)
        if product.quant is None:
            self.words = tensor("weight", (n, k), product.stored)
            self.scales = None
        else:
            self.words = tensor("q_weight", matrix.word_shape, "uint32")
            self.scales = tensor("q_scale", matrix.scale_shape, product.stored)
        self.bias = tensor("bias", (n,), product.bias) if product.bias else None
        self.residual = None
        if product.residual:
            self.residual = tensor("residual", (self.m, n), product.out_dtype)
        # Rows of the matrix that make one column of the result, and how many columns there are.
        self.pieces = 2 if product.activation else 1
        self.columns = n // self.pieces
        self.out = tensor("out", (self.m, self.columns), product.out_dtype)

    def word(self, row: Expr, at: Expr) -> Expr:
        return self.words[(at, row) if self.matrix.columns else (row, at)]

    def scale(self, row: Expr, at: Expr) -> Expr:
        """That of a word."""
        assert self.scales is not None
        group = at // self.matrix.group_words
        place = (group, row) if self.matrix.columns else (row, group)
        return T.cast(self.scales[place], "float32")

    def store(self, token: Expr, column: Expr, sums: list[Expr]) -> None:
        """Store an element of the result from the sums of its rows of the matrix."""
        value = sums[0]
        if self.product.activation is not None:
            kept = private(1)
            put(kept, value)
            value = ACTIVATIONS[self.product.activation](kept[0]) * sums[1]
        if self.bias is not None:
            value = value + T.cast(self.bias[column], "float32")
        if self.residual is not None:
            value = value + T.cast(self.residual[token, column], "float32")
        T.buffer_store(self.out, T.cast(value, self.product.out_dtype), [token, column])


def _below(value: Expr, most: Expr | int, step: int) -> tuple[Expr, Expr | bool]:
    """A place that may be behind the end, as one that is not, and whether it is not.

    Args:
        step: what places go up to a multiple of.
    """
    if isinstance(most, int) and most % step == 0:
        return value, True
    return T.min(value, most - 1), value < most


def _few(tensors: _Tensors, tokens: int) -> None:
    """Emit the kernel for few rows of x, `tokens` at once."""
    matrix, m, pieces = tensors.matrix, tensors.m, tensors.pieces
    lanes, sides = (COLUMN_LANES, COLUMN_SIDES) if matrix.columns else (LANES, SIDES)
    threads = lanes * sides
    each = 2 if pieces == 2 else 4 if tokens == 1 and tensors.columns >= TALL else 2
    each //= pieces  # columns of the result that a thread computes
    unit = matrix.per_word if matrix.quant else math.gcd(matrix.k, 4)
    units = -(-matrix.k // unit)
    planes = each * pieces * tokens
    per_group = sides * each
    with grid([-(-tensors.columns // per_group), (m + tokens - 1) // tokens], threads) as places:
        block, tile, t = places
        lane, side = (t // sides, t % sides) if matrix.columns else (t % lanes, t // lanes)
        sums, met = private(planes), [shared(threads) for _ in range(planes)]
        values = private(tokens * unit)
        at_tokens = [_below(tile * tokens + i, m, tokens) for i in range(tokens)]
        columns = [
            _below(block * per_group + i * sides + side, tensors.columns, per_group)
            for i in range(each)
        ]

        def plane(column: int, piece: int, token: int) -> int:
            return (column * pieces + piece) * tokens + token

        for i in range(planes):
            put(sums, 0.0, i)
        with T.serial(-(-units // lanes)) as step:
            at = step * lanes + lane
            with when(True if units % lanes == 0 else at < units):
                for i, (token, _) in enumerate(at_tokens):
                    load(tensors.x, token, at * unit, unit, matrix.k, values, i * unit)
                for column in range(each):
                    for piece in range(pieces):
                        row = columns[column][0] + piece * tensors.columns

                        def add(token: int, dot: Expr, column=column, piece=piece) -> None:
                            place = plane(column, piece, token)
                            put(sums, sums[place] + dot, place)

                        _dot(tensors, row, at, unit, values, tokens, add)
        for i in range(planes):
            put(met[i], sums[i], t)
        reduce(met, t, lane, lanes, sides if matrix.columns else 1)
        with when(lane == 0):
            for i, (column, inside) in enumerate(columns):
                for j, (token, there) in enumerate(at_tokens):
                    with when(inside, there):
                        found = [met[plane(i, p, j)][t] for p in range(pieces)]
                        tensors.store(token, column, found)


def load(
    x: tirx.Buffer, row: Expr, first: Expr, count: int, size: int, kept: tirx.Buffer, place: int
) -> None:
    """Emit the loads of some elements of a row; those behind its end are 0."""
    wide = math.gcd(count, size, 4)
    if wide == 4 and size % count == 0:
        for i in range(0, count, 4):
            loaded = x.vload([row, first + i], f"{x.dtype}x4")
            T.buffer_store(kept, T.cast(loaded, "float32x4"), [T.ramp(place + i, 1, 4)])
        return
    for i in range(count):
        at, inside = _below(first + i, size, count)
        value = T.cast(x[row, at], "float32")
        put(kept, value if inside is True else T.Select(inside, value, T.float32(0)), place + i)


def _dot(
    tensors: _Tensors,
    row: Expr,
    at: Expr,
    unit: int,
    values: tirx.Buffer,
    tokens: int,
    add: Callable[[int, Expr], None],
) -> None:
    """Emit the products of elements of x with a word of the matrix, or with plain values."""
    matrix = tensors.matrix
    if matrix.quant is None:
        plain = private(unit)
        load(tensors.words, row, at * unit, unit, matrix.k, plain, 0)
        for token in range(tokens):
            add(token, _sum(plain[i] * values[token * unit + i] for i in range(unit)))
        return
    word, scale = private(1, "uint32"), private(1)
    put(word, tensors.word(row, at))
    put(scale, tensors.scale(row, at))
    weights = private(unit) if tokens > 1 else None
    if weights is not None:
        for i in range(unit):
            put(weights, _code(matrix, word[0], i), i)
    # Codes are used where they are in a word, so those at one place are too large alike.
    half = -(-unit // 2)
    for token in range(tokens):
        total = _sum(
            _sum(
                (_code(matrix, word[0], i) if weights is None else weights[i])
                * values[token * unit + i]
                for i in range(place, unit, half)
            )
            * T.float32(2.0 ** -(place * matrix.quant.bits))
            for place in range(half)
        )
        add(token, total * scale[0])


def _code(matrix: StoredMatrix, word: Expr, i: int) -> Expr:
    """The value of a code times a power of two: `StoredMatrix.codes`."""
    return matrix.codes(word, i, 1)


def _sum(terms: Iterable[Expr]) -> Expr:
    return functools.reduce(operator.add, terms)


def _many(tensors: _Tensors) -> None:
    """Emit the kernel for many rows of x."""
    matrix, m, pieces, k = tensors.matrix, tensors.m, tensors.pieces, tensors.matrix.k
    across = TILE_ROWS // PER_THREAD
    threads = across * TILE_TOKENS // PER_THREAD
    unit = matrix.per_word
    words = TILE_COLUMNS // unit  # of a row in a step
    depth = words * unit
    # One more than rows, so that threads that write below each other use different banks.
    high, wide = TILE_TOKENS + 1, TILE_ROWS + 1
    shown = TILE_ROWS // pieces  # columns of the result
    blocks = [-(-tensors.columns // shown), (m + TILE_TOKENS - 1) // TILE_TOKENS]
    with grid(blocks, threads) as (block, tile, t):
        left, right = shared(depth * high), shared(depth * wide)
        sums = private(PER_THREAD * PER_THREAD)
        a, b = private(PER_THREAD), private(PER_THREAD)
        tx, ty = t % across, t // across

        def row_at(place: Expr) -> Expr:
            """The row of the matrix at a place of the tile."""
            column, _ = _below(block * shown + place % shown, tensors.columns, shown)
            return column + place // shown * tensors.columns if pieces > 1 else column

        def fetch_x(step: Expr, i: Expr) -> None:
            token, at = i // depth, i % depth
            row, _ = _below(tile * TILE_TOKENS + token, m, TILE_TOKENS)
            column, inside = _below(step * depth + at, k, depth)
            value = T.cast(tensors.x[row, column], "float32")
            if inside is not True:
                value = T.Select(inside, value, T.float32(0))
            put(left, value, at * high + token)

        def fetch_words(step: Expr, i: Expr) -> None:
            at, place = (
                (i // TILE_ROWS, i % TILE_ROWS) if matrix.columns else (i % words, i // words)
            )
            column, _ = _below(step * words + at, matrix.words, words)
            row = row_at(place)
            if matrix.quant is None:
                # Behind the end of a row of x there are zeros.
                put(right, T.cast(tensors.words[row, column], "float32"), at * wide + place)
                return
            word, scale = private(1, "uint32"), private(1)
            put(word, tensors.word(row, column))
            put(scale, tensors.scale(row, column))
            for code in range(unit):
                shrink = T.float32(2.0 ** -(code % -(-unit // 2) * matrix.quant.bits))
                value = _code(matrix, word[0], code) * (scale[0] * shrink)
                put(right, value, (at * unit + code) * wide + place)

        for i in range(PER_THREAD * PER_THREAD):
            put(sums, 0.0, i)
        with T.serial(-(-k // depth)) as step:
            meet()  # everybody has used the last step's
            _shared_out(TILE_TOKENS * depth, threads, t, lambda i: fetch_x(step, i))
            _shared_out(TILE_ROWS * words, threads, t, lambda i: fetch_words(step, i))
            meet()
            with T.serial(depth) as at:
                for i in range(PER_THREAD):
                    put(a, left[at * high + ty + i * (TILE_TOKENS // PER_THREAD)], i)
                    put(b, right[at * wide + tx + i * across], i)
                for i in range(PER_THREAD):
                    for j in range(PER_THREAD):
                        place = i * PER_THREAD + j
                        put(sums, sums[place] + a[i] * b[j], place)
        for i in range(PER_THREAD):
            token = tile * TILE_TOKENS + ty + i * (TILE_TOKENS // PER_THREAD)
            for j in range(PER_THREAD // pieces):
                column, inside = _below(block * shown + tx + j * across, tensors.columns, shown)
                with when(inside, token < m):
                    found = [
                        sums[i * PER_THREAD + j + piece * (PER_THREAD // pieces)]
                        for piece in range(pieces)
                    ]
                    tensors.store(token, column, found)


def _shared_out(count: int, threads: int, t: Expr, one: Callable[[Expr], None]) -> None:
    """Emit what threads do `count` times, each its part."""
    with T.serial(-(-count // threads)) as step:
        i = step * threads + t
        with when(True if count % threads == 0 else i < count):
            one(i)
