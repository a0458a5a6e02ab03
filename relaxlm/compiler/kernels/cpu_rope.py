"""From the products that are q, k and v to rotated queries and pages, in one kernel."""

import functools
import math
from functools import partial

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_append import PageWriter
from relaxlm.compiler.kernels.cpu_elementwise import emit_statistics, normalize, span
from relaxlm.compiler.kernels.rope import RopeOptions
from relaxlm.compiler.kernels.row_expression import Expression, Norm, Vector
from relaxlm.compiler.kernels.vector import (
    multiply_add,
    reduce_sum_ir,
    splat,
    spread,
    to_float32,
    vector,
)
from relaxlm.quantization.kv_cache import KVFormat

# Elements that one thread works through faster than several, whose tokens share cache lines.
SERIAL = 65536


@functools.cache  # every layer asks
def rope_append_kernel(
    shape: AttentionShape, format: KVFormat, options: RopeOptions
) -> tirx.PrimFunc:
    """Add the bias, normalize q and k, rotate them, append k and v to their pages.

    (*products [n, width], *biases [width], [q_norm, k_norm [dim],] [cos, sin [n, turned / 2],]
    [factor [n],] slots [n], *page tensors) -> q [n, q_heads, dim], and the page tensors written in
    place. What does not apply is left out.
    """
    q_heads, heads, dim = shape.q_heads, shape.kv_heads, shape.head_dim
    half = options.turned // 2
    # Of the part that turns, of the halves of it, and of all features.
    pair_lanes, half_lanes, lanes = (math.gcd(size, 16) for size in (options.turned, half, dim))

    def load(buffer: tirx.Buffer, *index: Expr | int, count: int = lanes) -> Expr:
        loaded = buffer.vload([*index], vector(str(buffer.dtype), count))
        return to_float32(loaded, count)

    def store(row: tirx.Buffer, i: Expr | int, new: Expr, count: int = lanes) -> None:
        T.buffer_store(row, new, [span(i, count)])

    def body() -> None:
        n = length("n")
        products = [tensor(f"x{i}", (n, w), "float32") for i, w in enumerate(options.widths)]
        biases = {
            i: tensor(f"bias{i}", (width,), dtype)
            for i, (width, dtype) in enumerate(zip(options.widths, options.biases, strict=True))
            if dtype is not None
        }
        norms = [
            tensor(name, (dim,), options.norm) if options.norm else None
            for name in ("q_norm", "k_norm")
        ]
        cos, sin = (tensor(name, (n, half), "float32") if half else None for name in ("cos", "sin"))
        factor = tensor("factor", (n,), "float32") if options.scaled else None
        slots = tensor("slots", (n,), "int32")
        pages = PageWriter.declare(shape, format)
        q = tensor("q", (n, q_heads, dim), "float32")

        def fetch(token: Expr, part: int, head: Expr, row: tirx.Buffer) -> None:
            """One head of q, k or v, bias added."""
            product, first = options.places[part]
            with T.serial(dim // lanes) as i:
                at = first + head * dim + i * lanes
                value = load(products[product], token, at)
                if product in biases:
                    value = value + load(biases[product], at)
                store(row, i * lanes, value)

        def norm(row: tirx.Buffer, weight: tirx.Buffer) -> None:
            rule = Norm("rms", options.eps, Vector(0))
            found = emit_statistics(rule, dim, lanes, lambda i, count: load(row, i, count=count))
            with T.serial(dim // lanes) as i:
                at = i * lanes
                x = normalize(rule, load(row, at), found, partial(weight_at, weight, at), lanes)
                store(row, at, x)

        def weight_at(weight: tirx.Buffer, i: Expr, part: Expression) -> Expr:
            return load(weight, i)

        def rotate_halves(token: Expr, row: tirx.Buffer) -> None:
            left, right = (scratch(half_lanes, "float32") for _ in range(2))
            with T.serial(half // half_lanes) as i:
                at = i * half_lanes
                store(left, 0, load(row, at, count=half_lanes), half_lanes)
                store(right, 0, load(row, half + at, count=half_lanes), half_lanes)
                a, b = (load(kept, 0, count=half_lanes) for kept in (left, right))
                c, s = (load(table, token, at, count=half_lanes) for table in (cos, sin))
                # Fused by name: LLVM's choice might differ between copies of this loop.
                store(row, at, multiply_add(a, c, b * -s), half_lanes)
                store(row, half + at, multiply_add(b, c, a * s), half_lanes)

        def rotate_pairs(token: Expr, row: tirx.Buffer) -> None:
            kept, few = scratch(pair_lanes, "float32"), pair_lanes // 2
            with T.serial(options.turned // pair_lanes) as i:
                at = i * pair_lanes
                store(kept, 0, load(row, at, count=pair_lanes), pair_lanes)
                x = load(kept, 0, count=pair_lanes)
                c, s = (load(table, token, i * few, count=few) for table in (cos, sin))
                swapped = tirx.Shuffle([x], [tirx.const(j ^ 1, "int32") for j in range(pair_lanes)])
                # The first of a pair is turned against the second.
                signs = [tirx.const((-1.0, 1.0)[j % 2], "float32") for j in range(pair_lanes)]
                sign = tirx.Shuffle(signs, [tirx.const(j, "int32") for j in range(pair_lanes)])
                turned = multiply_add(x, spread(c, few, 2), swapped * (spread(s, few, 2) * sign))
                store(row, at, turned, pair_lanes)

        rotate = rotate_pairs if options.in_pairs else rotate_halves

        def one_token(token: Expr) -> None:
            key, value = scratch(dim, "float32"), scratch(dim, "float32")

            def head_of(part: int, head: Expr) -> None:
                fetch(token, part, head, key)
                if norms[part] is not None:
                    norm(key, norms[part])
                if half:
                    rotate(token, key)

            with T.serial(q_heads) as head:
                head_of(0, head)
                with T.serial(dim // lanes) as i:
                    x = load(key, i * lanes)
                    if factor is not None:
                        x = x * splat(factor[token], lanes)
                    T.buffer_store(q, x, [token, head, span(i * lanes, lanes)])
            with T.serial(heads) as head:
                head_of(1, head)
                fetch(token, 2, head, value)
                pages.store(slots[token], head, key, value)

        with T.If(n * ((q_heads + 2 * heads) * dim) <= SERIAL):
            with T.Then(), T.serial(n) as token:
                one_token(token)
            with T.Else(), T.parallel(n) as token:
                one_token(token)

    return emit(body, [reduce_sum_ir(lanes)] if lanes > 1 and options.norm else [])
