"""Attention of encoders for CUDA: every token of a text against all of its tokens.

One block per token and query head. The block's warps share out the text's tokens, the lanes of a
warp the head's elements; every warp keeps a running softmax in float32, and the block merges them
at the end. Arguments are those of `cpu_encoder_attention`.

A plain kernel: keys and values are read again for every token, without tensor cores.
"""

import functools
import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.cuda_attention import check_shape
from relaxlm.compiler.kernels.cuda_script import (
    ALL_LANES,
    LANES,
    NO_SCORE,
    WARPS,
    local,
    shared,
)


@functools.cache
def attend_kernel(shape: AttentionShape, dtype: str) -> tirx.PrimFunc:
    """Bidirectional attention over ragged texts, with an online softmax.

    (qkv [n, q_heads + 2 kv_heads, dim], row_offsets [b + 1]) -> [n, q_heads * dim]. n must not be
    0.

    Raises:
        UnsupportedError: heads of a size that the kernels of CUDA do not take.
    """
    check_shape(shape)
    q_heads, kv_heads, dim = shape.q_heads, shape.kv_heads, shape.head_dim
    share, heads = q_heads // kv_heads, q_heads + 2 * kv_heads
    steps = math.ceil(dim / LANES)  # a lane has the elements lane, lane + 32, ...
    threads, factor = WARPS * LANES, shape.exponent_scale

    def element(i: Expr, lane: Expr) -> Expr:
        """The index of a lane's i-th element; the last one again where the head has no such."""
        return T.min(i * LANES + lane, dim - 1)

    # fmt: off
    @T.macro
    def find_text(token, batch, row_offsets, half):
        """half[0] = the last text that starts at or before the token."""
        half[0] = 0
        half[1] = batch
        while half[1] - half[0] > 1:
            if row_offsets[(half[0] + half[1]) // 2] <= token:
                half[0] = (half[0] + half[1]) // 2
            else:
                half[1] = (half[0] + half[1]) // 2

    @T.macro
    def attend_as_warp(qkv, row_offsets, batch, token, head, warp, lane, best, norm, total):
        """Every WARPS-th token of the text."""
        half = local(2, dtype="int32")
        query = local(steps)
        score = local(1)
        weight = local(2)
        find_text(token, batch, row_offsets, half)
        best[0] = T.float32(NO_SCORE)
        norm[0] = T.float32(0)
        for i in T.unroll(steps):
            total[i] = T.float32(0)
            query[i] = T.if_then_else(
                i * LANES + lane < dim,
                T.cast(qkv[token, head, element(i, lane)], "float32") * T.float32(factor),
                T.float32(0))
        half[1] = row_offsets[half[0] + 1]
        half[0] = row_offsets[half[0]]
        for step in T.serial((half[1] - half[0] - warp + WARPS - 1) // WARPS):
            row: T.let[T.int32] = half[0] + step * WARPS + warp
            score[0] = T.float32(0)
            for i in T.unroll(steps):
                score[0] += query[i] * T.cast(
                    qkv[row, q_heads + head // share, element(i, lane)], "float32")
            for k in T.unroll(5):
                score[0] = score[0] + T.tvm_warp_shuffle_xor(
                    T.uint32(ALL_LANES), score[0], T.shift_left(1, k), LANES, LANES)
            weight[0] = T.max(best[0], score[0])
            weight[1] = T.exp2(best[0] - weight[0])
            best[0] = weight[0]
            weight[0] = T.exp2(score[0] - best[0])
            norm[0] = norm[0] * weight[1] + weight[0]
            for i in T.unroll(steps):
                total[i] = total[i] * weight[1] + weight[0] * T.cast(
                    qkv[row, q_heads + kv_heads + head // share, element(i, lane)], "float32")

    @T.macro
    def publish(warp, lane, best, norm, total, all_best, all_norm, all_total):
        for i in T.unroll(steps):
            if i * LANES + lane < dim:
                all_total[warp, i * LANES + lane] = total[i]
        if lane == 0:
            all_best[warp] = best[0]
            all_norm[warp] = norm[0]

    @T.macro
    def merge(all_best, all_norm, all_total, d, merged):
        """merged[1] and merged[2]: sum of weights, and of weighted values, over all warps."""
        merged[0] = T.float32(NO_SCORE)
        merged[1] = T.float32(0)
        merged[2] = T.float32(0)
        for w in T.unroll(WARPS):
            merged[0] = T.max(merged[0], all_best[w])
        for w in T.unroll(WARPS):
            merged[1] += all_norm[w] * T.exp2(all_best[w] - merged[0])
            merged[2] += all_total[w, d] * T.exp2(all_best[w] - merged[0])

    @T.prim_func(s_tir=True)
    def attend(qkv_h: T.handle, row_offsets_h: T.handle, out_h: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, offsets = T.int32(), T.int32()
        qkv = T.match_buffer(qkv_h, (n, heads, dim), dtype)
        row_offsets = T.match_buffer(row_offsets_h, (offsets,), "int32")
        out = T.match_buffer(out_h, (n, q_heads * dim), dtype)
        for token in T.thread_binding(n, thread="blockIdx.x"):
            for head in T.thread_binding(q_heads, thread="blockIdx.y"):
                for warp in T.thread_binding(WARPS, thread="threadIdx.y"):
                    for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                        with T.sblock("attend"):
                            best = local(1)
                            norm = local(1)
                            total = local(steps)
                            merged = local(3)
                            all_best = shared(WARPS)
                            all_norm = shared(WARPS)
                            all_total = shared(WARPS, dim)
                            attend_as_warp(
                                qkv, row_offsets, offsets - 1, token, head, warp, lane,
                                best, norm, total)
                            publish(warp, lane, best, norm, total, all_best, all_norm, all_total)
                            T.tvm_storage_sync("shared")
                            for i in T.serial((dim + threads - 1) // threads):
                                d: T.let[T.int32] = i * threads + warp * LANES + lane
                                if d < dim:
                                    merge(all_best, all_norm, all_total, d, merged)
                                    out[token, head * dim + d] = T.cast(
                                        merged[2] / merged[1], dtype)
    # fmt: on

    return attend.without_attr("global_symbol")
