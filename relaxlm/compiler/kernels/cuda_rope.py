"""From the products that are q, k and v to rotated queries and pages on GPUs, in one kernel.

The code is in `kernels/cuda/rope.cuh`. Pages of keys and of values are alike (`page_tensors` of
`attention`).
"""

import functools
import math
from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape, page_tensors
from relaxlm.compiler.kernels.builder import length, tensor
from relaxlm.compiler.kernels.cuda_source import (
    C_TYPES,
    c_bool,
    device_call,
    grid,
    launches,
    shared_bytes,
    stored_type,
)
from relaxlm.compiler.kernels.rope import RopeOptions
from relaxlm.quantization.kv_cache import KVFormat

WARPS = 4
# Bytes that a lane reads at once, at most.
_WIDEST = 16


@functools.cache  # every layer asks
def append_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    """(k, v [n, heads, dim], slots [n], *page tensors) -> page tensors, written in place.

    n must not be 0.
    """
    heads, dim = shape.kv_heads, shape.head_dim
    width = heads * dim
    options = RopeOptions((width, width), ((0, 0), (0, 0), (1, 0)), (None, None), dtype=dtype)

    def body() -> None:
        n = length("n")
        products = [tensor(name, (n, heads, dim), dtype) for name in ("key", "value")]
        slots = tensor("slots", (n,), "int32")
        pages = _pages(shape, format)
        _launch(n, 0, shape, format, options, products, slots, pages, None, [], [], None)

    return launches(body)


@functools.cache
def rope_append_kernel(
    shape: AttentionShape, format: KVFormat, options: RopeOptions
) -> tirx.PrimFunc:
    """Normalize q and k, rotate them, append k and v to their pages.

    (*products [n, width], [q_norm, k_norm [dim],] [cos, sin [n, turned / 2] float32,]
    [factor [n] float32,] slots [n], *page tensors) -> q [n, q_heads, dim], and the page tensors
    written in place. What does not apply is left out. n must not be 0.
    """
    assert not any(options.biases), "products have their biases already"
    dim, half = shape.head_dim, options.turned // 2

    def body() -> None:
        n = length("n")
        products = [
            tensor(f"x{i}", (n, width), options.dtype) for i, width in enumerate(options.widths)
        ]
        norms = [
            tensor(name, (dim,), options.norm) for name in ("q_norm", "k_norm") if options.norm
        ]
        tables = [tensor(name, (n, half), "float32") for name in ("cos", "sin") if half]
        factor = tensor("factor", (n,), "float32") if options.scaled else None
        slots = tensor("slots", (n,), "int32")
        pages = _pages(shape, format)
        q = tensor("q", (n, shape.q_heads, dim), options.dtype)
        heads = shape.q_heads
        _launch(n, heads, shape, format, options, products, slots, pages, q, norms, tables, factor)

    return launches(body)


def _pages(shape: AttentionShape, format: KVFormat) -> list[tirx.Buffer]:
    held = length("pages")
    return [
        tensor(f"{spec.name}_pages", (held, *spec.page_shape), spec.dtype)
        for spec in page_tensors(shape, format)
    ]


def _launch(
    n: Expr,
    q_heads: int,
    shape: AttentionShape,
    format: KVFormat,
    options: RopeOptions,
    products: Sequence[tirx.Buffer],
    slots: tirx.Buffer,
    pages: Sequence[tirx.Buffer],
    q: tirx.Buffer | None,
    norms: Sequence[tirx.Buffer],
    tables: Sequence[tirx.Buffer],
    factor: tirx.Buffer | None,
) -> None:
    """Emit the kernel: what is not there is passed as something else, and not read."""
    kv_heads, dim = shape.kv_heads, shape.head_dim
    sources: list[Expr | int] = []
    for (number, first), heads in zip(options.places, (q_heads, kv_heads, kv_heads), strict=True):
        sources += [products[number].data, options.widths[number], first, heads]
    del sources[7]  # keys and values have as many heads
    k, v, *scales = (buffer.data for buffer in pages)
    weights = [buffer.data for buffer in norms] or [products[0].data] * 2
    cos, sin = [buffer.data for buffer in tables] or [slots.data] * 2
    types = ", ".join(
        (C_TYPES[options.dtype], stored_type(format), C_TYPES[options.norm or options.dtype])
    )
    flags = ", ".join(map(c_bool, (options.in_pairs, bool(norms), factor is not None)))
    numbers = f"{dim}, {neighbours(dim, options)}, {options.turned}"
    blocks = -(-(q_heads + 2 * kv_heads) // WARPS)
    with grid([n, blocks], WARPS) as (token, block):
        device_call(
            "rope.cuh",
            f"relaxlm::rope_append<relaxlm::Rope<{types}, {numbers}, {flags}>>",
            *sources,
            *weights,
            *(T.float32(options.eps), cos, sin),
            *(slots.data if factor is None else factor.data, slots.data),
            *(k, v, *(scales or (k, v))),
            *(products[0].data if q is None else q.data, token, block),
            shared_bytes(4 * WARPS * dim if options.turned else 0),
        )


def neighbours(dim: int, options: RopeOptions) -> int:
    """How many neighbouring features a lane takes: no more than keep all lanes of a warp busy."""
    places = (first for _, first in options.places)
    aligned = math.gcd(dim, *places, *options.widths)
    most = _WIDEST // (4 if options.dtype == "float32" else 2)
    return max(
        size
        for size in (1, 2, 4, 8)
        if aligned % size == 0 and size <= most and (size == 1 or 32 * size <= dim)
    )
