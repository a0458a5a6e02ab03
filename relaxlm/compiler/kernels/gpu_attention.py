"""Paged attention for GPUs other than NVIDIA's: append to pages, find what each query sees, attend.

One set of loop nests serves WebGPU, Metal, OpenCL and ROCm, and asks no more of a GPU than all of
them have. Pages are those of `cuda_attention`, without fp8, whose bytes WGSL cannot address. Two
things are different from CUDA:

- A kernel may read eight buffers at most on some devices of WebGPU, so `view_kernel` works out once
  per step what each query token sees, and `attend_kernel` reads four numbers per token in place of
  tables.
- A subgroup has 32 lanes, 64, or any number, so threads work together through workgroup memory
  only.

`attend_kernel` runs one workgroup per query token and KV head. It goes through the cached tokens in
tiles: a thread computes the score of one token for one query head, then every thread adds the
tile's weighted values to elements of the result that stay its own. Barriers stand where all threads
pass, as WGSL demands: the number of tiles is the same for all of them.
"""

import functools
import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels import attention
from relaxlm.compiler.kernels.attention import AttentionShape, PageTensor
from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.vector import LOG2E
from relaxlm.quantization.kv_cache import KVFormat

THREADS = 128
# Below any score, but finite: nothing may give inf - inf.
NO_SCORE = -1e30
# What pages hold.
CACHE_DTYPES = ("float16", "float32")
# float32 in workgroup memory for the query, at most: a quarter of the 16 KB that all devices have.
MAX_QUERY = 2048
# What a query token sees: `view_kernel`'s columns.
FIRST_PAGE, SINKS, WINDOW, COUNT = range(4)


def page_tensors(shape: AttentionShape, format: KVFormat) -> tuple[PageTensor, ...]:
    """The tensors that one layer's cache is made of, each with a leading axis of pages."""
    assert format.dtype in CACHE_DTYPES and shape.head_dim <= MAX_QUERY, "refused before"
    return attention.page_tensors(shape, format)


def length(name: str) -> tirx.Var:
    """A length that is known when the kernel runs; WGSL has no 64-bit integers."""
    return tirx.Var(name, "int32")


def private(size: int, dtype: str = "float32") -> tirx.Buffer:
    """Memory of one thread."""
    return T.decl_buffer((size,), dtype, scope="local")


def shared(size: int, dtype: str = "float32") -> tirx.Buffer:
    """Memory of one workgroup."""
    return T.decl_buffer((size,), dtype, scope="shared")


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
def view_kernel(window: int, sinks: int, page: int) -> tirx.PrimFunc:
    """(positions [n], row_offsets, page_offsets [b + 1], kv_lengths, dropped [b]) -> [n, 4] int32.

    The columns say which cached tokens a query token sees: the place of its sequence's first page
    in the table; how many of the first tokens; where the rest begins; how many in all. Token j of
    the cache has the position j before the gap that dropped pages leave, and j + dropped behind it,
    where new tokens always are.
    """
    sink_tokens = math.ceil(sinks / page) * page

    def body() -> None:
        n, batch = length("n"), length("b")
        positions = tensor("positions", (n,), "int32")
        row_offsets = tensor("row_offsets", (batch + 1,), "int32")
        page_offsets = tensor("page_offsets", (batch + 1,), "int32")
        kv_lengths = tensor("kv_lengths", (batch,), "int32")
        dropped = tensor("dropped", (batch,), "int32")
        view = tensor("view", (n, 4), "int32")

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
            if not window:
                T.buffer_store(view, 0, [token, SINKS])
                T.buffer_store(view, 0, [token, WINDOW])
                T.buffer_store(view, seen, [token, COUNT])
                return
            start = position - window + 1
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


@functools.cache
def attend_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """Attention of n query rows over the pages of their sequences, with an online softmax.

    (q [n, q_heads, dim], view [n, 4], page_ids [p], *page tensors, sink_logits [q_heads] float32 if
    the shape has them) -> [n, q_heads, dim].
    """
    heads, q_heads, dim, page = shape.kv_heads, shape.q_heads, shape.head_dim, shape.page_size
    ratio = q_heads // heads
    # Query heads of one workgroup; a large group is split over several.
    share = max(
        g for g in range(1, ratio + 1) if ratio % g == 0 and g * dim <= MAX_QUERY and g <= 16
    )
    parts, tile = ratio // share, THREADS // share
    kept = math.ceil(share * dim / THREADS)  # elements of the result that a thread computes

    def body() -> None:
        n, table, pages = length("n"), length("p"), length("pages")
        q = tensor("q", (n, q_heads, dim), dtype)
        view = tensor("view", (n, 4), "int32")
        page_ids = tensor("page_ids", (table,), "int32")
        k_pages = tensor("k_pages", (pages, heads, page, dim), format.dtype)
        v_pages = tensor("v_pages", (pages, heads, page, dim), format.dtype)
        sink_logits = tensor("sink_logits", (q_heads,), "float32") if shape.sink_logits else None
        out = tensor("out", (n, q_heads, dim), dtype)
        with (
            T.thread_binding(n, "blockIdx.x") as token,
            T.thread_binding(heads * parts, "blockIdx.y") as part,
            T.thread_binding(THREADS, "threadIdx.x") as t,
        ):
            query = shared(share * dim)
            scores, weights = shared(share * tile), shared(share * tile)
            places = shared(tile, "int32")  # page * page_size + slot of the tile's tokens
            largest = shared(share)
            best, score = private(1), private(1)  # of the thread's own query head
            sums, totals, bests = private(kept), private(kept), private(kept)
            head = part // parts
            mine, beside = t // tile, t % tile  # query head and token of the thread's score

            def put(buffer: tirx.Buffer, value: Expr | float, index: Expr | int = 0) -> None:
                value = T.float32(value) if isinstance(value, float) else value
                T.buffer_store(buffer, value, [index])

            def element(i: int) -> tuple[Expr, Expr]:
                """The query head and the feature of a thread's i-th element."""
                at = i * THREADS + t
                at = T.min(at, share * dim - 1) if (share * dim) % THREADS else at
                return at // dim, at % dim

            def score_of(place: Expr) -> None:
                put(score, 0.0)
                with T.serial(dim) as d:
                    key = T.cast(k_pages[place // page, head, place % page, d], "float32")
                    put(score, score[0] + query[mine * dim + d] * key)
                if shape.cap:
                    whole = T.float32(shape.cap * LOG2E)
                    put(score, whole - T.float32(2) * whole / (T.float32(1) + T.exp2(score[0])))

            for i in range(kept):
                g, d = element(i)
                value = T.cast(q[token, part * share + g, d], "float32")
                put(query, value * T.float32(shape.exponent_scale), g * dim + d)
                put(bests, NO_SCORE, i)
                put(sums, 0.0, i)
                put(totals, 0.0, i)
            put(best, NO_SCORE)
            count = view[token, COUNT]
            with T.serial((count + tile - 1) // tile) as step:
                # Everybody has read the last tile's places.
                T.evaluate(T.tvm_storage_sync("shared"))
                at = T.min(step * tile + t, count - 1)
                if shape.window:
                    sinks = view[token, SINKS]
                    at = T.if_then_else(at < sinks, at, view[token, WINDOW] + at - sinks)
                with T.If(t < tile), T.Then():
                    id_ = page_ids[view[token, FIRST_PAGE] + at // page]
                    put(places, id_ * page + at % page, t)
                T.evaluate(T.tvm_storage_sync("shared"))
                with T.If(t < share * tile), T.Then():
                    with T.If(step * tile + beside < count):
                        with T.Then():
                            score_of(places[beside])
                        with T.Else():
                            put(score, NO_SCORE)
                    put(scores, score[0], t)
                T.evaluate(T.tvm_storage_sync("shared"))
                with T.If(t < share * tile), T.Then():
                    with T.serial(tile) as j:
                        put(best, T.max(best[0], scores[mine * tile + j]))
                    put(weights, T.exp2(scores[t] - best[0]), t)
                    with T.If(beside == 0), T.Then():
                        put(largest, best[0], mine)
                T.evaluate(T.tvm_storage_sync("shared"))
                for i in range(kept):
                    g, d = element(i)
                    factor = T.exp2(bests[i] - largest[g])
                    put(sums, sums[i] * factor, i)
                    put(totals, totals[i] * factor, i)
                    put(bests, largest[g], i)
                    with T.serial(T.min(tile, count - step * tile)) as j:
                        place, weight = places[j], weights[g * tile + j]
                        value = T.cast(v_pages[place // page, head, place % page, d], "float32")
                        put(sums, sums[i] + weight, i)
                        put(totals, totals[i] + weight * value, i)
            for i in range(kept):
                g, d = element(i)
                if sink_logits is not None:
                    # Like a token without a value.
                    sink = sink_logits[part * share + g] * T.float32(LOG2E)
                    whole = T.max(bests[i], sink)
                    put(score, T.exp2(bests[i] - whole))
                    put(sums, sums[i] * score[0] + T.exp2(sink - whole), i)
                    put(totals, totals[i] * score[0], i)
                place = [token, part * share + g, d]
                T.buffer_store(out, T.cast(totals[i] / sums[i], dtype), place)

    return emit(body)
