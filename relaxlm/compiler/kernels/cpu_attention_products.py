"""The two matrix products of attention for a block of query rows against a round of pages.

    scores[r, t] = q[r] . k[t]            sums[r] += weights[r] . v

Keys and values are first copied from the pages into panels that many rows share. `Products` says
how q, panels and weights look in memory; one version per kind of instruction:

    Exact   float32 multiply-adds; any CPU
    Pairs   q, keys, values and weights rounded to bfloat16, products of pairs (AVX-512 BF16)
    tiles   the same numbers in AMX tiles: cpu_attention_tiles.py
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import scratch
from relaxlm.compiler.kernels.cpu_attention_pages import PAGES, Round
from relaxlm.compiler.kernels.vector import multiply_add, splat, vector

_ROUND = "@llvm.x86.avx512bf16.cvtne2ps2bf16.512"
# Instructions of AVX-512 BF16 behind names that TIR can call: TVM itself computes in float32
# wherever it sees its type bfloat16. `pairs`: a[i] in the low half of word i, b[i] in the high one.
BFLOAT16_IR = f"""
define <16 x i32> @relaxlm_bfloat16_row(<16 x float> %a, <16 x float> %b) alwaysinline nounwind {{
  %both = call <32 x bfloat> {_ROUND}(<16 x float> %b, <16 x float> %a)
  %words = bitcast <32 x bfloat> %both to <16 x i32>
  ret <16 x i32> %words
}}
define <16 x i32> @relaxlm_bfloat16_pairs(<16 x float> %a, <16 x float> %b) alwaysinline nounwind {{
  %both = call <32 x bfloat> {_ROUND}(<16 x float> %b, <16 x float> %a)
  %woven = shufflevector <32 x bfloat> %both, <32 x bfloat> poison, <32 x i32> <WOVEN>
  %words = bitcast <32 x bfloat> %woven to <16 x i32>
  ret <16 x i32> %words
}}
define <16 x float> @relaxlm_bfloat16_dot(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b)
    alwaysinline nounwind {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
declare <32 x bfloat> {_ROUND}(<16 x float>, <16 x float>)
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
""".replace("WOVEN", ", ".join(f"i32 {half * 16 + i}" for i in range(16) for half in range(2)))


def span(start: Expr, lanes: int) -> Expr:
    """The index of `lanes` neighbours."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def put(buffer: tirx.Buffer, at: Expr, value: Expr, lanes: int) -> None:
    T.buffer_store(buffer, value, [span(at, lanes)])


def get(buffer: tirx.Buffer, at: Expr, lanes: int, dtype: str = "float32") -> Expr:
    return buffer.vload([at], vector(dtype, lanes))


class Products(Protocol):
    """One way to multiply; the methods but `scratch_bytes` and `declare` emit statements.

    Attributes:
        rows: query rows of a block.
        imports: LLVM IR that the kernel needs.
        exact: whether weights are used as float32.
        slots: blocks whose scores and weights are kept at a time: 2 if products and exponentials
            of different blocks can overlap, else 1.
        gather_steps: what `gather` is cut into.
        scores: [slots, rows, PAGES * page], once declared.
    """

    rows: int
    imports: Sequence[str]
    exact: bool
    slots: int
    gather_steps: int
    scores: tirx.Buffer

    def scratch_bytes(self, rows: int) -> int:
        """What a task with so many rows keeps, `declare`'s buffers and the scores."""

    def declare(self, rows: int) -> None:
        """Declare the buffers of a task with so many rows."""

    def begin(self) -> None:
        """Once per task, before any product."""

    def end(self) -> None:
        """Once per task, after all."""

    def put_query(self, row: Expr, element) -> None:
        """`element(i, lanes)`: elements i .. i + lanes of a row of q, float32."""

    def fill(self, pages: Round, page: Expr) -> None:
        """Copy a page and the next one of a round into the panels."""

    def score(self, first: Expr, pair: Expr, slot: Expr | int) -> None:
        """Rows first .. first + rows against a pair of the round's pages, into `scores`."""

    def score_at(self, row: Expr, page: Expr) -> Expr:
        """Where in `scores` a row, slot * rows + row of the block, has its scores of a page."""

    def put_weights(self, pages: Round, row: Expr, pair: Expr, weights: list[Expr]) -> None:
        """What the tokens of a pair of pages count for a row, as in `score_at`."""

    def gather(
        self, first: Expr, pairs: Expr, step: Expr, slot: Expr | int, sums: tirx.Buffer
    ) -> None:
        """Add the weighted values of some pairs of pages to a part of `sums` [rows, dim]."""


class Accumulators:
    """Sums in registers: vectors of `lanes` for each of `rows`, `wide` of them."""

    def __init__(self, rows: int, wide: int, lanes: int) -> None:
        self.rows, self.lanes = rows, lanes
        # Loops over rows are unrolled late: TVM takes long over as many statements.
        self.vectors = [scratch(rows * lanes, "float32") for _ in range(wide)]

    def start(self, value: Callable[[Expr, int], Expr]) -> None:
        for c, total in enumerate(self.vectors):
            with T.unroll(self.rows) as r:
                put(total, r * self.lanes, value(r, c), self.lanes)

    def add(self, sum_of: Callable[[Expr, int, Expr], Expr]) -> None:
        """Replace every sum by `sum_of(row, vector, sum)`."""
        # Row by row: what a row brings fits into one register, what the vectors share into a few.
        with T.unroll(self.rows) as r:
            for c, total in enumerate(self.vectors):
                at = r * self.lanes
                put(total, at, sum_of(r, c, get(total, at, self.lanes)), self.lanes)

    def finish(self, out: tirx.Buffer, place: Callable[[Expr, int], Expr]) -> None:
        for c, total in enumerate(self.vectors):
            with T.unroll(self.rows) as r:
                put(out, place(r, c), get(total, r * self.lanes, self.lanes), self.lanes)


class InRegisters(ABC):
    """Products whose sums are vectors: blocks of rows times two vectors, one behind the other.

    `wide` pages, or vectors of features, are summed side by side.
    """

    words: str  # dtype of an operand's words
    depth: int  # features, or tokens, per word of an operand
    imports: Sequence[str]
    exact: bool
    slots = 1
    scores: tirx.Buffer

    @abstractmethod
    def put_query(self, row: Expr, element) -> None: ...

    @abstractmethod
    def fill(self, pages: Round, page: Expr) -> None: ...

    @abstractmethod
    def put_weights(self, pages: Round, row: Expr, pair: Expr, weights: list[Expr]) -> None: ...

    def __init__(self, shape: AttentionShape, rows: int, wide: int) -> None:
        self.dim, self.page, self.rows = shape.head_dim, shape.page_size, rows
        self.wide = wide
        self.lanes = math.gcd(self.dim, 16)
        self.width = PAGES * self.page
        parts = self.dim // self.lanes
        self.parts_beside = wide if parts % wide == 0 else 1
        self.gather_steps = parts // self.parts_beside

    def scratch_bytes(self, rows: int) -> int:
        scores = self.slots * self.rows * self.width
        operands = rows * self.dim + 2 * self.width * self.dim + (scores if self.depth > 1 else 0)
        return 4 * (operands // self.depth + scores)

    def declare(self, rows: int) -> None:
        self.q = scratch(rows * self.dim // self.depth, self.words)
        self.k = scratch(self.width * self.dim // self.depth, self.words)
        self.v = scratch(self.width * self.dim // self.depth, self.words)
        self.scores = scratch(self.slots * self.rows * self.width, "float32")
        self.weights = self.scores
        if self.depth > 1:
            size = self.slots * self.rows * self.width // self.depth
            self.weights = scratch(size, self.words)

    def begin(self) -> None:  # noqa: B027  only tiles have something to prepare
        """Nothing to prepare."""

    def end(self) -> None:  # noqa: B027
        """Nothing to give back."""

    def score_at(self, row: Expr, page: Expr) -> Expr:
        return row * self.width + page * self.page

    @abstractmethod
    def dot(self, total: Expr, factor: Expr, panel: Expr, lanes: int) -> Expr:
        """total [lanes] + one word of q or weights times a vector of the panel's words."""

    def score(self, first: Expr, pair: Expr, slot: Expr | int) -> None:
        page, words = self.page, self.dim // self.depth
        with T.serial(2 // self.wide) as group:
            at_page = 2 * pair + group * self.wide
            sums = Accumulators(self.rows, self.wide, page)
            sums.start(lambda r, c: splat(0.0, page))
            with T.serial(words) as d:

                def product(r: Expr, c: int, total: Expr) -> Expr:
                    key = get(self.k, ((at_page + c) * words + d) * page, page, self.words)
                    return self.dot(total, self.q[(first + r) * words + d], key, page)

                sums.add(product)
            start = slot * self.rows
            sums.finish(self.scores, lambda r, c: self.score_at(start + r, at_page + c))

    def gather(
        self, first: Expr, pairs: Expr, step: Expr, slot: Expr | int, sums: tirx.Buffer
    ) -> None:
        lanes, tokens = self.lanes, 2 * self.page // self.depth
        width, start = self.width // self.depth, slot * self.rows
        totals = Accumulators(self.rows, self.parts_beside, lanes)

        def feature(p: int) -> Expr:
            return (step * self.parts_beside + p) * lanes

        def place(r: Expr, p: int) -> Expr:
            return (first + r) * self.dim + feature(p)

        totals.start(lambda r, p: get(sums, place(r, p), lanes))
        with T.serial(pairs * tokens) as t:

            def product(r: Expr, p: int, total: Expr) -> Expr:
                value = get(self.v, t * self.dim + feature(p), lanes, self.words)
                return self.dot(total, self.weights[(start + r) * width + t], value, lanes)

            totals.add(product)
        totals.finish(sums, place)


class Exact(InRegisters):
    """Panels k [PAGES, dim, page] and v [PAGES, page, dim] in float32; weights replace scores."""

    words, depth, exact = "float32", 1, True
    imports: Sequence[str] = ()

    def put_query(self, row: Expr, element) -> None:
        with T.serial(self.dim // self.lanes) as i:
            value = element(i * self.lanes, self.lanes)
            put(self.q, row * self.dim + i * self.lanes, value, self.lanes)

    def fill(self, pages: Round, page: Expr) -> None:
        lanes, loops = self.lanes, self.dim // self.lanes
        with T.serial(2) as half:
            pages.stage(page + half)
            with T.serial(self.dim) as d:
                pages.prefetch_values(page + half, d, self.dim)
                key = pages.times_key_scale(pages.keys(page + half, d), page + half)
                put(self.k, ((page + half) * self.dim + d) * self.page, key, self.page)
            with T.serial(self.page) as t, T.serial(loops) as i:
                following = page + half + 1
                pages.prefetch_keys(following, t * loops + i, self.page * loops)
                value = pages.values(page + half, t, i * lanes, lanes)
                value = pages.times_token_scale(value, page + half, t, lanes)
                at = ((page + half) * self.page + t) * self.dim + i * lanes
                put(self.v, at, value, lanes)

    def put_weights(self, pages: Round, row: Expr, pair: Expr, weights: list[Expr]) -> None:
        for half, weight in enumerate(weights):
            put(self.scores, self.score_at(row, 2 * pair + half), weight, self.page)

    def dot(self, total: Expr, factor: Expr, panel: Expr, lanes: int) -> Expr:
        return multiply_add(splat(factor, lanes), panel, total)


@dataclass(frozen=True)
class Bfloat16:
    """How operands are rounded and where they lie, for products of pairs.

    q and weights are rows of pairs, as they come. A pair of neighbouring features of a page's keys,
    or of neighbouring tokens' values, makes 16 words: k [PAGES, dim / 2, 16 tokens] and
    v [PAGES / 2, token pair, dim] or, in tiles, [PAGES / 2, dim / 16, token pair, 16].
    """

    dim: int
    page: int
    tiled: bool

    def call(self, name: str, a: Expr, b: Expr) -> Expr:
        return T.call_pure_extern("int32x16", f"relaxlm_bfloat16_{name}", a, b)

    def put_query(self, q: tirx.Buffer, row: Expr, element) -> None:
        with T.serial(self.dim // 32) as i:
            words = self.call("row", element(i * 32, 16), element(i * 32 + 16, 16))
            put(q, row * (self.dim // 2) + i * 16, words, 16)

    def fill(self, k: tirx.Buffer, v: tirx.Buffer, pages: Round, page: Expr) -> None:
        """A page and the next one, which share token pairs' panels."""
        page_size, steps = self.page, self.dim // 2
        for half in range(2):
            at_page = page + half
            pages.stage(at_page)
            with T.serial(steps) as d:
                pages.prefetch_values(at_page, d, steps)
                words = self.call(
                    "pairs",
                    *(
                        pages.times_key_scale(pages.keys(at_page, 2 * d + i), at_page)
                        for i in range(2)
                    ),
                )
                put(k, (at_page * steps + d) * page_size, words, 16)
            loops = self.dim // 16
            with T.serial(page_size // 2) as t, T.serial(loops) as i:
                pages.prefetch_keys(at_page + 1, t * loops + i, page_size // 2 * loops)
                tokens = [
                    pages.times_token_scale(
                        pages.values(at_page, 2 * t + j, i * 16, 16), at_page, 2 * t + j, 16
                    )
                    for j in range(2)
                ]
                token = half * (page_size // 2) + t
                at = i * page_size + token if self.tiled else token * loops + i
                at = (page // 2 * (page_size * loops) + at) * 16
                put(v, at, self.call("pairs", *tokens), 16)


class Pairs(InRegisters):
    """Products of pairs of bfloat16 numbers, 16 sums an instruction."""

    words, depth, exact = "int32", 2, False
    imports: Sequence[str] = (BFLOAT16_IR,)

    def __init__(self, shape: AttentionShape, rows: int, wide: int) -> None:
        super().__init__(shape, rows, wide)
        self.operands = Bfloat16(self.dim, self.page, tiled=False)

    def put_query(self, row: Expr, element) -> None:
        self.operands.put_query(self.q, row, element)

    def fill(self, pages: Round, page: Expr) -> None:
        self.operands.fill(self.k, self.v, pages, page)

    def put_weights(self, pages: Round, row: Expr, pair: Expr, weights: list[Expr]) -> None:
        at = row * (self.width // 2) + pair * self.page
        put(self.weights, at, self.operands.call("row", *weights), 16)

    def dot(self, total: Expr, factor: Expr, panel: Expr, lanes: int) -> Expr:
        return T.call_pure_extern(
            "float32x16", "relaxlm_bfloat16_dot", total, T.broadcast(factor, 16), panel
        )
