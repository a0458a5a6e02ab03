"""Paged attention for CPUs: append to pages, attend over pages, copy pages.

A page holds `PAGE_SIZE` tokens of one layer. Keys are stored transposed, [heads, head_dim, page],
so that one vector register holds the same feature of all tokens of a page and no horizontal sums
are needed; values are [heads, page, head_dim]. Scales of an fp8 cache are [heads, page].
"""

import functools
import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape, PageTensor
from relaxlm.compiler.kernels.vector import (
    LOG2E,
    as_relax_kernel,
    exp2,
    import_reduce_sum,
    multiply_add,
    reduce_max,
    reduce_sum,
    splat,
    to_float32,
    vector,
)
from relaxlm.quantization.kv_cache import E4M3_MAX, KVFormat

# Below any real score, but finite: a page of masked tokens must not give inf - inf.
MASKED = -1e30


def page_tensors(shape: AttentionShape, format: KVFormat) -> tuple[PageTensor, ...]:
    """The tensors that one layer's cache is made of, each with a leading axis of pages."""
    heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size
    tensors = [
        PageTensor("k", (heads, dim, page), format.dtype),
        PageTensor("v", (heads, page, dim), format.dtype),
    ]
    if format.scaled:
        tensors.append(PageTensor("k_scale", (heads, page), "float32"))
        tensors.append(PageTensor("v_scale", (heads, page), "float32"))
    return tuple(tensors)


@functools.cache  # parsing TVMScript takes 0.2 s, and every layer asks
def append_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """(k, v [n, heads, dim], slots [n], *page tensors) -> page tensors, written in place."""
    heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size

    def code(value):
        return encode_e4m3(value) if format.scaled else T.cast(value, format.dtype)

    @T.macro
    def store(k, v, slot, token, k_pages, v_pages, k_scales, v_scales):
        for head in T.serial(heads):
            if format.scaled:
                largest = T.decl_buffer((2,), "float32", scope="global")
                largest[0] = T.float32(1e-20)
                largest[1] = T.float32(1e-20)
                for d in T.serial(dim):
                    largest[0] = T.max(largest[0], T.abs(T.cast(k[token, head, d], "float32")))
                    largest[1] = T.max(largest[1], T.abs(T.cast(v[token, head, d], "float32")))
                k_scales[slot // page, head, slot % page] = largest[0] * T.float32(1 / E4M3_MAX)
                v_scales[slot // page, head, slot % page] = largest[1] * T.float32(1 / E4M3_MAX)
                for d in T.serial(dim):
                    k_pages[slot // page, head, d, slot % page] = code(
                        T.cast(k[token, head, d], "float32")
                        / (largest[0] * T.float32(1 / E4M3_MAX))
                    )
                    v_pages[slot // page, head, slot % page, d] = code(
                        T.cast(v[token, head, d], "float32")
                        / (largest[1] * T.float32(1 / E4M3_MAX))
                    )
            else:
                for d in T.serial(dim):
                    k_pages[slot // page, head, d, slot % page] = code(k[token, head, d])
                    v_pages[slot // page, head, slot % page, d] = code(v[token, head, d])

    if format.scaled:

        @T.prim_func(s_tir=True, check_well_formed=False)
        def append_scaled(
            k_h: T.handle,
            v_h: T.handle,
            slots_h: T.handle,
            k_pages_h: T.handle,
            v_pages_h: T.handle,
            k_scales_h: T.handle,
            v_scales_h: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            n, pages = T.int64(), T.int64()
            k = T.match_buffer(k_h, (n, heads, dim), dtype)
            v = T.match_buffer(v_h, (n, heads, dim), dtype)
            slots = T.match_buffer(slots_h, (n,), "int32")
            k_pages = T.match_buffer(k_pages_h, (pages, heads, dim, page), "uint8")
            v_pages = T.match_buffer(v_pages_h, (pages, heads, page, dim), "uint8")
            k_scales = T.match_buffer(k_scales_h, (pages, heads, page), "float32")
            v_scales = T.match_buffer(v_scales_h, (pages, heads, page), "float32")
            for token in T.parallel(n):
                store(k, v, slots[token], token, k_pages, v_pages, k_scales, v_scales)

        return as_relax_kernel(append_scaled)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def append(
        k_h: T.handle, v_h: T.handle, slots_h: T.handle, k_pages_h: T.handle, v_pages_h: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        n, pages = T.int64(), T.int64()
        k = T.match_buffer(k_h, (n, heads, dim), dtype)
        v = T.match_buffer(v_h, (n, heads, dim), dtype)
        slots = T.match_buffer(slots_h, (n,), "int32")
        k_pages = T.match_buffer(k_pages_h, (pages, heads, dim, page), format.dtype)
        v_pages = T.match_buffer(v_pages_h, (pages, heads, page, dim), format.dtype)
        for token in T.parallel(n):
            store(k, v, slots[token], token, k_pages, v_pages, k_pages, v_pages)

    return as_relax_kernel(append)


@functools.cache  # parsing TVMScript takes 0.2 s, and every layer asks
def attend_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """Attention of n query rows over the pages of their sequences, with an online softmax.

    (q [n, q_heads, dim], positions [n], row_offsets [b + 1], page_offsets [b + 1], page_ids [p],
    kv_lengths [b], dropped [b], *page tensors) -> [n, q_heads, dim].

    One task per token and KV head reads each key and value once for all query heads that share
    it. Early and late tokens of a prompt are paired, since later ones have more to read and the
    thread pool splits tasks evenly.
    """
    q_heads, heads, dim, page = shape.q_heads, shape.kv_heads, shape.head_dim, shape.page_size
    share = q_heads // heads
    window, sinks = shape.window, shape.sinks
    sink_pages = -(-sinks // page)
    lanes = math.gcd(dim, 16)
    scale = shape.scale * LOG2E

    def lane_index():
        return T.ramp(T.int32(0), 1, page)

    def wide(value):
        return T.broadcast(value, page)

    def stored(pages, index, width):
        if format.scaled:
            return decode_e4m3(pages.vload(index, vector("uint8", width)), width)
        return to_float32(pages.vload(index, vector(format.dtype, width)), width)

    def visible(first, query):
        """Which tokens of a page a query sees; `first` is the position of the page's first."""
        mask = wide(first) + lane_index() <= wide(query)
        if window > 0:
            near = wide(query) - wide(first) - lane_index() < wide(T.int32(window))
            if sinks > 0:
                near = near | (wide(first) + lane_index() < wide(T.int32(sinks)))
            mask = mask & near
        return mask

    def page_matters(first, query):
        if window <= 0:
            return first <= query
        near = query - (first + page - 1) < window
        return (first <= query) & ((near | (first < sinks)) if sinks > 0 else near)

    def absolute(index, dropped):
        return index * page + (T.if_then_else(index >= sink_pages, dropped, 0) if window > 0 else 0)

    @T.macro
    def one_page(
        q,
        token,
        head,
        first,
        query,
        block,
        count,
        k_pages,
        v_pages,
        k_scales,
        v_scales,
        score,
        best,
        total,
        weighted,
        factor,
    ):
        for r in T.unroll(share):
            score[T.ramp(r * page, 1, page)] = splat(0.0, page)
        for d in T.serial(dim):
            for r in T.unroll(share):
                score[T.ramp(r * page, 1, page)] = multiply_add(
                    splat(T.cast(q[token, head * share + r, d], "float32"), page),
                    stored(k_pages, [block, head, d, 0], page),
                    score.vload([r * page], vector("float32", page)),
                )
        for r in T.unroll(share):
            if format.scaled:
                score[T.ramp(r * page, 1, page)] = score.vload(
                    [r * page], vector("float32", page)
                ) * k_scales.vload([block, head, 0], vector("float32", page))
            score[T.ramp(r * page, 1, page)] = T.Select(
                visible(first, query),
                score.vload([r * page], vector("float32", page)) * splat(scale, page),
                splat(MASKED, page),
            )
            factor[0] = T.max(best[r], reduce_max(score.vload([r * page], vector("float32", page))))
            factor[1] = exp2(best[r] - factor[0], 1)
            best[r] = factor[0]
            score[T.ramp(r * page, 1, page)] = T.Select(
                visible(first, query),
                exp2(
                    score.vload([r * page], vector("float32", page)) - splat(factor[0], page), page
                ),
                splat(0.0, page),
            )
            total[r] = total[r] * factor[1] + reduce_sum(
                score.vload([r * page], vector("float32", page)), page
            )
            if format.scaled:
                score[T.ramp(r * page, 1, page)] = T.Select(
                    visible(first, query),
                    score.vload([r * page], vector("float32", page))
                    * v_scales.vload([block, head, 0], vector("float32", page)),
                    splat(0.0, page),
                )
            for i in T.serial(dim // lanes):
                weighted[T.ramp(r * dim + i * lanes, 1, lanes)] = weighted.vload(
                    [r * dim + i * lanes], vector("float32", lanes)
                ) * splat(factor[1], lanes)
        for j in T.serial(T.min(count, page)):
            for i in T.serial(dim // lanes):
                for r in T.unroll(share):
                    weighted[T.ramp(r * dim + i * lanes, 1, lanes)] = multiply_add(
                        splat(score[r * page + j], lanes),
                        stored(v_pages, [block, head, j, i * lanes], lanes),
                        weighted.vload([r * dim + i * lanes], vector("float32", lanes)),
                    )

    @T.macro
    def one_task(
        task,
        n,
        batch,
        q,
        positions,
        row_offsets,
        page_offsets,
        page_ids,
        kv_lengths,
        dropped,
        k_pages,
        v_pages,
        k_scales,
        v_scales,
        out,
    ):
        half = T.decl_buffer((3,), "int32", scope="global")
        score = T.decl_buffer((share * page,), "float32", scope="global")
        best = T.decl_buffer((share,), "float32", scope="global")
        total = T.decl_buffer((share,), "float32", scope="global")
        factor = T.decl_buffer((2,), "float32", scope="global")
        weighted = T.decl_buffer((share * dim,), "float32", scope="global")
        half[2] = T.cast(task // heads, "int32")
        half[2] = T.if_then_else(
            half[2] % 2 == 0, half[2] // 2, T.cast(n, "int32") - 1 - half[2] // 2
        )
        # The sequence of this token: the last one that starts at or before it.
        half[0] = T.int32(0)
        half[1] = T.cast(batch, "int32")
        while half[1] - half[0] > 1:
            if row_offsets[(half[0] + half[1]) // 2] <= half[2]:
                half[0] = (half[0] + half[1]) // 2
            else:
                half[1] = (half[0] + half[1]) // 2
        for r in T.unroll(share):
            best[r] = T.float32(MASKED)
            total[r] = T.float32(0)
        for i in T.serial(share * dim):
            weighted[i] = T.float32(0)
        for index in T.serial(page_offsets[half[0] + 1] - page_offsets[half[0]]):
            if page_matters(absolute(index, dropped[half[0]]), positions[half[2]]):
                one_page(
                    q,
                    half[2],
                    T.cast(task % heads, "int32"),
                    absolute(index, dropped[half[0]]),
                    positions[half[2]],
                    page_ids[page_offsets[half[0]] + index],
                    kv_lengths[half[0]] - index * page,
                    k_pages,
                    v_pages,
                    k_scales,
                    v_scales,
                    score,
                    best,
                    total,
                    weighted,
                    factor,
                )
        for r in T.unroll(share):
            for i in T.serial(dim):
                out[half[2], T.cast(task % heads, "int32") * share + r, i] = T.cast(
                    weighted[r * dim + i] / total[r], dtype
                )

    if format.scaled:

        @T.prim_func(s_tir=True, check_well_formed=False)
        def attend_scaled(
            q_h: T.handle,
            positions_h: T.handle,
            row_offsets_h: T.handle,
            page_offsets_h: T.handle,
            page_ids_h: T.handle,
            kv_lengths_h: T.handle,
            dropped_h: T.handle,
            k_pages_h: T.handle,
            v_pages_h: T.handle,
            k_scales_h: T.handle,
            v_scales_h: T.handle,
            out_h: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            n, batch, table, pages = T.int64(), T.int64(), T.int64(), T.int64()
            q = T.match_buffer(q_h, (n, q_heads, dim), dtype)
            positions = T.match_buffer(positions_h, (n,), "int32")
            row_offsets = T.match_buffer(row_offsets_h, (batch + 1,), "int32")
            page_offsets = T.match_buffer(page_offsets_h, (batch + 1,), "int32")
            page_ids = T.match_buffer(page_ids_h, (table,), "int32")
            kv_lengths = T.match_buffer(kv_lengths_h, (batch,), "int32")
            dropped = T.match_buffer(dropped_h, (batch,), "int32")
            k_pages = T.match_buffer(k_pages_h, (pages, heads, dim, page), "uint8")
            v_pages = T.match_buffer(v_pages_h, (pages, heads, page, dim), "uint8")
            k_scales = T.match_buffer(k_scales_h, (pages, heads, page), "float32")
            v_scales = T.match_buffer(v_scales_h, (pages, heads, page), "float32")
            out = T.match_buffer(out_h, (n, q_heads, dim), dtype)
            for task in T.parallel(n * heads):
                one_task(
                    task,
                    n,
                    batch,
                    q,
                    positions,
                    row_offsets,
                    page_offsets,
                    page_ids,
                    kv_lengths,
                    dropped,
                    k_pages,
                    v_pages,
                    k_scales,
                    v_scales,
                    out,
                )

        return as_relax_kernel(import_reduce_sum(attend_scaled, page))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attend(
        q_h: T.handle,
        positions_h: T.handle,
        row_offsets_h: T.handle,
        page_offsets_h: T.handle,
        page_ids_h: T.handle,
        kv_lengths_h: T.handle,
        dropped_h: T.handle,
        k_pages_h: T.handle,
        v_pages_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        n, batch, table, pages = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_h, (n, q_heads, dim), dtype)
        positions = T.match_buffer(positions_h, (n,), "int32")
        row_offsets = T.match_buffer(row_offsets_h, (batch + 1,), "int32")
        page_offsets = T.match_buffer(page_offsets_h, (batch + 1,), "int32")
        page_ids = T.match_buffer(page_ids_h, (table,), "int32")
        kv_lengths = T.match_buffer(kv_lengths_h, (batch,), "int32")
        dropped = T.match_buffer(dropped_h, (batch,), "int32")
        k_pages = T.match_buffer(k_pages_h, (pages, heads, dim, page), format.dtype)
        v_pages = T.match_buffer(v_pages_h, (pages, heads, page, dim), format.dtype)
        out = T.match_buffer(out_h, (n, q_heads, dim), dtype)
        for task in T.parallel(n * heads):
            one_task(
                task,
                n,
                batch,
                q,
                positions,
                row_offsets,
                page_offsets,
                page_ids,
                kv_lengths,
                dropped,
                k_pages,
                v_pages,
                k_pages,
                v_pages,  # no scales: never read
                out,
            )

    return as_relax_kernel(import_reduce_sum(attend, page))


def encode_e4m3(value: Expr) -> Expr:
    """float32 with |value| <= 448 to its e4m3 code (uint8), rounding half to even.

    TVM's cast to float8 is wrong for some inputs on CPUs, so this works on the bits: below 2**-6
    a code counts steps of 2**-9; above, the mantissa is rounded to three bits and the exponent
    moves from bias 127 to bias 7.
    """
    bits = T.reinterpret(value, dtype="uint32")
    sign = T.shift_right(bits, T.uint32(24)) & T.uint32(0x80)
    magnitude = bits & T.uint32(0x7FFFFFFF)
    small = T.cast(T.nearbyint(T.abs(value) * T.float32(512)), "uint32")
    odd = T.shift_right(magnitude, T.uint32(20)) & T.uint32(1)
    rounded = T.shift_right(magnitude + T.uint32(0x7FFFF) + odd, T.uint32(20))
    normal = rounded - T.uint32((127 - 7) << 3)
    code = T.Select(T.abs(value) < T.float32(2**-6), small, T.min(normal, T.uint32(0x7E)))
    return T.cast(sign | code, "uint8")


def decode_e4m3(codes: Expr, lanes: int) -> Expr:
    """e4m3 codes (uint8) to float32: the bits moved into place, the exponent mended by a product.

    A code with exponent 0 becomes a float32 subnormal, which the product also turns into the
    right value.
    """

    def word(value: int) -> Expr:
        return T.uint32(value) if lanes == 1 else T.broadcast(T.uint32(value), lanes)

    wide = T.cast(codes, vector("uint32", lanes))
    magnitude = T.shift_left(wide & word(0x7F), word(20))
    scaled = T.reinterpret(magnitude, dtype=vector("float32", lanes)) * splat(2.0**120, lanes)
    sign = T.shift_left(wide & word(0x80), word(24))
    bits = T.reinterpret(scaled, dtype=vector("uint32", lanes)) | sign
    return T.reinterpret(bits, dtype=vector("float32", lanes))
