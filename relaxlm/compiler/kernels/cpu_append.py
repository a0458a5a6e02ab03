"""Append to the pages of a KV cache on CPUs.

A page holds `PAGE_SIZE` tokens of one layer. Keys are stored transposed, [heads, head_dim, page],
so that one vector register holds the same feature of all tokens of a page and no horizontal sums
are needed; values are [heads, page, head_dim]. Scales of an fp8 cache are [heads, page].
"""

import functools

from tvm import tirx
from tvm.script import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape, PageTensor
from relaxlm.compiler.kernels.cpu_float8 import encode_e4m3
from relaxlm.compiler.kernels.vector import as_relax_kernel
from relaxlm.quantization.kv_cache import E4M3_MAX, KVFormat


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


def store_macro(shape: AttentionShape, format: KVFormat):
    """A TVMScript macro that puts the key and value of one token and head into their page.

    (head, slot, k [dim], v [dim] float32, k_pages, v_pages, k_scales, v_scales); the scales are
    those of an fp8 cache, else never touched.
    """
    dim, page = shape.head_dim, shape.page_size

    def code(value):
        return encode_e4m3(value) if format.scaled else T.cast(value, format.dtype)

    @T.macro
    def store(head, slot, k, v, k_pages, v_pages, k_scales, v_scales):
        if format.scaled:
            largest = T.decl_buffer((2,), "float32", scope="global")
            largest[0] = T.float32(1e-20)
            largest[1] = T.float32(1e-20)
            for d in T.serial(dim):
                largest[0] = T.max(largest[0], T.abs(k[d]))
                largest[1] = T.max(largest[1], T.abs(v[d]))
            k_scales[slot // page, head, slot % page] = largest[0] * T.float32(1 / E4M3_MAX)
            v_scales[slot // page, head, slot % page] = largest[1] * T.float32(1 / E4M3_MAX)
            for d in T.serial(dim):
                k[d] = k[d] / (largest[0] * T.float32(1 / E4M3_MAX))
                v[d] = v[d] / (largest[1] * T.float32(1 / E4M3_MAX))
        for d in T.serial(dim):
            k_pages[slot // page, head, d, slot % page] = code(k[d])
        for d in T.serial(dim):
            v_pages[slot // page, head, slot % page, d] = code(v[d])

    return store


@functools.cache  # parsing TVMScript takes 0.2 s, and every layer asks
def append_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """(k, v [n, heads, dim], slots [n], *page tensors) -> page tensors, written in place."""
    heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size

    store = store_macro(shape, format)

    @T.macro
    def append_token(k, v, slot, token, k_pages, v_pages, k_scales, v_scales):
        key = T.decl_buffer((dim,), "float32", scope="global")
        value = T.decl_buffer((dim,), "float32", scope="global")
        for head in T.serial(heads):
            for d in T.serial(dim):
                key[d] = T.cast(k[token, head, d], "float32")
                value[d] = T.cast(v[token, head, d], "float32")
            store(head, slot, key, value, k_pages, v_pages, k_scales, v_scales)

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
                append_token(k, v, slots[token], token, k_pages, v_pages, k_scales, v_scales)

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
            append_token(k, v, slots[token], token, k_pages, v_pages, k_pages, v_pages)

    return as_relax_kernel(append)
