"""Attention of a single row: the query heads of a KV head against its pages, read as stored."""

import math

import tvm
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import scratch
from relaxlm.compiler.kernels.cpu_attention_pages import PAGES_OF_ONE, Round
from relaxlm.compiler.kernels.cpu_attention_products import Accumulators, get, put
from relaxlm.compiler.kernels.vector import multiply_add, splat
from relaxlm.quantization.kv_cache import KVFormat

# What a core's prefetcher reads ahead of: a page of the operating system. It would fetch the next
# head's keys, too, so those had better be wanted soon.
STREAM = 4096


class Direct:
    """Products for blocks of query heads whose sums fit into registers.

    Attributes:
        passes, rows: how many blocks, of how many heads; the last may have heads too many.
        together: KV heads that a task takes of a long context.
    """

    exact = True

    def __init__(self, shape: AttentionShape, format: KVFormat, sums: int, block: int) -> None:
        """`sums`: vectors of 16 sums that fit into registers; `block`: the most rows of a block."""
        share = shape.q_heads // shape.kv_heads
        self.dim, self.page, self.scaled = shape.head_dim, shape.page_size, format.scaled
        size = self.dim * self.page * tvm.DataType(format.dtype).bits // 8
        self.together = _beside(shape.kv_heads, STREAM // size)
        self.passes = -(-share // block)
        self.rows = -(-share // self.passes)
        # Few heads alone would leave units idle, so pages and features are summed side by side.
        self.pages_beside = _beside(PAGES_OF_ONE, sums // self.rows)
        self.lanes = math.gcd(self.dim, 16)
        self.parts_beside = _beside(self.dim // self.lanes, sums // self.rows)
        self.width = PAGES_OF_ONE * self.page

    def scratch_bytes(self) -> int:
        return 4 * self.rows * (self.together * self.passes * self.dim + self.width)

    def declare(self) -> None:
        self.q = scratch(self.together * self.passes * self.rows * self.dim, "float32")
        self.scores = scratch(self.rows * self.width, "float32")

    def put_query(self, row: Expr, element) -> None:
        with T.serial(self.dim // self.lanes) as i:
            value = element(i * self.lanes, self.lanes)
            put(self.q, row * self.dim + i * self.lanes, value, self.lanes)

    def score_at(self, row: Expr, page: Expr) -> Expr:
        return row * self.width + page * self.page

    def put_weights(self, pages: Round, row: Expr, pair: Expr, weights: list[Expr]) -> None:
        for half, weight in enumerate(weights):
            at = self.score_at(row, 2 * pair + half)
            put(self.scores, at, pages.times_value_scale(weight, 2 * pair + half), self.page)

    def score(self, pages: Round, first: Expr, here: Expr) -> None:
        """Scores of the first `here` pages of a round, or a few more."""
        page, beside, dim = self.page, self.pages_beside, self.dim
        with T.serial((here + beside - 1) // beside) as group:
            sums = Accumulators(self.rows, beside, page)
            sums.start(lambda r, c: splat(0.0, page))
            with T.serial(dim // 2) as pair:
                for c in range(beside):
                    pages.prefetch_values(group * beside + c, pair, dim // 2)
                for d in (2 * pair, 2 * pair + 1):

                    def product(r: Expr, c: int, total: Expr, d: Expr = d) -> Expr:
                        factor = splat(self.q[(first + r) * dim + d], page)
                        return multiply_add(factor, pages.keys(group * beside + c, d), total)

                    sums.add(product)
            sums.finish(self.scores, lambda r, c: self.score_at(r, group * beside + c))

    def gather(self, pages: Round, first: Expr, here: Expr, sums) -> None:
        """Add the values of the first `here` pages, times their weights, to sums [rows, dim]."""
        lanes, beside, loops = self.lanes, self.parts_beside, self.dim // self.lanes
        loops //= beside
        with T.serial(loops) as part:
            totals = Accumulators(self.rows, beside, lanes)

            def place(r: Expr, p: int) -> Expr:
                return (first + r) * self.dim + (part * beside + p) * lanes

            totals.start(lambda r, p: get(sums, place(r, p), lanes))
            with T.serial(here) as c, T.serial(self.page) as t:
                # The keys of the next round, while the arithmetic units are busy.
                step = part * self.page + t
                pages.prefetch_keys(PAGES_OF_ONE + c, step, loops * self.page)

                def product(r: Expr, p: int, total: Expr) -> Expr:
                    weight = splat(self.scores[self.score_at(r, c) + t], lanes)
                    value = pages.values(c, t, (part * beside + p) * lanes, lanes)
                    return multiply_add(weight, value, total)

                totals.add(product)
            totals.finish(sums, place)


def _beside(count: int, most: int) -> int:
    """The largest of 8, 4, 2, 1 that divides `count` and is at most `most`."""
    return next(n for n in (8, 4, 2, 1) if count % n == 0 and n <= max(most, 1))
