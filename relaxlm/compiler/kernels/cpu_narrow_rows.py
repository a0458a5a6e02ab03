"""packed x @ W.T for one to four rows of x, on CPUs without AVX-512: lanes along a row of W.

A step takes four vectors of words of a row of W, which are as many groups of 32 as a vector has
lanes. Every vector gives two of codes: with 4 bits the even and the odd elements, with 8 bits the
first and the second half of a group. What the four vectors' dot products come to is folded into
one vector with a sum per group, so scales are multiplied once per step. x is brought into the order
of these vectors before the loop over rows of W. Memory is fetched ahead in the order of addresses.

Kernels that have to be invariant multiply more rows in the same way, four after four.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr

from relaxlm.compiler.kernels import tuning
from relaxlm.compiler.kernels.builder import T, scratch
from relaxlm.compiler.kernels.cpu_gemv import fetch
from relaxlm.compiler.kernels.cpu_narrow_dots import BLOCK, Dots, shuffle
from relaxlm.compiler.kernels.packed import GROUP_WORDS, PackedRow
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import multiply_add, reduce_sum, splat, to_float32

VECTORS = 4
LINE = 64
# Of more rows than a kernel's, those that a row of W meets while it is in the cache.
MANY = 64


@dataclass(frozen=True)
class Step:
    """Groups of a row that are multiplied together.

    Attributes:
        number: of the step in its row.
        group: the first one.
        count: how many; as many as lanes, but fewer at the end of a row.
    """

    number: Expr | int
    group: Expr | int
    count: int


@dataclass(frozen=True)
class _Rows:
    """Rows of x in the order of the dot products, by steps.

    Attributes:
        codes: [row, step, vector, half, lane]
        factors, starts: [row, step, lane]
    """

    codes: tirx.Buffer
    factors: tirx.Buffer
    starts: tirx.Buffer


def lanes_for(matrix: StoredMatrix, widest: int) -> int:
    """Lanes of the vectors for a matrix: a row should be a step at least."""
    return widest if matrix.groups >= widest else BLOCK


class FewRows:
    """The kernel for 1 <= m <= `rows`.

    Args:
        dots: with `lanes_for(matrix, ...)` lanes.
    """

    def __init__(self, matrix: StoredMatrix, dots: Dots, rows: int) -> None:
        assert matrix.quant is not None
        self.matrix, self.dots, self.rows = matrix, dots, rows
        self.lanes, self.bits = dots.lanes, matrix.quant.bits
        self.start = dots.start(matrix.quant.max_int)
        self.blocks = self.lanes // BLOCK
        self.whole, self.rest = divmod(matrix.groups, self.lanes)
        self.steps = self.whole + (self.rest > 0)

    def emit(
        self,
        m: Expr,
        packed: tirx.Buffer,
        words: tirx.Buffer,
        scales: tirx.Buffer,
        out: tirx.Buffer,
    ) -> None:
        """`words` and `scales` are views with one axis."""
        x = self._scratch(self.rows)
        with T.serial(self.rows) as row:
            for step in self._each_step():
                self._reorder(packed, row, T.min(row, m - 1), step, x)
        with T.parallel(self.matrix.n) as task:
            self._multiply(words, scales, task, x, 0, lambda row: T.min(row, m - 1), out)

    def emit_many(
        self,
        m: Expr,
        packed: tirx.Buffer,
        words: tirx.Buffer,
        scales: tirx.Buffer,
        out: tirx.Buffer,
    ) -> None:
        """For any number of rows: to each the same is done as by `emit`."""
        x = self._scratch(MANY)
        with T.serial((m + MANY - 1) // MANY) as number:
            start = number * MANY
            tiles = (T.min(m - start, MANY) + self.rows - 1) // self.rows

            def source(row: Expr) -> Expr:
                # Rows beyond the last repeat it, and write the same result.
                return T.min(start + row, m - 1)

            with T.parallel(tiles * self.rows) as row:
                for step in self._each_step():
                    self._reorder(packed, row, source(row), step, x)
            with T.parallel(self.matrix.n) as task, T.serial(tiles) as tile:
                first = tile * self.rows
                self._multiply(words, scales, task, x, first, lambda row: source(first + row), out)

    def _scratch(self, rows: int) -> "_Rows":
        size = rows * self.steps * self.lanes
        codes = scratch(size * 2 * VECTORS, "int32")
        return _Rows(codes, scratch(size, "float32"), scratch(size, "int32"))

    def _multiply(
        self,
        words: tirx.Buffer,
        scales: tirx.Buffer,
        task: Expr,
        x: "_Rows",
        first: Expr | int,
        place: Callable[[int], Expr],
        out: tirx.Buffer,
    ) -> None:
        """A row of W times rows of x from `first` on, of which the i-th is row place(i)."""
        sums = scratch(self.rows * self.lanes, "float32")
        for row in range(self.rows):
            self._put(sums, row * self.lanes, splat(0.0, self.lanes))
        for step in self._each_step():
            self._add_step(words, scales, task, step, x, first, sums)
        for row in range(self.rows):
            total = reduce_sum(sums.vload([row * self.lanes], f"float32x{self.lanes}"), self.lanes)
            T.buffer_store(out, total, [place(row), task])

    def _each_step(self) -> Iterator[Step]:
        if self.whole:
            with T.serial(self.whole) as number:
                yield Step(number, number * self.lanes, self.lanes)
        if self.rest:
            yield Step(self.whole, self.whole * self.lanes, self.rest)

    def _vectors(self, step: Step) -> int:
        return -(-step.count // self.blocks)

    def _lane_groups(self) -> list[int]:
        """Which group of a step a lane of folded sums belongs to."""
        return [v * self.blocks + b for b in range(self.blocks) for v in range(VECTORS)]

    def _place(self, row: Expr | int, step: Step, v: int = 0, half: int = 0) -> Expr | int:
        return (((row * self.steps + step.number) * VECTORS + v) * 2 + half) * self.lanes

    def _put(self, buffer: tirx.Buffer, at: Expr | int, value: Expr, lanes: int = 0) -> None:
        T.buffer_store(buffer, value, [T.ramp(at, 1, lanes or self.lanes)])

    def _reorder(
        self, packed: tirx.Buffer, row: Expr, source: Expr, step: Step, x: "_Rows"
    ) -> None:
        """One step of x: vectors that meet those of codes, scales and starts in the order of sums.

        Beyond the last group, packed rows have groups of zeros up to a multiple of four.
        """
        place = PackedRow(self.matrix.k)
        for v in range(self._vectors(step)):
            for b in range(self.blocks):
                at = (step.group + v * self.blocks + b) * GROUP_WORDS
                even, odd = (
                    packed.vload([source, at + half * BLOCK], "int32x4") for half in (0, 1)
                )
                if self.bits == 8:
                    even, odd = self._in_order(even, odd)
                for half, part in enumerate((even, odd)):
                    self._put(x.codes, self._place(row, step, v, half) + b * BLOCK, part, BLOCK)
        at = (row * self.steps + step.number) * self.lanes
        for lane, group in enumerate(self._lane_groups()):
            # Lanes without a group add nothing, with any scale.
            there = min(group, step.count - 1)
            bits = packed[source, place.scales + step.group + there]
            T.buffer_store(x.factors, T.reinterpret("float32", bits), [at + lane])
            total = packed[source, place.sums + step.group + there] * self.start
            T.buffer_store(x.starts, total if group == there else 0, [at + lane])

    @staticmethod
    def _in_order(even: Expr, odd: Expr) -> tuple[Expr, Expr]:
        """The bytes of a group's even and odd elements as those of its first and second half."""
        both = [T.reinterpret("int8x16", part) for part in (even, odd)]
        mixed = [[lane // 2 + lane % 2 * 16 + half * 8 for lane in range(16)] for half in (0, 1)]
        first, second = (T.reinterpret("int32x4", shuffle(both, lanes)) for lanes in mixed)
        return first, second

    def _add_step(
        self,
        words: tirx.Buffer,
        scales: tirx.Buffer,
        task: Expr,
        step: Step,
        x: "_Rows",
        start: Expr | int,
        sums: tirx.Buffer,
    ) -> None:
        lanes, group_words = self.lanes, self.matrix.group_words
        weights = scratch(VECTORS * 2 * lanes, "int32")
        factor = scratch(lanes, "float32")
        first = task * self.matrix.words + step.group * group_words
        for word in range(0, step.count * group_words, LINE // 4):
            fetch(T.address_of(words[first + (word + tuning.current().ahead // 4)]))
        for v in range(self._vectors(step)):
            for half, part in enumerate(self._halves(words, first, step, v)):
                self._put(weights, (v * 2 + half) * lanes, self.dots.codes(part))
        self._put(factor, 0, self._scales(scales, task, step))
        for row in range(self.rows):
            totals = []
            for v in range(VECTORS):
                total = self.dots.nothing()
                for half in range(2) if v < self._vectors(step) else ():
                    code = weights.vload([(v * 2 + half) * lanes], self.dots.int32)
                    place = self._place(start + row, step, v, half)
                    other = x.codes.vload([place], self.dots.int32)
                    total = self.dots.add(total, code, other)
                totals.append(total)
            at = ((start + row) * self.steps + step.number) * lanes
            total = self.dots.fold(totals) + x.starts.vload([at], self.dots.int32)
            x_factor = x.factors.vload([at], f"float32x{lanes}")
            both = factor.vload([0], f"float32x{lanes}") * x_factor
            before = sums.vload([row * lanes], f"float32x{lanes}")
            total = multiply_add(T.cast(total, f"float32x{lanes}"), both, before)
            self._put(sums, row * lanes, total)

    def _halves(self, words: tirx.Buffer, first: Expr, step: Step, v: int) -> tuple[Expr, Expr]:
        """The two vectors of codes of vector v, as bytes in int32."""
        count = min(self.blocks, step.count - v * self.blocks)
        at = first + v * self.blocks * self.matrix.group_words

        def load(offset: int, stride: int) -> Expr:
            parts = [at + offset + min(b, count - 1) * stride for b in range(self.blocks)]
            if stride == BLOCK and count == self.blocks:
                return words.vload([parts[0]], f"uint32x{self.lanes}")
            blocks = [words.vload([part], "uint32x4") for part in parts]
            return blocks[0] if self.blocks == 1 else shuffle(blocks, range(self.lanes))

        if self.bits == 8:
            first_half, second_half = load(0, 2 * BLOCK), load(BLOCK, 2 * BLOCK)
        else:
            word, mask = load(0, BLOCK), T.broadcast(T.uint32(0x0F0F0F0F), self.lanes)
            first_half = T.bitwise_and(word, mask)
            shifted = T.shift_right(word, T.broadcast(T.uint32(4), self.lanes))
            second_half = T.bitwise_and(shifted, mask)
        return T.reinterpret(self.dots.int32, first_half), T.reinterpret(
            self.dots.int32, second_half
        )

    def _scales(self, scales: tirx.Buffer, task: Expr, step: Step) -> Expr:
        """Of the weights, in the order of folded sums, float32."""
        lanes, at = self.lanes, task * self.matrix.groups + step.group
        order = [min(group, step.count - 1) for group in self._lane_groups()]
        if step.count < lanes and self.matrix.groups < lanes:
            values = [T.cast(scales[at + group], "float32") for group in order]
            return shuffle(values, range(lanes))
        # The last step reads scales that end with the row.
        missing = lanes - step.count
        values = to_float32(scales.vload([at - missing], f"{self.matrix.dtype}x{lanes}"), lanes)
        places = [group + missing for group in order]
        return values if places == list(range(lanes)) else shuffle([values], places)
