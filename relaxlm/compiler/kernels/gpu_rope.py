"""From the products that are q, k and v to rotated queries and pages on GPUs of any kind.

One kernel, a workgroup for each head of each token. Pages are those of `gpu_attention`.
"""

import functools
from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.gpu_attention import page_tensors
from relaxlm.compiler.kernels.gpu_tiles import length, private, put, shared
from relaxlm.compiler.kernels.rope import RopeOptions
from relaxlm.compiler.kernels.workgroup import MOST_BUFFERS, grid, reduce, when
from relaxlm.quantization.kv_cache import KVFormat

THREADS = 64


@functools.cache  # every layer asks
def rope_append_kernel(
    shape: AttentionShape, format: KVFormat, options: RopeOptions
) -> tirx.PrimFunc | None:
    """Normalize q and k, rotate them, append k and v to their pages.

    (*products [n, width], [q_norm, k_norm [dim],] [turns [n, turned] float32,]
    [factor [n] float32,] slots [n], *page tensors) -> q [n, q_heads, dim], and the page tensors
    written in place. `turns` has the cosines, then the sines. What does not apply is left out. n
    must not be 0.

    Returns:
        None where a kernel cannot have so many buffers.
    """
    assert not any(options.biases), "products have their biases already"
    heads, kv_heads, dim = shape.q_heads, shape.kv_heads, shape.head_dim
    half, page = options.turned // 2, shape.page_size
    flags = [options.norm, options.norm, half, options.scaled]
    if len(options.widths) + sum(map(bool, flags)) + 4 > MOST_BUFFERS:
        return None

    def body() -> None:
        n, held = length("n"), length("pages")
        products = [
            tensor(f"x{i}", (n, width), options.dtype) for i, width in enumerate(options.widths)
        ]
        norms: list[tirx.Buffer | None] = [None, None, None]
        if options.norm:
            norms[:2] = [tensor(name, (dim,), options.norm) for name in ("q_norm", "k_norm")]
        turns = tensor("turns", (n, options.turned), "float32") if half else None
        factor = tensor("factor", (n,), "float32") if options.scaled else None
        slots = tensor("slots", (n,), "int32")
        pages = [
            tensor(f"{spec.name}_pages", (held, *spec.page_shape), spec.dtype)
            for spec in page_tensors(shape, format)
        ]
        q = tensor("q", (n, heads, dim), options.dtype)

        with grid([n, heads + 2 * kv_heads], THREADS) as (token, place, t):
            slot = slots[token]

            def store(part: int, head: Expr, d: Expr, value: Expr) -> None:
                if part == 0:
                    scaled = value if factor is None else value * factor[token]
                    T.buffer_store(q, T.cast(scaled, options.dtype), [token, head, d])
                    return
                at = [slot // page, head, slot % page, d]
                T.buffer_store(pages[part - 1], T.cast(value, format.dtype), at)

            def each(count: int, one) -> None:
                with T.serial(-(-count // THREADS)) as step:
                    i = step * THREADS + t
                    with when(True if count % THREADS == 0 else i < count):
                        one(i)

            spread = private(1)

            def raw(part: int, head: Expr, d: Expr) -> Expr:
                product, first = options.places[part]
                return T.cast(products[product][token, first + head * dim + d], "float32")

            def add_squares(part: int, head: Expr) -> None:
                def add(d: Expr) -> None:
                    put(spread, spread[0] + raw(part, head, d) * raw(part, head, d))

                each(dim, add)

            def write(part: int, head: Expr) -> None:
                norm, turned = norms[part], options.turned if part < 2 else 0

                def value(d: Expr) -> Expr:
                    if norm is None:
                        return raw(part, head, d)
                    return raw(part, head, d) * spread[0] * T.cast(norm[d], "float32")

                def pair(i: Expr) -> None:
                    assert turns is not None
                    a, b = (2 * i, 2 * i + 1) if options.in_pairs else (i, i + half)
                    x, y = private(1), private(1)
                    put(x, value(a))
                    put(y, value(b))
                    c, s = turns[token, i], turns[token, half + i]
                    store(part, head, a, x[0] * c - y[0] * s)
                    store(part, head, b, y[0] * c + x[0] * s)

                if turned:
                    each(turned // 2, pair)
                if turned < dim:
                    each(
                        dim - turned,
                        lambda i: store(part, head, turned + i, value(turned + i)),
                    )

            def with_head(one: Callable[[int, Expr], None]) -> None:
                with T.If(place < heads):
                    with T.Then():
                        one(0, place)
                    with T.Else(), T.If(place < heads + kv_heads):
                        with T.Then():
                            one(1, place - heads)
                        with T.Else():
                            one(2, place - heads - kv_heads)

            if options.norm:
                # Values have no norm, but wait with the others: PoCL 3.1 is wrong about threads
                # that meet in these branches, though all of them take the same one.
                sums = shared(THREADS)
                put(spread, 0.0)
                with_head(add_squares)
                put(sums, spread[0], t)
                reduce([sums], t, t, THREADS)
                mean = sums[0] / T.float32(dim) + T.float32(options.eps)
                put(spread, T.float32(1) / T.sqrt(mean))
            with_head(write)

    return emit(body)
