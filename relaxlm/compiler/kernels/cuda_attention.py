"""Paged attention for CUDA: append to pages, attend over pages.

A page holds `PAGE_SIZE` tokens of one layer, [heads, page, head_dim] for keys as for values; the
scales of an fp8 cache are [heads, page]. Arguments are those of `cpu_attention`.

`attend_kernel` runs one block per query token and KV head. The block's warps share out the cached
tokens that the query sees; the lanes of a warp share out the head's elements, so that a cached
vector is read in whole memory transactions, once for all query heads that share it. Every warp
keeps a running softmax per query head (largest score, sum of weights, weighted sum of values, in
float32), and the block merges them at the end. A query's cost follows what it sees, not the
longest sequence.

Plain kernels: any head size up to 256 and any group, but no tensor cores, and a long sequence is
not split over several blocks. Keys are read again for every query token of a prompt.
"""

import functools
import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape, PageTensor
from relaxlm.compiler.kernels.cuda_float8 import decode_e4m3, encode_e4m3
from relaxlm.compiler.kernels.vector import LOG2E
from relaxlm.errors import UnsupportedError
from relaxlm.quantization.kv_cache import E4M3_MAX, KVFormat

LANES = 32
WARPS = 4
ALL_LANES = 0xFFFFFFFF
# Accumulators per lane and query head times query heads per block: what fits into registers.
MAX_ACCUMULATORS = 32
MAX_HEAD_DIM = 256
# Below any score, but finite: a warp without tokens must not give inf - inf.
NO_SCORE = -1e30


def page_tensors(shape: AttentionShape, format: KVFormat) -> tuple[PageTensor, ...]:
    """The tensors that one layer's cache is made of, each with a leading axis of pages."""
    heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size
    tensors = [
        PageTensor("k", (heads, page, dim), format.dtype),
        PageTensor("v", (heads, page, dim), format.dtype),
    ]
    if format.scaled:
        tensors.append(PageTensor("k_scale", (heads, page), "float32"))
        tensors.append(PageTensor("v_scale", (heads, page), "float32"))
    return tuple(tensors)


def check_shape(shape: AttentionShape) -> None:
    """Refuse what the kernels cannot take.

    Raises:
        UnsupportedError: head_dim is above 256, or the heads do not divide into groups.
    """
    if shape.head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"head_dim = {shape.head_dim} is not supported on cuda: its attention kernels go up "
            f"to {MAX_HEAD_DIM}"
        )
    if shape.q_heads % shape.kv_heads:
        raise UnsupportedError(
            f"num_attention_heads = {shape.q_heads} is not a multiple of num_key_value_heads = "
            f"{shape.kv_heads}"
        )


def local(*shape: int, dtype: str = "float32") -> tirx.Buffer:
    """Registers of one thread."""
    return T.sblock_alloc_buffer(shape, dtype, scope="local")


def shared(*shape: int) -> tirx.Buffer:
    """Memory of one block, float32."""
    return T.sblock_alloc_buffer(shape, "float32", scope="shared")


def _from_lane(value: Expr, distance: int) -> Expr:
    """`value` of the lane whose number differs in the bit `distance`."""
    return T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), value, distance, LANES, LANES)


# Parsing a kernel takes longer than all else that lowering does for a layer, and layers are alike.
@functools.cache
def append_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """(k, v [n, heads, dim], slots [n], *page tensors) -> page tensors, written in place.

    One warp per token, KV head and tensor. n must not be 0.
    """
    check_shape(shape)
    heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size
    steps = math.ceil(dim / LANES)

    # fmt: off
    @T.macro
    def store(x, slots, pages, scales, token, head, lane):
        slot = local(1, dtype="int32")
        block = local(1, dtype="int64")
        largest = local(1)
        slot[0] = slots[token] % page
        block[0] = T.cast(slots[token] // page, "int64")
        if format.scaled:
            largest[0] = T.float32(1e-20)
            for i in T.unroll(steps):
                if i * LANES + lane < dim:
                    largest[0] = T.max(
                        largest[0], T.abs(T.cast(x[token, head, i * LANES + lane], "float32")))
            for k in T.unroll(5):
                largest[0] = T.max(largest[0], _from_lane(largest[0], T.shift_left(1, k)))
            largest[0] = largest[0] * T.float32(1 / E4M3_MAX)
            if lane == 0:
                scales[block[0], head, slot[0]] = largest[0]
        for i in T.unroll(steps):
            if i * LANES + lane < dim:
                pages[block[0], head, slot[0], i * LANES + lane] = (
                    encode_e4m3(T.cast(x[token, head, i * LANES + lane], "float32") / largest[0])
                    if format.scaled
                    else T.cast(x[token, head, i * LANES + lane], format.dtype))

    @T.macro
    def run(k, v, slots, k_pages, v_pages, k_scales, v_scales, n):
        for token in T.thread_binding(n, thread="blockIdx.x"):
            for head in T.thread_binding(heads, thread="blockIdx.y"):
                for tensor in T.thread_binding(2, thread="threadIdx.y"):
                    for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                        if tensor == 0:
                            with T.sblock("append_k"):
                                store(k, slots, k_pages, k_scales, token, head, lane)
                        else:
                            with T.sblock("append_v"):
                                store(v, slots, v_pages, v_scales, token, head, lane)

    if format.scaled:

        @T.prim_func(s_tir=True)
        def append_scaled(
            k_h: T.handle, v_h: T.handle, slots_h: T.handle, k_pages_h: T.handle,
            v_pages_h: T.handle, k_scales_h: T.handle, v_scales_h: T.handle,
        ):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            n, pages = T.int32(), T.int64()
            k = T.match_buffer(k_h, (n, heads, dim), dtype)
            v = T.match_buffer(v_h, (n, heads, dim), dtype)
            slots = T.match_buffer(slots_h, (n,), "int32")
            k_pages = T.match_buffer(k_pages_h, (pages, heads, page, dim), format.dtype)
            v_pages = T.match_buffer(v_pages_h, (pages, heads, page, dim), format.dtype)
            k_scales = T.match_buffer(k_scales_h, (pages, heads, page), "float32")
            v_scales = T.match_buffer(v_scales_h, (pages, heads, page), "float32")
            run(k, v, slots, k_pages, v_pages, k_scales, v_scales, n)

        return append_scaled.without_attr("global_symbol")

    @T.prim_func(s_tir=True)
    def append(
        k_h: T.handle, v_h: T.handle, slots_h: T.handle, k_pages_h: T.handle, v_pages_h: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, pages = T.int32(), T.int64()
        k = T.match_buffer(k_h, (n, heads, dim), dtype)
        v = T.match_buffer(v_h, (n, heads, dim), dtype)
        slots = T.match_buffer(slots_h, (n,), "int32")
        k_pages = T.match_buffer(k_pages_h, (pages, heads, page, dim), format.dtype)
        v_pages = T.match_buffer(v_pages_h, (pages, heads, page, dim), format.dtype)
        run(k, v, slots, k_pages, v_pages, k_pages, v_pages, n)
    # fmt: on

    return append.without_attr("global_symbol")


@functools.cache
def attend_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """Attention of n query rows over the pages of their sequences, with an online softmax.

    (q [n, q_heads, dim], positions [n], row_offsets [b + 1], page_offsets [b + 1], page_ids [p],
    kv_lengths [b], dropped [b], *page tensors, sink_logits [q_heads] float32 if the shape has them)
    -> [n, q_heads, dim]. n must not be 0.
    """
    check_shape(shape)
    heads, q_heads, dim, page = shape.kv_heads, shape.q_heads, shape.head_dim, shape.page_size
    window, sinks, cap = shape.window, shape.sinks, shape.cap
    # Tokens of the pages in front of the gap that dropped pages leave.
    sink_tokens = math.ceil(sinks / page) * page
    steps = math.ceil(dim / LANES)  # a lane has the elements lane, lane + 32, ...
    threads = WARPS * LANES
    ratio = q_heads // heads
    # Query heads of one block; a large group is split over several.
    share = max(g for g in range(1, ratio + 1) if ratio % g == 0 and g * steps <= MAX_ACCUMULATORS)
    parts = ratio // share
    factor = shape.exponent_scale  # the softmax uses the GPU's own exp2

    def element(i: Expr, lane: Expr) -> Expr:
        """The index of a lane's i-th element; the last one again where the head has no such."""
        return i * LANES + lane if dim % LANES == 0 else T.min(i * LANES + lane, dim - 1)

    def stored(value: Expr) -> Expr:
        return decode_e4m3(value) if format.scaled else T.cast(value, "float32")

    # fmt: off
    @T.macro
    def find_sequence(token, batch, row_offsets, half):
        """half[0] = the last sequence that starts at or before the token."""
        half[0] = 0
        half[1] = batch
        while half[1] - half[0] > 1:
            if row_offsets[(half[0] + half[1]) // 2] <= token:
                half[0] = (half[0] + half[1]) // 2
            else:
                half[1] = (half[0] + half[1]) // 2

    @T.macro
    def visible_range(position, length, gap, see):
        """The query sees see[2] cached tokens: the first see[0] and those from see[1] on.

        Token j of the cache has the position j before the gap, and j + gap from sink_tokens on,
        where new tokens always are.
        """
        see[2] = T.min(length, position - gap + 1)
        if window > 0:
            see[0] = T.min(sinks, see[2])
            see[1] = position - window + 1
            see[1] = T.max(see[0], T.if_then_else(
                see[1] <= sink_tokens, see[1], T.max(see[1] - gap, sink_tokens)))
            see[2] = see[0] + T.max(see[2] - see[1], 0)
        else:
            see[0] = 0
            see[1] = 0

    @T.macro
    def load_query(q, token, head, lane, query):
        for g in T.unroll(share):
            for i in T.unroll(steps):
                query[g, i] = T.if_then_else(
                    i * LANES + lane < dim,
                    T.cast(q[token, head + g, element(i, lane)], "float32") * T.float32(factor),
                    T.float32(0))

    @T.macro
    def load_token(k_pages, v_pages, k_scales, v_scales, block, head, slot, lane, keys, values):
        for i in T.unroll(steps):
            keys[i] = stored(k_pages[block, head, slot, element(i, lane)])
            values[i] = stored(v_pages[block, head, slot, element(i, lane)])
            if format.scaled:
                keys[i] = keys[i] * k_scales[block, head, slot]
                values[i] = values[i] * v_scales[block, head, slot]

    @T.macro
    def add_token(query, keys, values, best, norm, total):
        """Account for one cached token in a warp's running softmax."""
        for g in T.unroll(share):
            score = local(1)
            weight = local(2)
            score[0] = T.float32(0)
            for i in T.unroll(steps):
                score[0] += query[g, i] * keys[i]
            for k in T.unroll(5):
                score[0] = score[0] + _from_lane(score[0], T.shift_left(1, k))
            if cap > 0:
                score[0] = T.float32(cap * LOG2E) - T.float32(2 * cap * LOG2E) / (
                    T.float32(1) + T.exp2(score[0]))
            weight[0] = T.max(best[g], score[0])
            weight[1] = T.exp2(best[g] - weight[0])
            best[g] = weight[0]
            weight[0] = T.exp2(score[0] - best[g])
            norm[g] = norm[g] * weight[1] + weight[0]
            for i in T.unroll(steps):
                total[g, i] = total[g, i] * weight[1] + values[i] * weight[0]

    @T.macro
    def attend_as_warp(q, positions, row_offsets, page_offsets, page_ids, kv_lengths, dropped,
                       k_pages, v_pages, k_scales, v_scales, batch,
                       token, part, warp, lane, best, norm, total):
        """Every WARPS-th of the tokens that the query sees."""
        half = local(2, dtype="int32")
        see = local(3, dtype="int32")
        at = local(2, dtype="int32")
        query = local(share, steps)
        keys = local(steps)
        values = local(steps)
        find_sequence(token, batch, row_offsets, half)
        visible_range(positions[token], kv_lengths[half[0]], dropped[half[0]], see)
        load_query(q, token, part * share, lane, query)
        for g in T.unroll(share):
            best[g] = T.float32(NO_SCORE)
            norm[g] = T.float32(0)
            for i in T.unroll(steps):
                total[g, i] = T.float32(0)
        for step in T.serial((see[2] - warp + WARPS - 1) // WARPS):
            at[0] = step * WARPS + warp
            if window > 0:
                at[0] = T.if_then_else(at[0] < see[0], at[0], see[1] + at[0] - see[0])
            at[1] = page_ids[page_offsets[half[0]] + at[0] // page]
            load_token(k_pages, v_pages, k_scales, v_scales, T.cast(at[1], "int64"),
                       part // parts, at[0] % page, lane, keys, values)
            add_token(query, keys, values, best, norm, total)

    @T.macro
    def publish(warp, lane, best, norm, total, all_best, all_norm, all_total):
        for g in T.unroll(share):
            for i in T.unroll(steps):
                if i * LANES + lane < dim:
                    all_total[warp, g, i * LANES + lane] = total[g, i]
            if lane == 0:
                all_best[warp, g] = best[g]
                all_norm[warp, g] = norm[g]

    @T.macro
    def merge(all_best, all_norm, all_total, sink_logits, head, g, d, merged):
        """merged[1] and merged[2]: sum of weights, and of weighted values, over all warps."""
        merged[0] = T.float32(NO_SCORE)
        merged[1] = T.float32(0)
        merged[2] = T.float32(0)
        if shape.sink_logits:
            merged[0] = sink_logits[head + g] * T.float32(LOG2E)
        for w in T.unroll(WARPS):
            merged[0] = T.max(merged[0], all_best[w, g])
        if shape.sink_logits:
            merged[1] = T.exp2(sink_logits[head + g] * T.float32(LOG2E) - merged[0])
        for w in T.unroll(WARPS):
            merged[1] += all_norm[w, g] * T.exp2(all_best[w, g] - merged[0])
            merged[2] += all_total[w, g, d] * T.exp2(all_best[w, g] - merged[0])

    @T.macro
    def run(q, positions, row_offsets, page_offsets, page_ids, kv_lengths, dropped,
            k_pages, v_pages, k_scales, v_scales, sink_logits, out, n, batch):
        for token in T.thread_binding(n, thread="blockIdx.x"):
            for part in T.thread_binding(heads * parts, thread="blockIdx.y"):
                for warp in T.thread_binding(WARPS, thread="threadIdx.y"):
                    for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                        with T.sblock("attend"):
                            best = local(share)
                            norm = local(share)
                            total = local(share, steps)
                            merged = local(3)
                            all_best = shared(WARPS, share)
                            all_norm = shared(WARPS, share)
                            all_total = shared(WARPS, share, dim)
                            attend_as_warp(
                                q, positions, row_offsets, page_offsets, page_ids, kv_lengths,
                                dropped, k_pages, v_pages, k_scales, v_scales, batch,
                                token, part, warp, lane, best, norm, total)
                            publish(warp, lane, best, norm, total, all_best, all_norm, all_total)
                            T.tvm_storage_sync("shared")
                            for i in T.serial((share * dim + threads - 1) // threads):
                                r: T.let[T.int32] = i * threads + warp * LANES + lane
                                if r < share * dim:
                                    merge(all_best, all_norm, all_total, sink_logits, part * share,
                                          r // dim, r % dim, merged)
                                    out[token, part * share + r // dim, r % dim] = T.cast(
                                        merged[2] / merged[1], dtype)

    @T.prim_func(s_tir=True)
    def attend(
        q_h: T.handle, positions_h: T.handle, row_offsets_h: T.handle, page_offsets_h: T.handle,
        page_ids_h: T.handle, kv_lengths_h: T.handle, dropped_h: T.handle, k_pages_h: T.handle,
        v_pages_h: T.handle, k_scales_h: T.handle, v_scales_h: T.handle, sink_logits_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, batch, table, pages = T.int32(), T.int32(), T.int32(), T.int64()
        q = T.match_buffer(q_h, (n, q_heads, dim), dtype)
        positions = T.match_buffer(positions_h, (n,), "int32")
        row_offsets = T.match_buffer(row_offsets_h, (batch + 1,), "int32")
        page_offsets = T.match_buffer(page_offsets_h, (batch + 1,), "int32")
        page_ids = T.match_buffer(page_ids_h, (table,), "int32")
        kv_lengths = T.match_buffer(kv_lengths_h, (batch,), "int32")
        dropped = T.match_buffer(dropped_h, (batch,), "int32")
        k_pages = T.match_buffer(k_pages_h, (pages, heads, page, dim), format.dtype)
        v_pages = T.match_buffer(v_pages_h, (pages, heads, page, dim), format.dtype)
        k_scales = T.match_buffer(k_scales_h, (pages, heads, page), "float32")
        v_scales = T.match_buffer(v_scales_h, (pages, heads, page), "float32")
        sink_logits = T.match_buffer(sink_logits_h, (q_heads,), "float32")
        out = T.match_buffer(out_h, (n, q_heads, dim), dtype)
        run(q, positions, row_offsets, page_offsets, page_ids, kv_lengths, dropped,
            k_pages, v_pages, k_scales, v_scales, sink_logits, out, n, batch)
    # fmt: on

    absent = set() if format.scaled else {"k_scales", "v_scales"}
    absent |= set() if shape.sink_logits else {"sink_logits"}
    params = [param for param in attend.params if param.name not in absent]
    kernel = tirx.PrimFunc(params, attend.body, attend.ret_type, attend.attrs)
    return kernel.without_attr("global_symbol")
