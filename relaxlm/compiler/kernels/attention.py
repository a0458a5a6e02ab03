"""What the attention kernels of every target agree on."""

import functools
import math
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

# Tokens per page: one AVX-512 register, or two to four smaller ones, hold a feature of a page.
PAGE_SIZE = 16


@dataclass(frozen=True)
class AttentionShape:
    """Everything that is fixed when an attention kernel is compiled.

    `window` and `sinks` are in tokens; a window of 0 means full attention. `scale` multiplies the
    scores before the softmax.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    window: int
    sinks: int
    scale: float
    page_size: int = PAGE_SIZE


@dataclass(frozen=True)
class PageTensor:
    """One tensor of a layer's cache: [pages, *page_shape] of `dtype`."""

    name: str
    page_shape: tuple[int, ...]
    dtype: str


@functools.cache  # parsing TVMScript takes 0.2 s, and every layer asks
def copy_kernel(page_shape: tuple[int, ...], dtype: str) -> tirx.PrimFunc:
    """(pages [P, *page_shape], sources [k], targets [k]): pages[targets] = pages[sources].

    In place, and in plain blocks, which the schedule rules of every target know how to spread.
    """
    rows, columns = page_shape[0], math.prod(page_shape[1:-1])
    last = page_shape[-1]

    if len(page_shape) == 2:

        @T.prim_func(s_tir=True)
        def copy_scales(pages_h: T.handle, sources_h: T.handle, targets_h: T.handle):
            T.func_attr({"tirx.noalias": True})
            total, count = T.int64(), T.int64()
            pages = T.match_buffer(pages_h, (total, rows, last), dtype)
            sources = T.match_buffer(sources_h, (count,), "int32")
            targets = T.match_buffer(targets_h, (count,), "int32")
            for i, a, c in T.grid(count, rows, last):
                with T.sblock("copy"):
                    at, row, column = T.axis.remap("SSS", [i, a, c])
                    pages[targets[at], row, column] = pages[sources[at], row, column]

        return copy_scales.without_attr("global_symbol")

    @T.prim_func(s_tir=True)
    def copy(pages_h: T.handle, sources_h: T.handle, targets_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        total, count = T.int64(), T.int64()
        pages = T.match_buffer(pages_h, (total, rows, columns, last), dtype)
        sources = T.match_buffer(sources_h, (count,), "int32")
        targets = T.match_buffer(targets_h, (count,), "int32")
        for i, a, b, c in T.grid(count, rows, columns, last):
            with T.sblock("copy"):
                at, row, middle, column = T.axis.remap("SSSS", [i, a, b, c])
                pages[targets[at], row, middle, column] = pages[sources[at], row, middle, column]

    return copy.without_attr("global_symbol")
