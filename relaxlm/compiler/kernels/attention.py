"""What the attention kernels of every target agree on."""

import functools
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from relaxlm.compiler.kernels.vector import as_relax_kernel

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
def copy_kernel(page_shape: tuple[int, ...], dtype: str, kind: str) -> tirx.PrimFunc:
    """(pages [P, *page_shape], sources [k], targets [k]): pages[targets] = pages[sources].

    In place; no page is both a source and a target. One task, or block of threads, per page.
    """
    # Scales have one axis less than keys and values.
    a, b, c = page_shape if len(page_shape) == 3 else (1, *page_shape)
    flat = len(page_shape) == 2
    size, threads = a * b * c, 256

    def at(page, i):
        place = (page, i // (b * c), i // c % b, i % c)
        return (place[0], *place[2:]) if flat else place

    @T.macro
    def copy_one(pages, source, target, i):
        pages[at(target, i)] = pages[at(source, i)]

    @T.prim_func(s_tir=True, check_well_formed=False)
    def copy(pages_h: T.handle, sources_h: T.handle, targets_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        total, count = T.int64(), T.int64()
        pages = T.match_buffer(pages_h, (total, *page_shape), dtype)
        sources = T.match_buffer(sources_h, (count,), "int32")
        targets = T.match_buffer(targets_h, (count,), "int32")
        if kind == "cpu":
            for k in T.parallel(count):
                for i in T.serial(size):
                    copy_one(pages, sources[k], targets[k], i)
        else:
            for k in T.thread_binding(count, "blockIdx.x"):
                for t in T.thread_binding(threads, "threadIdx.x"):
                    for step in T.serial((size + threads - 1) // threads):
                        if step * threads + t < size:
                            copy_one(pages, sources[k], targets[k], step * threads + t)

    return as_relax_kernel(copy)
