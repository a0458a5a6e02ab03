"""Paged attention for GPUs other than NVIDIA's: append to pages, find what each query sees, attend.

One set of loop nests serves WebGPU, Metal, OpenCL and ROCm, and asks no more of a GPU than all of
them have. Pages are those of `cuda_attention`, without fp8, whose bytes WGSL cannot address.

A kernel may read eight buffers at most on some devices of WebGPU, so `view_kernel` works out once
per step what each query token sees, and attention reads a few numbers per token in place of tables.

A workgroup of attention has rows of queries that share keys and values (`gpu_tiles.py`), so these
are read once: those of one token if the step has few tokens per sequence, else those of several.
With few tokens and long contexts a context is cut into parts, each of a workgroup, which `_merge`
puts together.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels import attention
from relaxlm.compiler.kernels.attention import PAGE_SIZE, AttentionShape, PageTensor
from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.gpu_tiles import (
    NO_SCORE,
    Tile,
    TileAttention,
    length,
    private,
    put,
)
from relaxlm.compiler.kernels.vector import LOG2E
from relaxlm.quantization.kv_cache import KVFormat

THREADS = 128
# What pages hold.
CACHE_DTYPES = ("float16", "float32")
MAX_HEAD_DIM = 1024
# Rows of a workgroup: of the heads of one token, and of several tokens.
FEW_ROWS, MANY_ROWS = 16, 32
# New tokens per sequence from which on workgroups have those of several.
MANY_TOKENS = 4
# Workgroups that keep a GPU busy; up to how many parts a context is cut for it, and the fewest
# tokens of a part.
BUSY, MOST_PARTS, PART_TOKENS = 256, 32, 256
# What a query token sees: `view_kernel`'s columns.
FIRST_PAGE, SINKS, WINDOW, COUNT, GAP = range(5)
VIEW_COLUMNS = 5


def page_tensors(shape: AttentionShape, format: KVFormat) -> tuple[PageTensor, ...]:
    """The tensors that one layer's cache is made of, each with a leading axis of pages."""
    assert format.dtype in CACHE_DTYPES and shape.head_dim <= MAX_HEAD_DIM, "refused before"
    return attention.page_tensors(shape, format)


@functools.cache
def append_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """(k, v [n, heads, dim], slots [n], *page tensors) -> page tensors, written in place.

    One workgroup per token and tensor.
    """
    heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size

    def body() -> None:
        n, pages = length("n"), length("pages")
        new = [tensor(name, (n, heads, dim), dtype) for name in "kv"]
        slots = tensor("slots", (n,), "int32")
        stored = [tensor(f"{name}_pages", (pages, heads, page, dim), format.dtype) for name in "kv"]

        def store(which: int, token: Expr, i: Expr) -> None:
            head, d, slot = i // dim, i % dim, slots[token]
            value = T.cast(new[which][token, head, d], format.dtype)
            T.buffer_store(stored[which], value, [slot // page, head, slot % page, d])

        with (
            T.thread_binding(n, "blockIdx.x") as token,
            T.thread_binding(2, "blockIdx.y") as which,
            T.thread_binding(THREADS, "threadIdx.x") as t,
            T.serial(math.ceil(heads * dim / THREADS)) as step,
            T.If(step * THREADS + t < heads * dim),
            T.Then(),
        ):
            with T.If(which == 0):
                with T.Then():
                    store(0, token, step * THREADS + t)
                with T.Else():
                    store(1, token, step * THREADS + t)

    return emit(body)


@functools.cache
def view_kernel(window: int, sinks: int, chunked: bool, page: int) -> tirx.PrimFunc:
    """(positions [n], row_offsets, page_offsets [b + 1], kv_lengths, dropped [b]) -> [n, 5] int32.

    The columns say which cached tokens a query token sees: the place of its sequence's first page
    in the table; how many of the first tokens; where the rest begins; how many in all; how wide the
    gap is that dropped pages leave. Token j of the cache has the position j before the gap, and
    j + gap behind it, where new tokens always are.
    """
    sink_tokens = math.ceil(sinks / page) * page

    def body() -> None:
        n, batch = length("n"), length("b")
        positions = tensor("positions", (n,), "int32")
        row_offsets = tensor("row_offsets", (batch + 1,), "int32")
        page_offsets = tensor("page_offsets", (batch + 1,), "int32")
        kv_lengths = tensor("kv_lengths", (batch,), "int32")
        dropped = tensor("dropped", (batch,), "int32")
        view = tensor("view", (n, VIEW_COLUMNS), "int32")

        def one(token: Expr) -> None:
            low, high = private(1, "int32"), private(1, "int32")
            # The last sequence that starts at or before the token.
            T.buffer_store(low, 0, [0])
            T.buffer_store(high, batch, [0])
            with T.While(high[0] - low[0] > 1):
                middle = (low[0] + high[0]) // 2
                with T.If(row_offsets[middle] <= token):
                    with T.Then():
                        T.buffer_store(low, middle, [0])
                    with T.Else():
                        T.buffer_store(high, middle, [0])
            gap, position = dropped[low[0]], positions[token]
            seen = T.min(kv_lengths[low[0]], position - gap + 1)
            T.buffer_store(view, page_offsets[low[0]], [token, FIRST_PAGE])
            T.buffer_store(view, gap, [token, GAP])
            if not window:
                T.buffer_store(view, 0, [token, SINKS])
                T.buffer_store(view, 0, [token, WINDOW])
                T.buffer_store(view, seen, [token, COUNT])
                return
            start = position - position % window if chunked else position - window + 1
            start = T.if_then_else(start <= sink_tokens, start, T.max(start - gap, sink_tokens))
            first = private(2, "int32")
            T.buffer_store(first, T.min(sinks, seen), [0])
            T.buffer_store(first, T.max(first[0], start), [1])
            T.buffer_store(view, first[0], [token, SINKS])
            T.buffer_store(view, first[1], [token, WINDOW])
            T.buffer_store(view, first[0] + T.max(seen - first[1], 0), [token, COUNT])

        with (
            T.thread_binding((n + THREADS - 1) // THREADS, "blockIdx.x") as block,
            T.thread_binding(THREADS, "threadIdx.x") as t,
            T.If(block * THREADS + t < n),
            T.Then(),
        ):
            one(block * THREADS + t)

    return emit(body)


@dataclass(frozen=True)
class Parts:
    """Into how many parts contexts are cut, of `share` workgroups per query token.

    Attributes:
        most: parts of all tokens of a step together; there is room for the results of so many.
    """

    share: int

    @property
    def most(self) -> int:
        return max(BUSY // self.share, 1)

    def count(self, n: Expr, table: Expr, window: int = 0) -> Expr:
        """Of each context.

        Args:
            n: query tokens.
            table: pages of all sequences.
            window: tokens that a query sees at most; 0: all.
        """
        seen = T.min(table * PAGE_SIZE, window) if window else table * PAGE_SIZE
        longest = (seen + PART_TOKENS - 1) // PART_TOKENS
        return T.max(T.min(self.most // n, T.min(longest, MOST_PARTS)), 1)


def few_rows(heads: int, size: int) -> tuple[Tile, int]:
    """For the heads of a token that share keys: a tile, and how many of them a token has."""
    count = -(-heads // min(FEW_ROWS, Tile.most_rows(size)))
    tile = Tile.of(-(-heads // count), size)
    return tile, -(-heads // tile.rows)


def parts_shape(heads: int, size: int, parts: Parts) -> tuple[int, int, int]:
    """Of a part: sums of weighted values, the largest score, the sum of weights."""
    return parts.most, heads, size + 2


def partial_shape(shape: AttentionShape) -> tuple[int, int, int]:
    """What `attend_kernel` writes parts' results to, float32."""
    group = shape.q_heads // shape.kv_heads
    parts = Parts(shape.kv_heads * few_rows(group, shape.head_dim)[1])
    return parts_shape(shape.q_heads, shape.head_dim, parts)


def finish(
    attention: TileAttention,
    row: Callable[[Expr], tuple[Expr, Expr]],
    is_own: Callable[[Expr], Expr],
    out: tirx.Buffer,
    sink_logits: tirx.Buffer | None,
) -> None:
    """Store results: sums of values by those of weights.

    Args:
        row: a row -> its token and query head.
        is_own: whether a row is one, and not there to fill the tile.
    """

    def store(r: Expr, feature: Expr, total: Expr) -> None:
        token, head = row(r)
        by = attention.sums[r]
        if sink_logits is not None:
            # Like a token without a value.
            sink = sink_logits[head] * T.float32(LOG2E)
            best = attention.best[r]
            kept = T.exp2(best - T.max(best, sink))
            total, by = total * kept, by * kept + T.exp2(sink - T.max(best, sink))
        with T.If(is_own(r)), T.Then():
            T.buffer_store(out, T.cast(total / by, out.dtype), [token, head, feature])

    attention.each_result(store)


def finish_part(
    attention: TileAttention,
    row: Callable[[Expr], Expr],
    is_own: Callable[[Expr], Expr],
    place: Expr,
    partial: tirx.Buffer,
) -> None:
    """Store what `merge` takes.

    Args:
        row: a row -> its query head.
        place: of the token and part.
    """
    tile, t, size = attention.tile, attention.thread, attention.tile.size

    def store(r: Expr, feature: Expr, total: Expr) -> None:
        with T.If(is_own(r)), T.Then():
            T.buffer_store(partial, total, [place, row(r), feature])

    attention.each_result(store)
    with T.If(T.And(t < tile.rows, is_own(t))), T.Then():
        T.buffer_store(partial, attention.best[t], [place, row(t), size])
        T.buffer_store(partial, attention.sums[t], [place, row(t), size + 1])


def merge(
    n: Expr, parts: Expr, partial: tirx.Buffer, out: tirx.Buffer, sink_logits: tirx.Buffer | None
) -> None:
    """Put parts together: a workgroup per query token and head."""
    heads, size = (int(extent) for extent in out.shape[1:])
    with (
        T.thread_binding(n, "blockIdx.x") as token,
        T.thread_binding(heads, "blockIdx.y") as head,
        T.thread_binding(THREADS, "threadIdx.x") as t,
    ):
        best, total, sums = private(1), private(1), private(1)
        sink = None if sink_logits is None else sink_logits[head] * T.float32(LOG2E)
        put(best, NO_SCORE if sink is None else sink)
        with T.serial(parts) as part:
            put(best, T.max(best[0], partial[token * parts + part, head, size]))
        put(total, 0.0 if sink is None else T.exp2(sink - best[0]))
        with T.serial(parts) as part:
            place = token * parts + part
            weight = T.exp2(partial[place, head, size] - best[0])
            put(total, total[0] + weight * partial[place, head, size + 1])
        with (
            T.serial(-(-size // THREADS)) as step,
            T.If(step * THREADS + t < size),
            T.Then(),
        ):
            feature = step * THREADS + t
            put(sums, 0.0)
            with T.serial(parts) as part:
                place = token * parts + part
                weight = T.exp2(partial[place, head, size] - best[0])
                put(sums, sums[0] + weight * partial[place, head, feature])
            T.buffer_store(out, T.cast(sums[0] / total[0], out.dtype), [token, head, feature])


@functools.cache
def attend_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """Attention of n query rows over the pages of their sequences, with an online softmax.

    (q [n, q_heads, dim], view [n, 5], row_offsets [b + 1], page_ids [p], *page tensors, and, if the
    shape has them, sink_logits [q_heads] float32 and slopes [q_heads] float32) ->
    [n, q_heads, dim], and room of `partial_shape` that only this kernel reads. n must not be 0.
    """
    heads, q_heads, dim, page = shape.kv_heads, shape.q_heads, shape.head_dim, shape.page_size
    group = q_heads // heads
    few, tiles = few_rows(group, dim)
    many = Tile.of(min(MANY_ROWS, Tile.most_rows(dim)), dim)
    shares = Parts(heads * tiles)

    def body() -> None:
        n, ends, table, pages = (length(name) for name in ("n", "ends", "p", "pages"))
        q = tensor("q", (n, q_heads, dim), dtype)
        view = tensor("view", (n, VIEW_COLUMNS), "int32")
        row_offsets, batch = tensor("row_offsets", (ends,), "int32"), ends - 1
        page_ids = tensor("page_ids", (table,), "int32")
        k_pages = tensor("k_pages", (pages, heads, page, dim), format.dtype)
        v_pages = tensor("v_pages", (pages, heads, page, dim), format.dtype)
        sink_logits = tensor("sink_logits", (q_heads,), "float32") if shape.sink_logits else None
        slopes = tensor("slopes", (q_heads,), "float32") if shape.alibi else None
        out = tensor("out", (n, q_heads, dim), dtype)
        partial = tensor("partial", partial_shape(shape), "float32")

        def run(
            attention: TileAttention,
            tokens: tuple[Expr, Expr],
            row: Callable[[Expr], tuple[Expr, Expr]],
            head: Expr,
            part: tuple[Expr, Expr] | None,
        ) -> None:
            """Attend from rows to what they see.

            Args:
                tokens: of the first row and of the last one; the last one sees all sinks that any
                    row sees.
                row: a row -> its token and query head.
                head: whose keys and values these are.
                part: which of how many.
            """
            tile, t = attention.tile, attention.thread
            first, last = tokens
            # Cached tokens [0, sinks) and [start, end).
            sinks, start, end = (private(1, "int32") for _ in range(3))
            put(sinks, view[last, SINKS])
            put(start, T.max(view[first, WINDOW], sinks[0]))
            put(end, view[last, WINDOW] + view[last, COUNT] - view[last, SINKS])
            count = sinks[0] + end[0] - start[0] if shape.window else end[0]
            steps = (count + tile.tokens - 1) // tile.tokens
            begin: Expr = T.int32(0)
            if part is not None:
                each = (steps + part[1] - 1) // part[1]
                begin = part[0] * each
                steps = T.min(each, steps - begin)

            def cached(index: Expr) -> Expr:
                """The number in the cache of a token of these."""
                if not shape.window:
                    return index
                return T.if_then_else(index < sinks[0], index, start[0] + index - sinks[0])

            def place(index: Expr) -> Expr:
                at = cached(index)
                return page_ids[view[first, FIRST_PAGE] + at // page] * page + at % page

            def query(r: Expr, feature: Expr) -> Expr:
                token, q_head = row(r)
                value = T.cast(q[token, q_head, feature], "float32")
                return value * T.float32(shape.exponent_scale)

            def stored(buffer: tirx.Buffer) -> Callable[[Expr, Expr], Expr]:
                return lambda place, feature: T.cast(
                    buffer[place // page, head, place % page, feature], "float32"
                )

            mine = [row(tile.products.row(t, i)) for i in range(tile.products.rows_each)]
            # Of a thread's rows: where what they see ends, and with a window, begins.
            ends, starts, fronts = (private(len(mine), "int32") for _ in range(3))
            slope = private(len(mine))
            for i, (token, q_head) in enumerate(mine):
                put(fronts, view[token, SINKS], i)
                put(starts, view[token, WINDOW], i)
                put(ends, starts[i] + view[token, COUNT] - fronts[i], i)
                if slopes is not None:
                    put(slope, slopes[q_head] * T.float32(LOG2E), i)

            def score(i: int, index: Expr, product: Expr) -> Expr:
                at = cached(index)
                seen = at < ends[i]
                if shape.window:
                    seen = T.And(seen, T.Or(at < fronts[i], at >= starts[i]))
                if shape.cap:
                    whole = T.float32(shape.cap * LOG2E)
                    product = whole - T.float32(2) * whole / (T.float32(1) + T.exp2(product))
                if slopes is not None:
                    distance = ends[i] - 1 - at
                    if shape.sinks:
                        in_front = at < math.ceil(shape.sinks / page) * page
                        distance += T.if_then_else(in_front, view[first, GAP], 0)
                    product = product - slope[i] * T.cast(distance, "float32")
                return T.if_then_else(seen, product, T.float32(NO_SCORE))

            key, value = stored(k_pages), stored(v_pages)
            attention.run(begin, steps, count, dim, place, query, key, value, score)

        def run_few(parts: Expr | None) -> None:
            """A workgroup has heads of one token, and a part of its context if there are parts."""
            split = heads * tiles
            along = split if parts is None else split * parts
            with (
                T.thread_binding(n, "blockIdx.x") as token,
                T.thread_binding(along, "blockIdx.y") as where,
                T.thread_binding(few.threads, "threadIdx.x") as t,
            ):
                attention = TileAttention(few, t)
                share = where % split
                head, rest = share // tiles, share % tiles * few.rows

                def row(r: Expr) -> tuple[Expr, Expr]:
                    return token, head * group + T.min(rest + r, group - 1)

                def is_own(r: Expr) -> Expr:
                    return rest + r < group

                if parts is None:
                    run(attention, (token, token), row, head, None)
                    finish(attention, row, is_own, out, sink_logits)
                    return
                part = where // split
                run(attention, (token, token), row, head, (part, parts))
                finish_part(attention, lambda r: row(r)[1], is_own, token * parts + part, partial)

        def run_many() -> None:
            """A workgroup has heads of several tokens of a sequence."""
            with (
                # Every sequence's last tile may be partly filled.
                T.thread_binding(n * group // many.rows + batch, "blockIdx.x") as number,
                T.thread_binding(heads, "blockIdx.y") as head,
                T.thread_binding(many.threads, "threadIdx.x") as t,
            ):
                sequence, left = private(1, "int32"), private(1, "int32")
                put(sequence, 0)
                put(left, number)

                def rows() -> Expr:
                    return (row_offsets[sequence[0] + 1] - row_offsets[sequence[0]]) * group

                def count() -> Expr:
                    return (rows() + many.rows - 1) // many.rows

                there = sequence[0] < batch
                with T.While(T.if_then_else(there, left[0] >= count(), False)):
                    put(left, left[0] - count())
                    put(sequence, sequence[0] + 1)
                attention = TileAttention(many, t)
                with T.If(there), T.Then():
                    # The sequence's first token, and its row behind the last one.
                    start, end = private(1, "int32"), private(1, "int32")
                    put(start, row_offsets[sequence[0]])
                    put(end, rows())
                    first = left[0] * many.rows

                    def row(r: Expr) -> tuple[Expr, Expr]:
                        at = T.min(first + r, end[0] - 1)
                        return start[0] + at // group, head * group + at % group

                    def is_own(r: Expr) -> Expr:
                        return first + r < end[0]

                    tokens = row(T.int32(0))[0], row(T.int32(many.rows - 1))[0]
                    run(attention, tokens, row, head, None)
                    finish(attention, row, is_own, out, sink_logits)

        parts = shares.count(n, table, shape.window and shape.window + shape.sinks)
        with T.If(T.And(n >= MANY_TOKENS * batch, n * group >= FEW_ROWS * batch)):
            with T.Then():
                run_many()
            with T.Else(), T.If(parts > 1):
                with T.Then():
                    run_few(parts)
                    merge(n, parts, partial, out, sink_logits)
                with T.Else():
                    run_few(None)

    return emit(body)
