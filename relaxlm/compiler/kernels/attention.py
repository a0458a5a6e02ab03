"""What the attention kernels of every target agree on."""

import functools
import math
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.vector import LOG2E
from relaxlm.quantization.kv_cache import KVFormat

# Tokens per page: one AVX-512 register, or two to four smaller ones, hold a feature of a page.
PAGE_SIZE = 16


@dataclass(frozen=True)
class AttentionShape:
    """Everything that is fixed when an attention kernel is compiled.

    `window` and `sinks` are in tokens; a window of 0 means full attention. If it is `chunked`, a
    token sees those of its own chunk instead, of `window` tokens (Llama 4). `scale` multiplies the
    scores before the softmax; a `cap` other than 0 then makes them cap * tanh(score / cap)
    (Gemma 2, arXiv:2408.00118). With `sink_logits` every query head has a learned logit that the
    softmax counts like a token without a value (gpt-oss, arXiv:2508.10925). With `alibi` every
    query head has a slope, and its scores, capped or not, lose that much for every token that a key
    lies behind the query (ALiBi: Press et al. 2021, arXiv:2108.12409).
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    window: int
    sinks: int
    scale: float
    page_size: int = PAGE_SIZE
    cap: float = 0.0
    sink_logits: bool = False
    chunked: bool = False
    alibi: bool = False

    def oldest(self, query: Expr) -> Expr:
        """Position of the first token that one at position `query` sees, apart from sinks."""
        if self.chunked:
            return query - query % self.window
        return query - (self.window - 1)

    @property
    def exponent_scale(self) -> float:
        """What kernels multiply products by, which compute weights as powers of 2.

        With a cap, powers of 2 are those of tanh(x) = 1 - 2 / (1 + 2 ** (2 log2(e) x)).
        """
        return self.scale * LOG2E * (2 / self.cap if self.cap else 1)


@dataclass(frozen=True)
class PageTensor:
    """One tensor of a layer's cache: [pages, *page_shape] of `dtype`."""

    name: str
    page_shape: tuple[int, ...]
    dtype: str


def page_tensors(
    shape: AttentionShape, format: KVFormat, keys_transposed: bool = False
) -> tuple[PageTensor, ...]:
    """The tensors that one layer's cache is made of, each with a leading axis of pages.

    A page holds `PAGE_SIZE` tokens of one layer, [heads, page, head_dim], or, of transposed keys,
    [heads, head_dim, page]; the scales of an fp8 cache are [heads, page].
    """
    heads, dim, page = shape.kv_heads, shape.head_dim, shape.page_size
    tensors = [
        PageTensor(
            "k", (heads, dim, page) if keys_transposed else (heads, page, dim), format.dtype
        ),
        PageTensor("v", (heads, page, dim), format.dtype),
    ]
    if format.scaled:
        tensors += [PageTensor(name, (heads, page), "float32") for name in ("k_scale", "v_scale")]
    return tuple(tensors)


@functools.cache
def copy_kernel(page_shape: tuple[int, ...], dtype: str, kind: str) -> tirx.PrimFunc:
    """(pages [P, *page_shape], sources [k], targets [k]): pages[targets] = pages[sources].

    In place; no page is both a source and a target. One task, or block of threads, per page.
    """
    size, threads = math.prod(page_shape), 256

    def place(page: Expr, i: Expr) -> list[Expr]:
        inner = []
        for extent in reversed(page_shape):
            inner.append(i % extent)
            i = i // extent
        return [page, *reversed(inner)]

    def body() -> None:
        # WGSL has no 64-bit integers.
        index = "int32" if kind == "gpu" else "int64"
        total, count = tirx.Var("total", index), tirx.Var("count", index)
        pages = tensor("pages", (total, *page_shape), dtype)
        sources = tensor("sources", (count,), "int32")
        targets = tensor("targets", (count,), "int32")

        def copy_one(k: Expr, i: Expr) -> None:
            source, target = (T.cast(ids[k], index) for ids in (sources, targets))
            T.buffer_store(pages, pages[tuple(place(source, i))], place(target, i))

        if kind == "cpu":
            with T.parallel(count) as k, T.serial(size) as i:
                copy_one(k, i)
            return
        with (
            T.thread_binding(count, "blockIdx.x") as k,
            T.thread_binding(threads, "threadIdx.x") as t,
        ):
            with T.serial(-(-size // threads)) as step, T.If(step * threads + t < size), T.Then():
                copy_one(k, step * threads + t)

    return emit(body)
