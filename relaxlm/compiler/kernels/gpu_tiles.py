"""Tiles of rows times tiles of columns, for GPUs of any kind: products, and attention over tokens.

A workgroup stages what its rows and columns have, `CHUNK` features at a time, in the memory that
its threads share, and every thread sums products of a few rows with a few columns in registers. So
what lies in memory is read once for all rows of the workgroup. Subgroups cannot be relied upon:
threads meet at barriers only, which stand where all of them pass, as WGSL demands.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

# Features of rows and columns that are staged at a time.
CHUNK = 16
# Of a workgroup; every device has as many.
MOST_THREADS = 256
# Sums that a thread keeps in registers, and rows that these belong to.
MOST_SUMS, MOST_ROWS = 32, 8
# Threads that share a row's softmax.
MOST_PIECES = 16
# Below any score, but finite: nothing may give inf - inf.
NO_SCORE = -1e30


def length(name: str) -> tirx.Var:
    """A length that is known when the kernel runs; WGSL has no 64-bit integers."""
    return tirx.Var(name, "int32")


def private(size: int, dtype: str = "float32") -> tirx.Buffer:
    """Memory of one thread."""
    return T.decl_buffer((size,), dtype, scope="local")


def shared(size: int, dtype: str = "float32") -> tirx.Buffer:
    """Memory of one workgroup."""
    return T.decl_buffer((size,), dtype, scope="shared")


def put(buffer: tirx.Buffer, value: Expr | float, index: Expr | int = 0) -> None:
    """Store a value; a Python float is a float32."""
    value = T.float32(value) if isinstance(value, float) else value
    T.buffer_store(buffer, value, [index])


def meet() -> None:
    """A barrier of the workgroup's threads, behind which each sees what the others stored."""
    T.evaluate(T.tvm_storage_sync("shared"))


@dataclass(frozen=True)
class Products:
    """Who sums which products of `rows` rows and `columns` columns, on `threads` threads.

    Attributes:
        rows_each, columns_each: of one thread: `rows_each` rows one after the other, and columns at
            a distance of `across` threads.
    """

    rows: int
    columns: int
    threads: int

    @property
    def rows_each(self) -> int:
        """The squarest share: what a thread loads, it uses most often."""
        outputs = self.rows * self.columns // self.threads
        fitting = [
            r
            for r in range(1, self.rows + 1)
            if self.rows % r == outputs % r == 0 and self.columns % (outputs // r) == 0
        ]
        assert fitting and outputs * self.threads == self.rows * self.columns, f"no shares: {self}"
        return min(fitting, key=lambda r: (r + outputs // r, r))

    @property
    def columns_each(self) -> int:
        return self.rows * self.columns // self.threads // self.rows_each

    @property
    def across(self) -> int:
        return self.columns // self.columns_each

    def row(self, thread: Expr, i: int) -> Expr:
        """A thread's i-th row."""
        return thread // self.across * self.rows_each + i

    def column(self, thread: Expr, j: int) -> Expr:
        """A thread's j-th column."""
        return thread % self.across + j * self.across

    def sums(self) -> tirx.Buffer:
        """Of one thread, [rows_each * columns_each]."""
        return private(self.rows_each * self.columns_each)

    def staged(self) -> tuple[tirx.Buffer, tirx.Buffer]:
        """What `sum` stages rows and columns in; the latter apart, so that memory banks differ."""
        return shared(self.rows * CHUNK), shared(self.columns * (CHUNK + 1))

    def sum(
        self,
        thread: Expr,
        features: int,
        staged: tuple[tirx.Buffer, tirx.Buffer],
        sums: tirx.Buffer,
        row: Callable[[Expr, Expr], Expr],
        column: Callable[[Expr, Expr], Expr],
    ) -> None:
        """Emit the products' sums over all features.

        All threads pass. What other threads stored before is there when `row` and `column` are
        evaluated, and the last ones may still read what was staged.

        Args:
            row, column: (number, feature) -> float32.
        """
        rows, columns = staged
        for i in range(self.rows_each * self.columns_each):
            put(sums, 0.0, i)
        one_row, one_column = private(self.rows_each), private(self.columns_each)
        with T.serial(-(-features // CHUNK)) as chunk:
            meet()
            for buffer, count, width, read in (
                (rows, self.rows, CHUNK, row),
                (columns, self.columns, CHUNK + 1, column),
            ):
                for i in range(-(-count * CHUNK // self.threads)):
                    at = i * self.threads + thread
                    number, feature = at // CHUNK, chunk * CHUNK + at % CHUNK
                    with T.If(at < count * CHUNK), T.Then():
                        if features % CHUNK:
                            value = read(number, T.min(feature, features - 1))
                            value = T.if_then_else(feature < features, value, T.float32(0))
                        else:
                            value = read(number, feature)
                        put(buffer, value, number * width + at % CHUNK)
            meet()
            with T.serial(CHUNK) as feature:
                for i in range(self.rows_each):
                    put(one_row, rows[self.row(thread, i) * CHUNK + feature], i)
                for j in range(self.columns_each):
                    place = self.column(thread, j) * (CHUNK + 1) + feature
                    put(one_column, columns[place], j)
                for i in range(self.rows_each):
                    for j in range(self.columns_each):
                        at = i * self.columns_each + j
                        put(sums, sums[at] + one_row[i] * one_column[j], at)


@dataclass(frozen=True)
class Tile:
    """What a workgroup of attention has: rows of queries, and so many tokens at a time.

    Attributes:
        size: features of a result.
    """

    rows: int
    tokens: int
    threads: int
    size: int

    @staticmethod
    def of(rows: int, size: int) -> "Tile":
        """For at least so many rows; a few more, if threads share them out more evenly."""
        threads = 128 if rows * size <= MOST_SUMS * 128 else MOST_THREADS
        few = rows <= 8 and threads == 128
        even = 1 if few else 2 if threads == 128 else 4
        return Tile(-(-rows // even) * even, 128 if few else 64, threads, size)

    @staticmethod
    def most_rows(size: int) -> int:
        """Rows whose results fit into the registers of all threads."""
        return max(MOST_SUMS * MOST_THREADS // size, 1)

    @property
    def products(self) -> Products:
        """Of queries and keys."""
        return Products(self.rows, self.tokens, self.threads)

    @property
    def lanes(self) -> int:
        """Threads beside each other with features beside each other: as many as leave four features
        to each and few without any, a power of two."""
        most = min(1 << max((self.size // 4).bit_length() - 1, 5), self.threads)
        lanes = most
        while lanes > 8 and -self.size % lanes > self.size // 8:
            lanes //= 2
        return lanes

    @property
    def features_each(self) -> int:
        """Features of a result per thread, at a distance of `lanes`."""
        return -(-self.size // self.lanes)

    @property
    def rows_each(self) -> int:
        """Rows of results per thread, one after the other."""
        groups, most = self.threads // self.lanes, min(MOST_ROWS, MOST_SUMS // self.features_each)
        fitting = [self.rows >> i for i in range(6) if self.rows % (1 << i) == 0]
        fitting = [r for r in fitting if self.rows // r <= groups]
        return max((r for r in fitting if r <= most), default=min(fitting))

    @property
    def slices(self) -> int:
        """Into how many shares threads divide the tokens between them when they add values."""
        return self.threads // (self.lanes * (self.rows // self.rows_each))

    @property
    def pieces(self) -> int:
        """Threads per row in the softmax, a power of two that divides `tokens`."""
        return min(MOST_PIECES, 1 << (self.threads // self.rows).bit_length() - 1)


class TileAttention:
    """Emits what a workgroup does: an online softmax over tiles of tokens (arXiv:2205.14135).

    Attributes:
        best, sums: [rows] in workgroup memory when `run` is through: of each row the largest score
            and the sum of all weights relative to it. Scores are exponents of 2.
    """

    def __init__(self, tile: Tile, thread: Expr) -> None:
        self.tile, self.thread = tile, thread
        self.best, self.sums = shared(tile.rows), shared(tile.rows)
        self._staged = tile.products.staged()
        self._results = private(tile.rows_each * tile.features_each)

    def run(
        self,
        first: Expr,
        steps: Expr,
        count: Expr,
        width: int,
        place: Callable[[Expr], Expr],
        query: Callable[[Expr, Expr], Expr],
        key: Callable[[Expr, Expr], Expr],
        value: Callable[[Expr, Expr], Expr],
        score: Callable[[int, Expr, Expr], Expr],
    ) -> None:
        """Go through `steps` tiles of tokens, from tile `first` on. All threads pass.

        Args:
            count: tokens in all; the last one repeats in place of those behind it.
            width: features of queries and keys.
            place: a token's number -> where it is, for `key` and `value`.
            query: (row, feature) -> float32. key, value: (place, feature) -> float32.
            score: (i, token's number, product) -> the score of the i-th of a thread's rows (of
                `tile.products`), or `NO_SCORE` if the row does not see the token.
        """
        tile, t = self.tile, self.thread
        products, pieces, stride = tile.products, tile.pieces, tile.tokens + 1
        scores, tops = shared(tile.rows * stride), shared(tile.rows * pieces)
        places = shared(tile.tokens, "int32")
        mine = private(3)  # of a thread's row in the softmax
        best, total, larger = 0, 1, 2
        row, piece = t // pieces, t % pieces
        sums = products.sums()

        def weighs() -> T.If:
            return T.If(t < tile.rows * pieces)

        own = private(tile.tokens // pieces)  # and scores of that row

        def at(m: int) -> Expr:
            return row * stride + piece + m * pieces

        put(mine, NO_SCORE, best)
        put(mine, 0.0, total)
        for i in range(tile.rows_each * tile.features_each):
            put(self._results, 0.0, i)
        with T.serial(T.max(steps, 0)) as step:
            start = (first + step) * tile.tokens
            meet()  # Everybody has read the last tile's places.
            with T.If(t < tile.tokens), T.Then():
                put(places, place(T.min(start + t, count - 1)), t)
            products.sum(t, width, self._staged, sums, query, lambda j, d: key(places[j], d))
            for i in range(products.rows_each):
                for j in range(products.columns_each):
                    column = products.column(t, j)
                    product = sums[i * products.columns_each + j]
                    there = products.row(t, i) * stride + column
                    put(scores, score(i, start + column, product), there)
            meet()
            with weighs(), T.Then():
                put(mine, mine[best], larger)
                for m in range(tile.tokens // pieces):
                    put(own, scores[at(m)], m)
                    put(mine, T.max(mine[larger], own[m]), larger)
                put(tops, mine[larger], t)
            meet()
            with weighs(), T.Then():
                with T.serial(pieces) as m:
                    put(mine, T.max(mine[larger], tops[row * pieces + m]), larger)
                with T.If(piece == 0), T.Then():
                    # What results so far are multiplied by.
                    put(self.sums, T.exp2(mine[best] - mine[larger]), row)
                put(mine, mine[total] * T.exp2(mine[best] - mine[larger]), total)
                put(mine, mine[larger], best)
                for m in range(tile.tokens // pieces):
                    seen = own[m] > T.float32(NO_SCORE / 2)
                    weight = T.if_then_else(seen, T.exp2(own[m] - mine[best]), T.float32(0))
                    put(own, weight, m)
                    put(mine, mine[total] + own[m], total)
                    put(scores, own[m], at(m))
            meet()
            self._add_values(scores, places, T.min(count - start, tile.tokens), value)
        meet()
        with weighs(), T.Then():
            put(tops, mine[total], t)
            with T.If(piece == 0), T.Then():
                put(self.best, mine[best], row)
        meet()
        with T.If(t < tile.rows), T.Then():
            put(mine, 0.0, total)
            with T.serial(pieces) as m:
                put(mine, mine[total] + tops[t * pieces + m], total)
            put(self.sums, mine[total], t)
        meet()

    def _mine(self) -> tuple[Expr, Expr, Expr]:
        """Of a thread that adds values: its slice, its first row, and its lane."""
        tile, t = self.tile, self.thread
        rows = tile.rows // tile.rows_each
        within = t // tile.lanes
        return within // rows, within % rows * tile.rows_each, t % tile.lanes

    def _add_values(
        self,
        weights: tirx.Buffer,
        places: tirx.Buffer,
        count: Expr,
        value: Callable[[Expr, Expr], Expr],
    ) -> None:
        """Add the tile's weighted values to what there is, multiplied by `sums`."""
        tile = self.tile
        slice_, first, lane = self._mine()
        each, features, results = tile.rows_each, tile.features_each, self._results
        own, one = private(each), private(1)
        for i in range(each):
            put(own, self.sums[first + i], i)
            for j in range(features):
                put(results, results[i * features + j] * own[i], i * features + j)
        with T.serial((count + tile.slices - 1) // tile.slices) as m:
            token = m * tile.slices + slice_
            for i in range(each):
                put(own, weights[(first + i) * (tile.tokens + 1) + token], i)
            for j in range(features):
                feature = T.min(lane + j * tile.lanes, tile.size - 1)
                put(one, value(places[token], feature))
                for i in range(each):
                    at = i * features + j
                    put(results, results[at] + own[i] * one[0], at)

    def each_result(self, use: Callable[[Expr, Expr, Expr], None]) -> None:
        """Emit `use(row, feature, sum of weighted values)` for every result. All threads pass."""
        tile, t = self.tile, self.thread
        slice_, first, lane = self._mine()
        features, room = tile.features_each, self._staged[1]
        batch = math.prod(int(extent) for extent in room.shape) // tile.threads
        everything = range(tile.rows_each * features)
        for begin in range(0, len(everything), batch):
            part = everything[begin : begin + batch]
            if tile.slices > 1:
                meet()
                for i, at in enumerate(part):
                    put(room, self._results[at], i * tile.threads + t)
                meet()
            with T.If(slice_ == 0), T.Then():
                for i, at in enumerate(part):
                    if tile.slices > 1:
                        with T.serial(tile.slices - 1) as other:
                            apart = tile.threads // tile.slices
                            more = room[i * tile.threads + (other + 1) * apart + t]
                            put(self._results, self._results[at] + more, at)
                    feature = lane + at % features * tile.lanes
                    with T.If(feature < tile.size), T.Then():
                        use(first + at // features, feature, self._results[at])
