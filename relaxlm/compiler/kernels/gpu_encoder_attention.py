"""Attention of encoders for GPUs of any kind: every token of a text against all of its tokens.

A workgroup has the queries of some tokens and one head, and goes through the tokens of their texts
in tiles (`gpu_tiles.py`), so each is read once for all these queries. Texts lie one behind the
other: the queries may belong to several, and what is not of a query's own text is not seen.
`view_kernel` works out once per step where each token's text begins and ends.
"""

import functools

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.gpu_attention import MANY_ROWS, MAX_HEAD_DIM
from relaxlm.compiler.kernels.gpu_tiles import (
    MOST_THREADS,
    NO_SCORE,
    Tile,
    TileAttention,
    length,
    private,
    put,
)
from relaxlm.compiler.kernels.workgroup import grid, when

# `view_kernel`'s columns.
START, END = range(2)


@functools.cache
def view_kernel() -> tirx.PrimFunc:
    """row_offsets [b + 1] -> [n, 2] int32: the first row of each row's text, and that behind it."""

    def body() -> None:
        n, offsets = length("n"), length("offsets")
        row_offsets = tensor("row_offsets", (offsets,), "int32")
        view = tensor("view", (n, 2), "int32")
        blocks = (n + MOST_THREADS - 1) // MOST_THREADS
        with grid([blocks], MOST_THREADS) as (block, t), when(block * MOST_THREADS + t < n):
            row = block * MOST_THREADS + t
            text, behind = private(1, "int32"), private(1, "int32")
            # The last text that starts at or before the row.
            put(text, T.int32(0))
            put(behind, offsets - 1)
            with T.While(behind[0] - text[0] > 1):
                middle = (text[0] + behind[0]) // 2
                with T.If(row_offsets[middle] <= row):
                    with T.Then():
                        put(text, middle)
                    with T.Else():
                        put(behind, middle)
            T.buffer_store(view, row_offsets[text[0]], [row, START])
            T.buffer_store(view, row_offsets[text[0] + 1], [row, END])

    return emit(body)


@functools.cache
def attend_kernel(shape: AttentionShape, dtype: str) -> tirx.PrimFunc:
    """Bidirectional attention over ragged texts, with an online softmax.

    (qkv [n, q_heads + 2 kv_heads, dim], view [n, 2]) -> [n, q_heads * dim]. n must not be 0.
    """
    q_heads, kv_heads, dim = shape.q_heads, shape.kv_heads, shape.head_dim
    assert dim <= MAX_HEAD_DIM, "refused before"
    tile = Tile.of(min(MANY_ROWS, Tile.most_rows(dim)), dim)

    def body() -> None:
        n = length("n")
        qkv = tensor("qkv", (n, q_heads + 2 * kv_heads, dim), dtype)
        view = tensor("view", (n, 2), "int32")
        out = tensor("out", (n, q_heads * dim), dtype)
        blocks = (n + tile.rows - 1) // tile.rows
        with grid([blocks, q_heads], tile.threads) as (block, head, t):
            first = block * tile.rows
            low, high = view[first, START], view[T.min(first + tile.rows, n) - 1, END]
            kv_head = q_heads + head // (q_heads // kv_heads)
            bounds = private(
                2 * tile.products.rows_each, "int32"
            )  # of the texts of a thread's rows
            attention = TileAttention(tile, t)

            def token_of(row: Expr) -> Expr:
                """Rows beyond the last token repeat it, and are not stored."""
                return T.min(first + row, n - 1)

            def feature(token: Expr, of: Expr, d: Expr) -> Expr:
                return T.cast(qkv[token, of, d], "float32")

            def query(row: Expr, d: Expr) -> Expr:
                return feature(token_of(row), head, d) * T.float32(shape.exponent_scale)

            def score(i: int, number: Expr, product: Expr) -> Expr:
                token = low + number
                seen = T.And(token >= bounds[2 * i + START], token < bounds[2 * i + END])
                return T.if_then_else(seen, product, T.float32(NO_SCORE))

            def store(row: Expr, d: Expr, total: Expr) -> None:
                with when(first + row < n):
                    value = T.cast(total / attention.sums[row], dtype)
                    T.buffer_store(out, value, [first + row, head * dim + d])

            for i in range(tile.products.rows_each):
                for column in (START, END):
                    token = token_of(tile.products.row(t, i))
                    put(bounds, view[token, column], 2 * i + column)
            attention.run(
                T.int32(0),
                (high - low + tile.tokens - 1) // tile.tokens,
                high - low,
                dim,
                lambda number: low + number,
                query,
                lambda token, d: feature(token, kv_head, d),
                lambda token, d: feature(token, kv_head + kv_heads, d),
                score,
            )
            attention.each_result(store)

    return emit(body)
