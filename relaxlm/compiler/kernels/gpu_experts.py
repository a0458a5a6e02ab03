"""Rows of x, each times the matrix of its own expert, on GPUs of any kind: others are not read.

Of few rows, each is a product of its own (`alone`): lanes run along a row of the matrix as it is
stored, and their sums meet in workgroup memory. More rows are sorted by expert first
(`plan_kernel`, once for all matrices that read the same choice), in tiles of rows that have an
expert in common. A workgroup then brings a tile of x and a part of the expert's matrix into its
memory (`in_tiles`), word by word, so that a matrix is read and dequantized once per tile.

Sums are made in float32. Which kernels run is decided when they are launched, by how many rows
there are.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.gpu_matmul import load
from relaxlm.compiler.kernels.gpu_tiles import length, meet, private, put, shared
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.workgroup import grid, reduce, when
from relaxlm.quantization.groupwise import GroupQuant

# Rows per expert, on average, up to which each row is multiplied by itself.
FEW = 2
# Rows that a workgroup sorts.
CHUNK = 256
# `plan_kernel`'s tiles: an expert, the first of its rows in the order, and how many; none: unused.
EXPERT, FIRST, COUNT = range(3)
# `alone`: threads along a row, rows at a time, and rows of each thread.
LANES, TEAMS, EACH = 32, 2, 4
# A float32 with a whole number below 2 ** 23 in its low bits is 2 ** 23 more than that.
_MAGIC, _MAGIC_BITS = 2**23, 0x4B000000


@dataclass(frozen=True)
class Tiles:
    """How a workgroup shares out a product.

    Attributes:
        rows, columns: of the result.
        each: rows and columns of a thread.
        most: rows per expert, on average, up to which it is used; 0: always.
    """

    rows: int
    columns: int
    each: tuple[int, int]
    most: int

    @property
    def threads(self) -> int:
        return self.rows * self.columns // (self.each[0] * self.each[1])


WAYS = (Tiles(8, 64, (2, 2), 8), Tiles(32, 64, (4, 4), 0))


def plan_types(rows: Expr, experts: int) -> list[tuple[tuple[Expr | int, ...], str]]:
    """Shapes and dtypes of what `plan_kernel` writes for so many rows."""
    # Every expert's last tile may be partly filled; there are no smaller tiles.
    tiles = rows // WAYS[0].rows + experts
    chunks = (rows + CHUNK - 1) // CHUNK
    return [((rows,), "int32"), ((tiles, 3), "int32"), ((chunks + 1, experts), "int32")]


def _choose(rows: Expr, experts: int, run: Callable[[Tiles], None]) -> None:
    """Emit the launches of the way that so many rows take; of few rows none."""

    def further(ways: tuple[Tiles, ...]) -> None:
        way, *others = ways
        if not others:
            run(way)
            return
        with T.If(rows <= experts * way.most):
            with T.Then():
                run(way)
            with T.Else():
                further(tuple(others))

    with when(rows > experts * FEW):
        further(WAYS)


def _strided(count: int, threads: int, t: Expr, do: Callable[[Expr], None]) -> None:
    """do(place) for all places below `count`, shared out among the threads of a workgroup."""
    for i in range(math.ceil(count / threads)):
        at = i * threads + t
        with when(*([at < count] if (i + 1) * threads > count else [])):
            do(at)


@functools.cache
def plan_kernel(experts: int, each: int) -> tirx.PrimFunc:
    """chosen [n, each] int32 -> what `plan_types` says, for `expert_kernel`.

    order: the rows of the result, sorted by expert. tiles: see above. counts: of every chunk of
    rows, for every expert how many rows of it earlier chunks have; behind them, where each expert's
    rows begin. Nothing is written for few rows.
    """

    def body() -> None:
        n, rows, slots, chunks = (length(name) for name in ("n", "rows", "slots", "chunks"))
        chosen = tensor("chosen", (n, each), "int32")
        order = tensor("order", (rows,), "int32")
        tiles = tensor("tiles", (slots, 3), "int32")
        counts = tensor("counts", (chunks, experts), "int32")

        def bring(chunk: Expr, t: Expr) -> tirx.Buffer:
            """A chunk's experts, in workgroup memory."""
            own = shared(CHUNK, "int32")
            row = chunk * CHUNK + t
            last = T.min(row, rows - 1)
            expert = chosen[last // each, last % each]
            put(own, T.if_then_else(row < rows, expert, -1), t)
            meet()
            return own

        def count_chunk(chunk: Expr, t: Expr) -> None:
            own, found = bring(chunk, t), private(1, "int32")

            def count(expert: Expr) -> None:
                put(found, T.int32(0), 0)
                with T.serial(CHUNK) as i:
                    put(found, found[0] + T.cast(own[i] == expert, "int32"), 0)
                T.buffer_store(counts, found[0], [chunk, expert])

            _strided(experts, CHUNK, t, count)

        def make_tiles(way: Tiles, t: Expr) -> None:
            totals, sums = shared(experts, "int32"), private(3, "int32")

            def tiles_of(total: Expr) -> Expr:
                return (total + way.rows - 1) // way.rows

            def add_up(expert: Expr) -> None:
                put(sums, T.int32(0), 0)
                with T.serial(chunks - 1) as chunk:
                    put(sums, counts[chunk, expert], 1)
                    T.buffer_store(counts, sums[0], [chunk, expert])
                    put(sums, sums[0] + sums[1], 0)
                put(totals, sums[0], expert)

            def write(expert: Expr) -> None:
                start, first_tile, total = 0, 1, 2
                put(sums, T.int32(0), start)
                put(sums, T.int32(0), first_tile)
                with T.serial(expert) as other:
                    put(sums, sums[start] + totals[other], start)
                    put(sums, sums[first_tile] + tiles_of(totals[other]), first_tile)
                T.buffer_store(counts, sums[start], [chunks - 1, expert])
                put(sums, totals[expert], total)
                with T.serial(tiles_of(sums[total])) as i:
                    tile, done = sums[first_tile] + i, i * way.rows
                    T.buffer_store(tiles, expert, [tile, EXPERT])
                    T.buffer_store(tiles, sums[start] + done, [tile, FIRST])
                    rest = T.min(sums[total] - done, way.rows)
                    T.buffer_store(tiles, rest, [tile, COUNT])

            _strided(experts, CHUNK, t, add_up)
            meet()
            _strided(experts, CHUNK, t, write)
            put(sums, T.int32(0), 0)
            with T.serial(experts) as expert:
                put(sums, sums[0] + tiles_of(totals[expert]), 0)
            with T.serial((slots - sums[0] + CHUNK - 1) // CHUNK) as i:
                slot = sums[0] + i * CHUNK + t
                with when(slot < slots):
                    T.buffer_store(tiles, 0, [slot, COUNT])

        def order_chunk(chunk: Expr, t: Expr) -> None:
            own, before = bring(chunk, t), private(1, "int32")
            put(before, T.int32(0), 0)
            with T.serial(CHUNK) as i:
                earlier = T.And(own[i] == own[t], i < t)
                put(before, before[0] + T.cast(earlier, "int32"), 0)
            row = chunk * CHUNK + t
            with when(row < rows):
                start = counts[chunks - 1, own[t]] + counts[chunk, own[t]]
                T.buffer_store(order, row, [start + before[0]])

        def run(way: Tiles) -> None:
            for blocks, of in (
                (chunks - 1, count_chunk),
                (1, lambda _, t: make_tiles(way, t)),
                (chunks - 1, order_chunk),
            ):
                with grid([blocks], CHUNK) as (block, t):
                    of(block, t)

        _choose(rows, experts, run)

    return emit(body)


@functools.cache  # every layer asks
def expert_kernel(
    shape: tuple[int, int, int],
    quant: GroupQuant | None,
    stored_dtype: str,
    dtype: str,
    each: int,
    repeat: int,
) -> tirx.PrimFunc:
    """(x [m, K], chosen [n, each] int32, order, tiles, *stored weight) -> [n each, N].

    Row i of the output is row i // repeat of x times the matrix chosen[i // each, i % each]; it has
    the dtype of x. n must not be 0.

    Args:
        shape: (E, N, K).
        quant: the weight's format, row by row; None for a plain [E, N, K] tensor.
        stored_dtype: of the scales, or of the plain tensor.
        dtype: of x.
    """
    experts, n, k = shape
    matrix = StoredMatrix(n, k, quant, stored_dtype)
    assert not matrix.columns, "experts are stored row by row"
    per_word = matrix.per_word
    words = math.ceil(k / per_word)  # of a row that are read; its last group may have more

    def body() -> None:
        m, tokens, rows, slots = (length(name) for name in ("m", "tokens", "rows", "slots"))
        x = tensor("x", (m, k), dtype)
        chosen = tensor("chosen", (tokens, each), "int32")
        order = tensor("order", (rows,), "int32")
        tiles = tensor("tiles", (slots, 3), "int32")
        weight = tensor("weight", (experts, n, matrix.words), matrix.word_dtype)
        scales = None
        if quant is not None:
            scales = tensor("scale", (experts, n, matrix.groups), stored_dtype)
        out = tensor("out", (rows, n), dtype)

        def code(word: Expr, i: int) -> Expr:
            """The value of a word's code before the scale, float32."""
            if quant is None:
                return T.cast(word, "float32")
            moved = T.shift_right(word, T.uint32(i * quant.bits)) if i else word
            bits = T.bitwise_and(moved, T.uint32((1 << quant.bits) - 1))
            number = T.reinterpret("float32", T.bitwise_or(bits, T.uint32(_MAGIC_BITS)))
            return number - T.float32(_MAGIC + quant.max_int)

        def scale(expert: Expr, row: Expr, word: Expr) -> Expr:
            if scales is None:
                return T.float32(1)
            return T.cast(scales[expert, row, word // matrix.group_words], "float32")

        def alone(part: Expr, row: Expr, t: Expr) -> None:
            lane, team = t % LANES, t // LANES
            expert = chosen[row // each, row % each]
            sums, values = private(EACH), private(per_word)
            word, product = private(1, matrix.word_dtype), private(1)
            met = [shared(TEAMS * LANES) for _ in range(EACH)]

            def column(i: int) -> Expr:
                return (part * TEAMS + team) * EACH + i

            for i in range(EACH):
                put(sums, T.float32(0), i)
            with T.serial(math.ceil(words / LANES)) as step:
                at = step * LANES + lane
                with when(*([at < words] if words % LANES else [])):
                    load(x, row // repeat, at * per_word, per_word, k, values, 0)
                    for i in range(EACH):
                        place = T.min(column(i), n - 1)
                        put(word, weight[expert, place, at], 0)
                        put(product, code(word[0], 0) * values[0], 0)
                        for j in range(1, per_word):
                            put(product, product[0] + code(word[0], j) * values[j], 0)
                        put(sums, sums[i] + product[0] * scale(expert, place, at), i)
            for i in range(EACH):
                put(met[i], sums[i], t)
            reduce(met, t, lane, LANES)
            with when(lane == 0):
                for i in range(EACH):
                    with when(column(i) < n):
                        T.buffer_store(out, T.cast(met[i][t], dtype), [row, column(i)])

        def in_tiles(way: Tiles, part: Expr, tile: Expr, t: Expr) -> None:
            # Whole words, about 32 columns.
            step_words = max(32 // per_word, 1)
            step, chunks = step_words * per_word, math.ceil(words / step_words)
            # Rows in workgroup memory begin in different banks.
            pitch = step + 1
            of_thread, beside = way.each, way.columns // way.each[1]
            expert, first, count = (tiles[tile, i] for i in (EXPERT, FIRST, COUNT))
            places = shared(way.rows, "int32")
            left, right = shared(way.rows * pitch), shared(way.columns * pitch)
            sums, values = private(of_thread[0] * of_thread[1]), private(sum(of_thread))
            word = private(1, matrix.word_dtype)

            def own_row(i: int) -> Expr:
                return t // beside + i * (way.rows // of_thread[0])

            def own_column(j: int) -> Expr:
                return t % beside + j * beside

            def bring_x(at: Expr) -> None:
                row, column = at // step, at % step
                place = chunk * step + column
                value = T.cast(x[places[row], T.min(place, k - 1)], "float32")
                if chunks * step > k:  # what the last words have too much meets 0
                    value = T.if_then_else(place < k, value, T.float32(0))
                put(left, value, row * pitch + column)

            def bring_weight(at: Expr) -> None:
                row, beside = at // step_words, at % step_words
                # Beyond the matrix, another word stands in, which meets 0 or is not stored.
                here = chunk * step_words + beside
                here = T.min(here, words - 1) if words % step_words else here
                line = part * way.columns + row
                line = T.min(line, n - 1) if n % way.columns else line
                put(word, weight[expert, line, here], 0)
                for j in range(per_word):
                    value = code(word[0], j) * scale(expert, line, here)
                    put(right, value, row * pitch + beside * per_word + j)

            with when(t < way.rows):
                put(places, order[first + T.min(t, count - 1)] // repeat, t)
            for i in range(of_thread[0] * of_thread[1]):
                put(sums, T.float32(0), i)
            with T.serial(chunks) as chunk:
                # The places are there, and everybody is done with the last chunk.
                meet()
                _strided(way.rows * step, way.threads, t, bring_x)
                _strided(way.columns * step_words, way.threads, t, bring_weight)
                meet()
                with T.serial(step) as at:
                    for i in range(of_thread[0]):
                        put(values, left[own_row(i) * pitch + at], i)
                    for j in range(of_thread[1]):
                        put(values, right[own_column(j) * pitch + at], of_thread[0] + j)
                    for i in range(of_thread[0]):
                        for j in range(of_thread[1]):
                            place = i * of_thread[1] + j
                            product = values[i] * values[of_thread[0] + j]
                            put(sums, sums[place] + product, place)
            for i in range(of_thread[0]):
                for j in range(of_thread[1]):
                    column = part * way.columns + own_column(j)
                    with when(own_row(i) < count, column < n):
                        value = T.cast(sums[i * of_thread[1] + j], dtype)
                        T.buffer_store(out, value, [order[first + own_row(i)], column])

        def run(way: Tiles) -> None:
            most = rows // way.rows + T.min(rows, experts)
            blocks = [math.ceil(n / way.columns), most]
            with grid(blocks, way.threads) as (part, tile, t):
                # For all threads alike, so that they may wait for each other in it.
                with T.If(tiles[tile, COUNT] > 0), T.Then():
                    in_tiles(way, part, tile, t)

        with when(rows <= experts * FEW):
            blocks = [math.ceil(n / (TEAMS * EACH)), rows]
            with grid(blocks, TEAMS * LANES) as (part, row, t):
                alone(part, row, t)
        _choose(rows, experts, run)

    return emit(body)
