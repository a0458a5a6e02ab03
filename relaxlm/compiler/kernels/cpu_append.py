"""Append to the pages of a KV cache on CPUs.

A page holds `PAGE_SIZE` tokens of one layer. Keys are stored transposed, [heads, head_dim, page],
so that one vector register holds the same feature of all tokens of a page and no horizontal sums
are needed; values are [heads, page, head_dim]. Scales of an fp8 cache are [heads, page].
"""

import functools
import math
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels import attention
from relaxlm.compiler.kernels.attention import AttentionShape, PageTensor
from relaxlm.compiler.kernels.builder import emit, flat, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_float8 import encode_e4m3
from relaxlm.compiler.kernels.vector import reduce_max, splat, to_float32, vector
from relaxlm.quantization.kv_cache import E4M3_MAX, KVFormat


def page_tensors(shape: AttentionShape, format: KVFormat) -> tuple[PageTensor, ...]:
    """The tensors that one layer's cache is made of, each with a leading axis of pages."""
    return attention.page_tensors(shape, format, keys_transposed=True)


@dataclass(frozen=True)
class PageWriter:
    """The page tensors as parameters of a kernel; only an fp8 cache has scales."""

    shape: AttentionShape
    format: KVFormat
    k: tirx.Buffer
    v: tirx.Buffer
    k_scales: tirx.Buffer | None
    v_scales: tirx.Buffer | None

    @staticmethod
    def declare(shape: AttentionShape, format: KVFormat) -> "PageWriter":
        """Declare the parameters, in the order of `page_tensors`."""
        total = length("pages")
        k, v, *scales = (
            tensor(spec.name, (total, *spec.page_shape), spec.dtype)
            for spec in page_tensors(shape, format)
        )
        return PageWriter(shape, format, k, v, *(scales or (None, None)))

    @property
    def lanes(self) -> int:
        return math.gcd(self.shape.head_dim, 16)

    def store(self, slot: Expr, head: Expr, key: tirx.Buffer, value: tirx.Buffer) -> None:
        """Put the key and value [dim] float32 of a token and KV head into its place."""
        heads, dim, page = self.shape.kv_heads, self.shape.head_dim, self.shape.page_size
        place, keys = slot % page, flat(self.k)
        # 64 bits: a cache may hold more than 2**31 elements.
        at = [T.Cast("int64", slot // page), head]
        first = (at[0] * heads + T.Cast("int64", head)) * (dim * page) + place

        def key_place(i: Expr) -> tuple[tirx.Buffer, list]:
            start = first + T.Cast("int64", i) * page
            return keys, [T.ramp(start, page, self.lanes) if self.lanes > 1 else start]

        def value_place(i: Expr) -> tuple[tirx.Buffer, list]:
            return self.v, [*at, place, T.ramp(i, 1, self.lanes) if self.lanes > 1 else i]

        self._store(key, self.k_scales, [*at, place], key_place)
        self._store(value, self.v_scales, [*at, place], value_place)

    def _store(self, row: tirx.Buffer, scales: tirx.Buffer | None, at_scale: list, place) -> None:
        lanes = self.lanes

        def loaded(i: Expr) -> Expr:
            return row.vload([i * lanes], vector("float32", lanes))

        def put(i: Expr, codes: Expr) -> None:
            pages, index = place(i * lanes)
            T.buffer_store(pages, codes, index)

        if scales is None:
            with T.serial(self.shape.head_dim // lanes) as i:
                put(i, T.cast(loaded(i), vector(self.format.dtype, lanes)))
            return
        largest, scale = scratch(lanes, "float32"), scratch(1, "float32")
        T.buffer_store(largest, splat(1e-20, lanes), [_span(0, lanes)])
        with T.serial(self.shape.head_dim // lanes) as i:
            most = T.max(largest.vload([0], vector("float32", lanes)), T.abs(loaded(i)))
            T.buffer_store(largest, most, [_span(0, lanes)])
        most = reduce_max(largest.vload([0], vector("float32", lanes))) if lanes > 1 else largest[0]
        T.buffer_store(scale, most * T.float32(1 / E4M3_MAX), [0])
        T.buffer_store(scales, scale[0], at_scale)
        with T.serial(self.shape.head_dim // lanes) as i:
            put(i, encode_e4m3(loaded(i) / splat(scale[0], lanes), lanes))


def _span(start: Expr | int, lanes: int) -> Expr | int:
    return T.ramp(start, 1, lanes) if lanes > 1 else start


@functools.cache  # every layer asks
def append_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """(k, v [n, heads, dim], slots [n], *page tensors) -> page tensors, written in place."""
    heads, dim = shape.kv_heads, shape.head_dim

    def body() -> None:
        n = length("n")
        k, v = (tensor(name, (n, heads, dim), dtype) for name in ("key", "value"))
        slots = tensor("slots", (n,), "int32")
        pages = PageWriter.declare(shape, format)
        lanes = pages.lanes
        with T.parallel(n) as token:
            rows = [scratch(dim, "float32") for _ in range(2)]
            with T.serial(heads) as head:
                for source, row in zip((k, v), rows, strict=True):
                    with T.serial(dim // lanes) as i:
                        loaded = source.vload([token, head, i * lanes], vector(dtype, lanes))
                        T.buffer_store(row, to_float32(loaded, lanes), [_span(i * lanes, lanes)])
                pages.store(slots[token], head, *rows)

    return emit(body)
