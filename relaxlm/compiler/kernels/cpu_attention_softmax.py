"""The online softmax between the two products of attention (Milakov and Gimelshein 2018,
arXiv:1805.02867), and what a task keeps for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import scratch
from relaxlm.compiler.kernels.cpu_attention_pages import MASKED, Round
from relaxlm.compiler.kernels.cpu_attention_products import get, put
from relaxlm.compiler.kernels.vector import LOG2E, exp2, multiply_add, reduce_max, splat

# Weights are 2 ** (score - best). `best` follows the largest score only when it has grown by more
# than this, so that sums are rarely rescaled; until then weights reach 2 ** SLACK.
SLACK = 8.0


@dataclass(frozen=True)
class Sums:
    """What a task keeps of its rows.

    Attributes:
        best: [rows] what weights are relative to, in powers of 2.
        total: [rows, page] sums of the weights, one per place in a page.
        sums: [rows, dim] sums of the weighted values.
    """

    dim: int
    page: int
    best: tirx.Buffer
    total: tirx.Buffer
    sums: tirx.Buffer

    @property
    def lanes(self) -> int:
        return math.gcd(self.dim, 16)

    @staticmethod
    def bytes(rows: int, dim: int, page: int) -> int:
        return 4 * rows * (1 + page + dim)

    @staticmethod
    def declare(rows: int, dim: int, page: int) -> "Sums":
        return Sums(
            dim,
            page,
            scratch(rows, "float32"),
            scratch(rows * page, "float32"),
            scratch(rows * dim, "float32"),
        )

    def clear(self, row: Expr) -> None:
        T.buffer_store(self.best, T.float32(MASKED), [row])
        put(self.total, row * self.page, splat(0.0, self.page), self.page)
        with T.serial(self.dim // self.lanes) as i:
            put(self.sums, row * self.dim + i * self.lanes, splat(0.0, self.lanes), self.lanes)

    def rescale(self, row: Expr, best: Expr) -> None:
        """Make `best` what the weights of a row are relative to."""
        factor = scratch(1, "float32")
        T.buffer_store(factor, exp2(self.best[row] - best, 1), [0])
        T.buffer_store(self.best, best, [row])
        total = get(self.total, row * self.page, self.page)
        put(self.total, row * self.page, total * splat(factor[0], self.page), self.page)
        with T.serial(self.dim // self.lanes) as i:
            at = row * self.dim + i * self.lanes
            scaled = get(self.sums, at, self.lanes) * splat(factor[0], self.lanes)
            put(self.sums, at, scaled, self.lanes)

    def absorb(self, row: Expr, best: Expr, total: Expr, value: Callable[[Expr], Expr]) -> None:
        """Add what was collected elsewhere for a row: its best and total, and vectors of sums."""
        with T.If(best > self.best[row]), T.Then():
            self.rescale(row, best)
        factor = scratch(1, "float32")
        T.buffer_store(factor, exp2(best - self.best[row], 1), [0])
        at = row * self.page
        added = multiply_add(total, splat(factor[0], self.page), get(self.total, at, self.page))
        put(self.total, at, added, self.page)
        with T.serial(self.dim // self.lanes) as i:
            at = row * self.dim + i * self.lanes
            wide, before = splat(factor[0], self.lanes), get(self.sums, at, self.lanes)
            put(self.sums, at, multiply_add(value(i), wide, before), self.lanes)


class Weighted(Protocol):
    """Where `soften` finds scores, and puts weights; see `cpu_attention_products.Products`."""

    scores: tirx.Buffer
    exact: bool

    def score_at(self, row: Expr, page: Expr) -> Expr: ...

    def put_weights(self, pages: Round, row: Expr, pair: Expr, weights: list[Expr]) -> None: ...


def exp2_coarse(x: Expr, lanes: int) -> Expr:
    """2 ** x for float32 lanes, relative error below 1.1e-4; anything under -126 gives about 0.

    For weights that are then rounded to bfloat16, which has 8 bits. Adding 1.5 * 2 ** 23 leaves the
    nearest whole number in the low bits of a float32.
    """
    magic, clamped = splat(1.5 * 2**23, lanes), T.max(x, splat(-126.0, lanes))
    whole = T.reinterpret(f"int32x{lanes}", clamped + magic)
    # By way of the bits, since TVM takes (x + magic) - magic for x.
    fraction = clamped - (T.reinterpret(f"float32x{lanes}", whole) - magic)
    result = splat(0.05550411, lanes)
    for factor in (0.24022651, 0.69314718, 1.0):
        result = multiply_add(result, fraction, splat(factor, lanes))
    bits = T.reinterpret(f"int32x{lanes}", result)
    bits = bits + T.shift_left(whole, T.broadcast(T.int32(23), lanes))
    return T.reinterpret(f"float32x{lanes}", bits)


def capped(x: Expr, cap: float, lanes: int) -> Expr:
    """log2(e) cap tanh(s / cap) for lanes x = 2 log2(e) s / cap, absolute error below 1e-6 cap."""
    power = exp2(T.min(x, splat(126.0, lanes)), lanes)
    return splat(LOG2E * cap, lanes) - splat(2 * LOG2E * cap, lanes) / (splat(1.0, lanes) + power)


def nearer(x: Expr, slope: Expr, first: Expr, query: Expr, lanes: int) -> Expr:
    """Scores of the tokens from position `first` on, less `slope` per token to the query."""
    distance = T.broadcast(first - query, lanes) + T.ramp(T.int32(0), 1, lanes)
    return multiply_add(splat(slope, lanes), T.cast(distance, f"float32x{lanes}"), x)


def soften(
    kept: Sums,
    products: Weighted,
    pages: Round,
    first: Expr,
    rows: Expr,
    pairs: Expr,
    query,
    masked: bool,
    scaled: bool = False,
    place: Expr | int = 0,
    zeros: bool = False,
    slope: Callable[[Expr], Expr] | None = None,
) -> None:
    """Turn scores of some rows into weights.

    Args:
        first: the first row in `kept`.
        pairs: the round's pairs of pages to work on.
        query: row of `kept` -> its query's position.
        masked: whether there may be tokens that a query does not see. A masked token has a weight
            of 2 ** -126 or less; what a row with masked tokens only has collected is forgotten as
            soon as a visible one sets a maximum.
        scaled: whether scores are to be multiplied with the scales of the keys.
        place: the first row's number among the rows of scores and weights.
        zeros: whether the weight of a masked token is 0 instead, so that nothing depends on which
            masked tokens there are.
        slope: row of `kept` -> what its scores lose per token of distance, in powers of 2.
    """
    page, cap = kept.page, pages.tables.shape.cap
    two_to = exp2 if products.exact else exp2_coarse
    with T.serial(rows) as r:
        row = first + r
        top, largest = scratch(page, "float32"), scratch(1, "float32")
        put(top, 0, splat(MASKED, page), page)
        with T.serial(pairs) as pair:
            for half in range(2):
                at = products.score_at(place + r, 2 * pair + half)
                if masked or scaled or cap or slope:
                    score = get(products.scores, at, page)
                    if scaled:
                        score = pages.times_key_scale(score, 2 * pair + half)
                    if cap:
                        score = capped(score, cap, page)
                    if slope is not None:
                        first_token = pages.starts[2 * pair + half]
                        score = nearer(score, slope(row), first_token, query(row), page)
                    if masked:
                        visible = pages.tables.visible(pages.starts[2 * pair + half], query(row))
                        score = T.Select(visible, score, splat(MASKED, page))
                    put(products.scores, at, score, page)
                put(top, 0, T.max(get(products.scores, at, page), get(top, 0, page)), page)
        T.buffer_store(largest, reduce_max(get(top, 0, page)), [0])
        with T.If(largest[0] > kept.best[row] + T.float32(SLACK)), T.Then():
            kept.rescale(row, largest[0])
        total = scratch(page, "float32")
        put(total, 0, get(kept.total, row * page, page), page)
        with T.serial(pairs) as pair:
            both = [scratch(page, "float32") for _ in range(2)]
            for half, weight in enumerate(both):
                score = get(products.scores, products.score_at(place + r, 2 * pair + half), page)
                value = two_to(score - splat(kept.best[row], page), page)
                if masked and zeros:
                    value = T.Select(score > splat(MASKED, page), value, splat(0.0, page))
                put(weight, 0, value, page)
                put(total, 0, get(total, 0, page) + get(weight, 0, page), page)
            products.put_weights(pages, place + r, pair, [get(weight, 0, page) for weight in both])
        put(kept.total, row * page, get(total, 0, page), page)
