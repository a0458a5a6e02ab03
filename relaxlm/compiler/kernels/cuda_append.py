"""Append to the pages of a KV cache on GPUs.

A page holds `PAGE_SIZE` tokens of one layer, [heads, page, head_dim] for keys as for values; the
scales of an fp8 cache are [heads, page].
"""

import functools
import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape, PageTensor
from relaxlm.compiler.kernels.cuda_float8 import encode_e4m3
from relaxlm.compiler.kernels.cuda_script import ALL_LANES, LANES, local
from relaxlm.quantization.kv_cache import E4M3_MAX, KVFormat


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


def _from_lane(value: Expr, distance: int) -> Expr:
    """`value` of the lane whose number differs in the bit `distance`."""
    return T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), value, distance, LANES, LANES)


# Parsing a kernel takes longer than all else that lowering does for a layer, and layers are alike.
@functools.cache
def append_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """(k, v [n, heads, dim], slots [n], *page tensors) -> page tensors, written in place.

    One warp per token, KV head and tensor. n must not be 0.
    """
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
