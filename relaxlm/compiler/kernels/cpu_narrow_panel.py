"""packed x @ W.T for many rows of x on CPUs without AVX-512: lanes across rows of W.

A task takes the outputs of a few vectors of rows of W, a block of K at a time. It takes the codes
apart once, into a panel that stays in the first cache: a word is four codes of one row of W, a
vector the same four of several rows. Then every tile of rows of x is multiplied with the panel, a
word of x at a time in all lanes, and scaled once per group of 32.
"""

from collections.abc import Iterator, Sequence

from tvm import tirx
from tvm.ir import Expr

from relaxlm.compiler.kernels.builder import T, scratch
from relaxlm.compiler.kernels.cpu_gemv import fetch
from relaxlm.compiler.kernels.cpu_narrow_dots import BLOCK, Dots, shuffle
from relaxlm.compiler.kernels.packed import GROUP_WORDS, ZERO_OF_4_BITS, PackedRow
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import multiply_add, splat, to_float32

# Groups of K in a panel: 16 KiB for 16 rows of W.
DEPTH = 32
LINE_WORDS = 16
# Bytes of a block of lanes within which shuffles are one instruction, on x86 and on ARM.
SHUFFLED = 16
NIBBLES = 0x0F0F0F0F


class Panel:
    """The kernel for any number of rows.

    Args:
        vectors: of rows of W that a task takes, at most.
        tile: rows of x that are multiplied together, a power of two.
    """

    def __init__(self, matrix: StoredMatrix, dots: Dots, vectors: int, tile: int) -> None:
        assert matrix.quant is not None
        self.matrix, self.dots, self.tile = matrix, dots, tile
        self.lanes, self.bits = dots.lanes, matrix.quant.bits
        self.start = dots.start(matrix.quant.max_int)
        self.vectors = max(1, min(vectors, matrix.n // self.lanes))
        self.wide = self.vectors * self.lanes
        # Less than DEPTH if otherwise too little was left for the last block.
        self.depth = next(
            depth
            for depth in range(min(DEPTH, matrix.groups), 0, -1)
            if (matrix.groups % depth or depth) >= min(matrix.groups, self.lanes)
        )
        self.k_blocks = -(-matrix.groups // self.depth)
        self.place = PackedRow(matrix.k)

    def emit(
        self,
        m: Expr,
        packed: tirx.Buffer,
        words: tirx.Buffer,
        scales: tirx.Buffer,
        out: tirx.Buffer,
    ) -> None:
        """`words` and `scales` are views with one axis."""
        wide = self.wide
        with T.parallel((self.matrix.n + wide - 1) // wide) as task:
            panel = scratch(self.depth * GROUP_WORDS * wide, "int32")
            factors = scratch(self.depth * self.vectors * self.lanes, "float32")
            # Sums between blocks of K. Not in `out`: the last tasks may overlap.
            carried = scratch((m + 1) * wide, "float32") if self.k_blocks > 1 else None
            with T.serial(self.k_blocks) as block:
                self._fill(words, task, block, panel)
                self._fill_factors(scales, task, block, factors)
                for first, rows in self._each_tile(m):
                    self._multiply(
                        packed, words, task, block, first, rows, panel, factors, carried, out
                    )

    def _each_tile(self, m: Expr) -> Iterator[tuple[Expr, int]]:
        """The first row of x of a tile, and how many: whole tiles, then halves of them."""
        with T.serial(m // self.tile) as number:
            yield number * self.tile, self.tile
        rows = self.tile // 2
        while rows:
            with T.If(T.bitwise_and(m, T.int64(rows)) > 0), T.Then():
                yield m // (2 * rows) * (2 * rows), rows
            rows //= 2

    def _count(self, block: Expr) -> Expr | int:
        """The groups of a block."""
        groups, depth = self.matrix.groups, self.depth
        return depth if groups % depth == 0 else T.min(depth, groups - block * depth)

    def _row(self, task: Expr, v: int, lane: int) -> Expr:
        """The row of W in a lane, int64."""
        n = self.matrix.n
        if n < self.lanes:
            return T.int64(min(lane, n - 1))
        first = T.min(task * self.wide, n - self.wide) if n % self.wide else task * self.wide
        return T.cast(first, "int64") + (v * self.lanes + lane)

    def _put(self, buffer: tirx.Buffer, at: Expr | int, value: Expr, lanes: int = 0) -> None:
        T.buffer_store(buffer, value, [T.ramp(at, 1, lanes or self.lanes)])

    def _transpose(self, source: tirx.Buffer, places: Sequence[Expr], dtype: str) -> tirx.Buffer:
        """A scratch [lanes * lanes] with the columns of the square whose rows are at `places`.

        Zipping row i with row i + block / 2 as often as halves can be taken transposes a block.
        """
        lanes = self.lanes
        block = min(lanes, SHUFFLED // (4 if dtype.endswith("32") else 2))

        def zipped(part: int) -> list[int]:
            """Lanes of two vectors in turn, from the first or second half of every block."""
            return [
                start + part * (block // 2) + i // 2 + i % 2 * lanes
                for start in range(0, lanes, block)
                for i in range(block)
            ]

        def vectors(buffer: tirx.Buffer, *rows: int) -> list[Expr]:
            return [buffer.vload([row * lanes], f"{dtype}x{lanes}") for row in rows]

        square = scratch(lanes * lanes, dtype)
        for row, place in enumerate(places):
            self._put(square, row * lanes, source.vload([place], f"{dtype}x{lanes}"))
        for _ in range(block.bit_length() - 1):
            before, square = square, scratch(lanes * lanes, dtype)
            for row in range(lanes):
                first = row // block * block + row % block // 2
                pair = vectors(before, first, first + block // 2)
                self._put(square, row * lanes, shuffle(pair, zipped(row % 2)))
        if block == lanes:
            return square
        # Row i has column i of its four rows in its first block, column 4 + i in its second.
        before, square = square, scratch(lanes * lanes, dtype)
        for column in range(lanes):
            pair = vectors(before, column % block, column % block + block)
            start = column // block * block
            picked = [start + i % block + i // block * lanes for i in range(lanes)]
            self._put(square, column * lanes, shuffle(pair, picked))
        return square

    def _gather(self, source: tirx.Buffer, places: Sequence[Expr], count: int) -> tirx.Buffer:
        """As `_transpose`, where rows have only `count` elements."""
        square = scratch(count * self.lanes, source.dtype)
        for row, place in enumerate(places):
            for column in range(count):
                T.buffer_store(square, source[place + column], [column * self.lanes + row])
        return square

    def _fill(self, words: tirx.Buffer, task: Expr, block: Expr, panel: tirx.Buffer) -> None:
        """Vectors of four codes, those of the even elements of a group before the odd ones."""
        group_words, count = self.matrix.group_words, self._count(block)
        # A square of words is one group or more; with 8-bit codes it may be half a group.
        together = max(1, self.lanes // group_words)
        size = min(self.lanes, self.matrix.words)
        with T.serial((count + together - 1) // together) as number:
            g = self._start(number, together, count)
            at = (block * self.depth + g) * group_words
            for v in range(self.vectors):
                for first in range(0, max(size, group_words), size):
                    places = [
                        self._row(task, v, lane) * self.matrix.words + at + first
                        for lane in range(self.lanes)
                    ]
                    if size < self.lanes:
                        square = self._gather(words, places, size)
                    else:
                        square = self._transpose(words, places, "uint32")
                    for i in range(0, size, min(size, group_words)):
                        group = g + i // group_words
                        self._take_apart(square, i, min(size, group_words), group, first, v, panel)

    def _start(self, number: Expr, together: int, count: Expr | int) -> Expr:
        """Where a step of several groups starts; the last does once more what was done."""
        if together == 1 or (self.matrix.groups % together == 0 and self.depth % together == 0):
            return number * together
        # A row shorter than a step starts at 0.
        return T.max(T.min(number * together, count - together), 0)

    def _take_apart(
        self,
        square: tirx.Buffer,
        at: int,
        count: int,
        g: Expr,
        first: int,
        v: int,
        panel: tirx.Buffer,
    ) -> None:
        """Store the codes of `count` vectors of words, from word `first` of a group on."""
        lanes = self.lanes

        def store(half: int, j: int, codes: Expr) -> None:
            place = ((g * GROUP_WORDS + half * BLOCK + j) * self.vectors + v) * lanes
            self._put(panel, place, self.dots.codes(T.reinterpret(self.dots.int32, codes)))

        def word(i: int) -> Expr:
            return square.vload([(at + i) * lanes], f"uint32x{lanes}")

        if self.bits == 4:
            for i in range(count):
                high = T.shift_right(word(i), T.broadcast(T.uint32(4), lanes))
                for half, codes in enumerate((word(i), high)):
                    low = T.bitwise_and(codes, T.broadcast(T.uint32(NIBBLES), lanes))
                    store(half, first + i, low)
            return
        for i in range(0, count, 2):
            both = [T.reinterpret(f"uint8x{4 * lanes}", word(i + part)) for part in range(2)]
            for half in range(2):
                picked = [
                    lane * 4 + part * 4 * lanes + byte + half
                    for lane in range(lanes)
                    for part in range(2)
                    for byte in (0, 2)
                ]
                store(half, (first + i) // 2, shuffle(both, picked))

    def _fetch_ahead(
        self, words: tirx.Buffer, task: Expr, block: Expr, number: Expr, g: Expr
    ) -> None:
        """Of what the next task reads, as much as a group of this one, in the order of addresses.

        The first tile of a block fetches all of it. The others fetch the last lines again, which
        costs less than to ask.
        """
        count = self._count(block)
        group = block * self.depth + T.min(number * count + g, count - 1)
        group_words = self.wide * self.matrix.group_words
        first = T.cast(task + 1, "int64") * (self.wide * self.matrix.words) + group * group_words
        for i in range(0, group_words, LINE_WORDS):
            fetch(T.address_of(words[first + i]))

    def _fill_factors(
        self, scales: tirx.Buffer, task: Expr, block: Expr, factors: tirx.Buffer
    ) -> None:
        lanes, groups, count = self.lanes, self.matrix.groups, self._count(block)
        together = lanes if groups >= lanes else 1
        with T.serial((count + together - 1) // together) as number:
            g = self._start(number, together, count)
            for v in range(self.vectors):
                places = [
                    self._row(task, v, lane) * groups + block * self.depth + g
                    for lane in range(lanes)
                ]
                if together == 1:
                    square = self._gather(scales, places, 1)
                else:
                    square = self._transpose(scales, places, self.matrix.dtype)
                for i in range(together):
                    value = square.vload([i * lanes], f"{self.matrix.dtype}x{lanes}")
                    at = ((g + i) * self.vectors + v) * lanes
                    self._put(factors, at, to_float32(value, lanes))

    def _multiply(
        self,
        packed: tirx.Buffer,
        words: tirx.Buffer,
        task: Expr,
        block: Expr,
        first: Expr,
        rows: int,
        panel: tirx.Buffer,
        factors: tirx.Buffer,
        carried: tirx.Buffer | None,
        out: tirx.Buffer,
    ) -> None:
        """A tile of rows of x from `first` on, and a block of K."""
        lanes, dots, float32 = self.lanes, self.dots, f"float32x{self.lanes}"
        tile = [(r, v) for r in range(rows) for v in range(self.vectors)]
        kind, width = dots.partial.split("x")[0], int(dots.partial.split("x")[1])
        sums, totals = scratch(len(tile) * lanes, "float32"), scratch(len(tile) * width, kind)

        def kept(r: int, v: int) -> Expr:
            return ((first + r) * self.vectors + v) * lanes

        for i, (r, v) in enumerate(tile):
            begin = splat(0.0, lanes)
            if carried is not None:
                begin = T.Select(block == 0, begin, carried.vload([kept(r, v)], float32))
            self._put(sums, i * lanes, begin)
        with T.serial(self._count(block)) as g:
            self._fetch_ahead(words, task, block, first // self.tile, g)
            self._add_group(
                packed, first, block * self.depth + g, g, tile, panel, factors, totals, sums
            )

        def store() -> None:
            for i, (r, v) in enumerate(tile):
                if self.matrix.n < lanes:
                    for lane in range(self.matrix.n):
                        T.buffer_store(out, sums[i * lanes + lane], [first + r, lane])
                else:
                    columns = T.ramp(T.cast(self._row(task, v, 0), "int32"), 1, lanes)
                    T.buffer_store(out, sums.vload([i * lanes], float32), [first + r, columns])

        if carried is None:
            store()
            return
        with T.If(block < self.k_blocks - 1):
            with T.Then():
                for i, (r, v) in enumerate(tile):
                    self._put(carried, kept(r, v), sums.vload([i * lanes], float32))
            with T.Else():
                store()

    def _add_group(
        self,
        packed: tirx.Buffer,
        first: Expr,
        group: Expr,
        g: Expr,
        tile: Sequence[tuple[int, int]],
        panel: tirx.Buffer,
        factors: tirx.Buffer,
        totals: tirx.Buffer,
        sums: tirx.Buffer,
    ) -> None:
        """Group `group` of K, the g-th of the panel, for a tile."""
        lanes, dots, float32 = self.lanes, self.dots, f"float32x{self.lanes}"
        width = int(dots.partial.split("x")[1])
        starts_with = dots.partial == dots.int32

        def start(r: int) -> Expr:
            if self.start == -ZERO_OF_4_BITS:
                return T.broadcast(packed[first + r, self.place.starts + group], lanes)
            return T.broadcast(packed[first + r, self.place.sums + group] * self.start, lanes)

        for i, (r, _) in enumerate(tile):
            self._put(totals, i * width, start(r) if starts_with else dots.nothing(), width)
        for j in range(GROUP_WORDS):
            for i, (r, v) in enumerate(tile):
                at = ((g * GROUP_WORDS + j) * self.vectors + v) * lanes
                x = dots.word(packed, first + r, group * GROUP_WORDS, j)
                before = totals.vload([i * width], dots.partial)
                after = dots.add(before, panel.vload([at], dots.int32), x)
                self._put(totals, i * width, dots.in_turn(after), width)
        for i, (r, v) in enumerate(tile):
            total = dots.finish(totals.vload([i * width], dots.partial))
            if not starts_with:
                total = total + start(r)
            bits = packed[first + r, self.place.scales + group]
            factor = factors.vload([(g * self.vectors + v) * lanes], float32)
            both = factor * splat(T.reinterpret("float32", bits), lanes)
            before = sums.vload([i * lanes], float32)
            self._put(sums, i * lanes, multiply_add(T.cast(total, float32), both, before))
