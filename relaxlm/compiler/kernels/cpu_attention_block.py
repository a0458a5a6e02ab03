"""The inner loops of CPU attention: a block of query rows against a few pages, in registers.

    scores[r, t] = q[r] . k[t]          `score`
    weights and their sums              `soften`: an online softmax (Milakov and Gimelshein 2018,
                                        arXiv:1805.02867)
    sums[r] = sums[r] * f[r] + w[r] . v `gather`

Where the keys and values come from is a `Source`: the pages themselves, or a copy of them in
float32 that many rows share.
"""

import math
import operator
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.cpu_float8 import decode_e4m3
from relaxlm.compiler.kernels.vector import (
    exp2,
    multiply_add,
    reduce_max,
    reduce_sum,
    splat,
    to_float32,
    vector,
)
from relaxlm.quantization.kv_cache import KVFormat

# Below any real score, but finite: a page of masked tokens must not give inf - inf.
MASKED = -1e30
# Pages per round of the online softmax: a power of two.
PAGES = 8


@dataclass(frozen=True)
class Block:
    """The sizes of a block.

    Attributes:
        rows: query rows whose sums are in registers at once.
        dim, page: features of a head, tokens of a page.
    """

    rows: int
    dim: int
    page: int

    @property
    def width(self) -> int:
        """Tokens per round."""
        return PAGES * self.page

    @property
    def lanes(self) -> int:
        """Of the vectors along a head's features."""
        return math.gcd(self.dim, 16)

    @property
    def pages_at_once(self) -> int:
        """Pages whose scores are summed side by side: few rows alone would leave units idle."""
        return 4 if self.rows <= 3 else 2 if self.rows <= 6 else 1

    @property
    def parts_at_once(self) -> int:
        """Vectors of features that are summed side by side, for the same reason."""
        parts = self.dim // self.lanes
        return next(n for n in (4, 2, 1) if n <= self.pages_at_once and parts % n == 0)

    def part(self, index: Expr) -> Expr:
        """The index of a vector of features."""
        return T.ramp(index, 1, self.lanes) if self.lanes > 1 else index


class Source(Protocol):
    """Keys and values of one KV head in a round of `PAGES` pages."""

    def keys(self, page: Expr, feature: Expr) -> Expr:
        """One feature of all tokens of a page: float32 [page]."""

    def key_scale(self, page: Expr) -> Expr | None:
        """What the scores of a page's tokens are to be multiplied with: float32 [page]."""

    def values(self, page: Expr, token: Expr, feature: Expr, lanes: int) -> Expr:
        """Neighbouring features of a token: float32 [lanes]."""

    def value_scale(self, page: Expr) -> Expr | None:
        """What the weights of a page's tokens are to be multiplied with: float32 [page]."""


@dataclass(frozen=True)
class Pages:
    """Keys and values as the cache stores them: `block(i)` is the number of the round's page i."""

    format: KVFormat
    page: int
    block: tirx.Buffer  # [PAGES] int32
    head: Expr
    k: tirx.Buffer
    v: tirx.Buffer
    k_scales: tirx.Buffer
    v_scales: tirx.Buffer

    def _stored(self, pages: tirx.Buffer, index: list, lanes: int) -> Expr:
        if self.format.scaled:
            return decode_e4m3(pages.vload(index, vector("uint8", lanes)), lanes)
        return to_float32(pages.vload(index, vector(self.format.dtype, lanes)), lanes)

    def _place(self, page: Expr) -> list:
        # 64 bits: a cache may hold more than 2**31 elements.
        return [T.cast(self.block[page], "int64"), self.head]

    def keys(self, page: Expr, feature: Expr) -> Expr:
        return self._stored(self.k, [*self._place(page), feature, 0], self.page)

    def values(self, page: Expr, token: Expr, feature: Expr, lanes: int) -> Expr:
        return self._stored(self.v, [*self._place(page), token, feature], lanes)

    def _scale(self, scales: tirx.Buffer, page: Expr) -> Expr | None:
        if not self.format.scaled:
            return None
        return scales.vload([*self._place(page), 0], vector("float32", self.page))

    def key_scale(self, page: Expr) -> Expr | None:
        return self._scale(self.k_scales, page)

    def value_scale(self, page: Expr) -> Expr | None:
        return self._scale(self.v_scales, page)

    def prefetch(self, page: Expr, feature: Expr) -> Expr:
        """Ask for the value page while its key page is read, at the same pace."""
        # [dim, page] and [page, dim] have the same size.
        place = feature * self.page
        dim = self.k.shape[2]
        return prefetch_line(self.v[(*self._place(page), place // dim, place % dim)])

    def token_scale(self, page: Expr, token: Expr, lanes: int) -> Expr | None:
        """The value's scale of one token in every lane."""
        if not self.format.scaled:
            return None
        return splat(self.v_scales[(*self._place(page), token)], lanes)


@dataclass(frozen=True)
class Panel:
    """Keys [PAGES, dim, page] and values [PAGES, page, dim] in float32, scales multiplied in."""

    block: Block
    k: tirx.Buffer
    v: tirx.Buffer

    def keys(self, page: Expr, feature: Expr) -> Expr:
        size = self.block.page
        return self.k.vload([(page * self.block.dim + feature) * size], vector("float32", size))

    def values(self, page: Expr, token: Expr, feature: Expr, lanes: int) -> Expr:
        row = page * self.block.page + token
        return self.v.vload([row * self.block.dim + feature], vector("float32", lanes))

    def key_scale(self, page: Expr) -> Expr | None:
        return None

    def value_scale(self, page: Expr) -> Expr | None:
        return None


def prefetch_line(element: Expr) -> Expr:
    """Load the cache line of an element, without waiting for it."""
    return T.call_llvm_intrin(
        T.llvm_lookup_intrinsic_id("llvm.prefetch"),
        T.address_of(element),
        T.int32(0),
        T.int32(3),
        T.int32(1),
        dtype="void",
    )


def times(value: Expr, scale: Expr | None) -> Expr:
    return value if scale is None else value * scale


def loops(block: Block, visible):
    """The three loops for one block size, as a TVMScript macro.

    Args:
        visible: (position of the first token of a page, position of a query) -> which of the
            page's tokens the query sees, [page] bool.

    Returns:
        A macro (source, work, count, share, first): rows first .. first + block.rows of a task
        against `count` pages. `work` has flat float32 buffers: `q` and `sums` [rows of the task,
        dim], q multiplied by the scale of the scores and by log2(e); `best` and `total` [rows of
        the task], the running maximum and the sum of the weights; `scores` [block.rows,
        block.width] and `factors` [block.rows] for this macro alone. Row r has the query at
        position `work.queries[r // share]`; `work.starts` are the first positions of the pages.
    """
    rows, dim, page, width, lanes = block.rows, block.dim, block.page, block.width, block.lanes
    beside, parts = block.pages_at_once, block.parts_at_once

    def lane(index):
        return T.ramp(index, 1, page)

    def at(buffer, index, count=page):
        return buffer.vload([index], vector("float32", count))

    def combined(operation, scores, row):
        """max or + over the pages of a round."""
        values = [at(scores, row * width + i * page) for i in range(PAGES)]
        while len(values) > 1:
            values = [operation(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    @T.macro
    def score(source, work, count, first):
        for group in T.serial((count + beside - 1) // beside):
            acc = T.decl_buffer((beside * rows * page,), "float32", scope="global")
            for i in T.unroll(beside * rows):
                acc[lane(i * page)] = splat(0.0, page)
            for d in T.serial(dim):
                if isinstance(source, Pages):
                    for c in T.unroll(beside):
                        T.evaluate(source.prefetch(group * beside + c, d))
                for c in T.unroll(beside):
                    for r in T.unroll(rows):
                        acc[lane((c * rows + r) * page)] = multiply_add(
                            splat(work.q[(first + r) * dim + d], page),
                            source.keys(group * beside + c, d),
                            at(acc, (c * rows + r) * page),
                        )
            for c in T.unroll(beside):
                for r in T.unroll(rows):
                    work.scores[lane(r * width + (group * beside + c) * page)] = at(
                        acc, (c * rows + r) * page
                    )

    @T.macro
    def soften(source, work, share, first):
        for r in T.serial(rows):
            # A masked token has a weight of 2**-126 or less; that of a round with masked tokens
            # only is forgotten as soon as a visible one sets a maximum.
            for c in T.unroll(PAGES):
                work.scores[lane(r * width + c * page)] = T.Select(
                    visible(work.starts[c], work.queries[(first + r) // share]),
                    times(at(work.scores, r * width + c * page), source.key_scale(c)),
                    splat(MASKED, page),
                )
            work.factors[r] = work.best[first + r]
            work.best[first + r] = T.max(
                work.factors[r], reduce_max(combined(T.max, work.scores, r))
            )
            work.factors[r] = exp2(work.factors[r] - work.best[first + r], 1)
            for c in T.unroll(PAGES):
                work.scores[lane(r * width + c * page)] = exp2(
                    at(work.scores, r * width + c * page) - splat(work.best[first + r], page), page
                )
            work.total[first + r] = work.total[first + r] * work.factors[r] + reduce_sum(
                combined(operator.add, work.scores, r), page
            )
            if source.value_scale(0) is not None:
                for c in T.unroll(PAGES):
                    work.scores[lane(r * width + c * page)] = times(
                        at(work.scores, r * width + c * page), source.value_scale(c)
                    )

    @T.macro
    def gather(source, work, count, first):
        for i in T.serial(dim // (lanes * parts)):
            acc = T.decl_buffer((parts * rows * lanes,), "float32", scope="global")
            for p in T.unroll(parts):
                for r in T.unroll(rows):
                    acc[block.part((p * rows + r) * lanes)] = at(
                        work.sums, (first + r) * dim + (i * parts + p) * lanes, lanes
                    ) * splat(work.factors[r], lanes)
            for c in T.serial(count):
                for j in T.serial(page):
                    for p in T.unroll(parts):
                        for r in T.unroll(rows):
                            acc[block.part((p * rows + r) * lanes)] = multiply_add(
                                splat(work.scores[r * width + c * page + j], lanes),
                                source.values(c, j, (i * parts + p) * lanes, lanes),
                                at(acc, (p * rows + r) * lanes, lanes),
                            )
            for p in T.unroll(parts):
                for r in T.unroll(rows):
                    work.sums[block.part((first + r) * dim + (i * parts + p) * lanes)] = at(
                        acc, (p * rows + r) * lanes, lanes
                    )

    @T.macro
    def attend(source, work, count, share, first):
        score(source, work, count, first)
        soften(source, work, share, first)
        gather(source, work, count, first)

    return attend
