"""Multi-head latent attention for GPUs of any kind: pages of `cpu_latent_attention`.

A workgroup has up to 16 heads of one token (`gpu_tiles.py`), which read the same vectors: these are
keys, and their first features are values. That is work enough for what is read, so prompts have the
same kernel. Long contexts of few tokens are cut into parts, as in `gpu_attention`.
"""

import functools

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import PAGE_SIZE
from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.cpu_latent_attention import LatentShape
from relaxlm.compiler.kernels.gpu_attention import (
    COUNT,
    FIRST_PAGE,
    VIEW_COLUMNS,
    Parts,
    few_rows,
    finish,
    finish_part,
    merge,
    parts_shape,
)
from relaxlm.compiler.kernels.gpu_tiles import NO_SCORE, Products, TileAttention, length
from relaxlm.compiler.kernels.vector import LOG2E
from relaxlm.quantization.kv_cache import KVFormat

# Tiles of `head_matmul_kernel`, for steps of at most so many tokens; the last one for any.
MATMUL_TILES = (
    (1, Products(1, 128, 128)),
    (8, Products(8, 128, 128)),
    (None, Products(32, 64, 128)),
)


def _parts(shape: LatentShape) -> Parts:
    return Parts(few_rows(shape.heads, shape.latent)[1])


def partial_shape(shape: LatentShape) -> tuple[int, int, int]:
    """What `attend_kernel` writes parts' results to, float32."""
    return parts_shape(shape.heads, shape.latent, _parts(shape))


@functools.cache
def attend_kernel(shape: LatentShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """Attention of n tokens over the pages of their sequences, with an online softmax.

    (q_latent [n, heads, latent], q_rope [n, heads, rope], view [n, 5], page_ids [p], pages) ->
    [n, heads, latent], and room of `partial_shape` that only this kernel reads. n must not be 0.
    `view` is that of `gpu_attention.view_kernel` without a window.
    """
    heads, latent, rope = shape.heads, shape.latent, shape.rope
    tile, tiles = few_rows(heads, latent)

    def body() -> None:
        n, table, held = (length(name) for name in ("n", "p", "pages"))
        q_latent = tensor("q_latent", (n, heads, latent), dtype)
        q_rope = tensor("q_rope", (n, heads, rope), dtype)
        view = tensor("view", (n, VIEW_COLUMNS), "int32")
        page_ids = tensor("page_ids", (table,), "int32")
        pages = tensor("latent_pages", (held, PAGE_SIZE, shape.width), format.dtype)
        out = tensor("out", (n, heads, latent), dtype)
        partial = tensor("partial", partial_shape(shape), "float32")

        def run(parts: Expr | None) -> None:
            """A workgroup has heads of one token, and a part of its context if there are parts."""
            along = T.int32(tiles) if parts is None else tiles * parts
            with (
                T.thread_binding(n, "blockIdx.x") as token,
                T.thread_binding(along, "blockIdx.y") as where,
                T.thread_binding(tile.threads, "threadIdx.x") as t,
            ):
                attention = TileAttention(tile, t)
                first, count = where % tiles * tile.rows, view[token, COUNT]
                begin: Expr = T.int32(0)
                steps = (count + tile.tokens - 1) // tile.tokens
                if parts is not None:
                    each = (steps + parts - 1) // parts
                    begin = where // tiles * each
                    steps = T.min(each, steps - begin)

                def head(r: Expr) -> Expr:
                    return T.min(first + r, heads - 1)

                def is_own(r: Expr) -> Expr:
                    return first + r < heads

                def query(r: Expr, feature: Expr) -> Expr:
                    value = T.if_then_else(
                        feature < latent,
                        q_latent[token, head(r), T.min(feature, latent - 1)],
                        q_rope[token, head(r), T.max(feature - latent, 0)],
                    )
                    return T.cast(value, "float32") * T.float32(shape.scale * LOG2E)

                def place(index: Expr) -> Expr:
                    page = page_ids[view[token, FIRST_PAGE] + index // PAGE_SIZE]
                    return page * PAGE_SIZE + index % PAGE_SIZE

                def stored(place: Expr, feature: Expr) -> Expr:
                    value = pages[place // PAGE_SIZE, place % PAGE_SIZE, feature]
                    return T.cast(value, "float32")

                def score(i: int, index: Expr, product: Expr) -> Expr:
                    return T.if_then_else(index < count, product, T.float32(NO_SCORE))

                attention.run(begin, steps, count, shape.width, place, query, stored, stored, score)
                if parts is None:
                    finish(attention, lambda r: (token, head(r)), is_own, out, None)
                else:
                    there = token * parts + where // tiles
                    finish_part(attention, head, is_own, there, partial)

        parts = _parts(shape).count(n, table)
        with T.If(parts > 1):
            with T.Then():
                run(parts)
                merge(n, parts, partial, out, None)
            with T.Else():
                run(None)

    return emit(body)


@functools.cache
def head_matmul_kernel(
    heads: int, outputs: int, inputs: int, weight_dtype: str, dtype: str
) -> tirx.PrimFunc:
    """(x [n, heads, inputs], weight [heads, outputs, inputs]) -> [n, heads, outputs].

    Every head has a matrix of its own. n must not be 0.
    """

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, heads, inputs), dtype)
        weight = tensor("weight", (heads, outputs, inputs), weight_dtype)
        out = tensor("out", (n, heads, outputs), dtype)

        def run(tile: Products) -> None:
            blocks = -(-outputs // tile.columns)
            with (
                T.thread_binding((n + tile.rows - 1) // tile.rows, "blockIdx.x") as number,
                T.thread_binding(heads * blocks, "blockIdx.y") as where,
                T.thread_binding(tile.threads, "threadIdx.x") as t,
            ):
                head = where // blocks
                row, column = number * tile.rows, where % blocks * tile.columns
                sums = tile.sums()

                def of_x(r: Expr, feature: Expr) -> Expr:
                    return T.cast(x[T.min(row + r, n - 1), head, feature], "float32")

                def of_weight(c: Expr, feature: Expr) -> Expr:
                    at = T.min(column + c, outputs - 1)
                    return T.cast(weight[head, at, feature], "float32")

                tile.sum(t, inputs, tile.staged(), sums, of_x, of_weight)
                for i in range(tile.rows_each):
                    for j in range(tile.columns_each):
                        r, c = row + tile.row(t, i), column + tile.column(t, j)
                        with T.If(T.And(r < n, c < outputs)), T.Then():
                            value = T.cast(sums[i * tile.columns_each + j], dtype)
                            T.buffer_store(out, value, [r, head, c])

        def choose(tiles: tuple[tuple[int | None, Products], ...]) -> None:
            (most, tile), *rest = tiles
            if most is None:
                run(tile)
                return
            with T.If(n <= most):
                with T.Then():
                    run(tile)
                with T.Else():
                    choose(tuple(rest))

        choose(MATMUL_TILES)

    return emit(body)
