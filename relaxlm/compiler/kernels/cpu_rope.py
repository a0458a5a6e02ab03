"""From the product with the fused q, k, v matrix to rotated queries and pages, in one kernel."""

import functools
import math
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.cpu_append import PageWriter
from relaxlm.compiler.kernels.vector import (
    multiply_add,
    reduce_sum,
    reduce_sum_ir,
    splat,
    to_float32,
    vector,
)
from relaxlm.quantization.kv_cache import KVFormat

# Elements that one thread works through faster than several, whose tokens share cache lines.
SERIAL = 65536


@dataclass(frozen=True)
class RopeOptions:
    """What happens to q, k and v on the way.

    Attributes:
        bias: dtype of a bias on the product; None for none.
        norm: dtype of the weights of a norm on each query and key head; None for none.
        eps: of that norm.
    """

    bias: str | None
    norm: str | None
    eps: float = 0.0


@functools.cache  # every layer asks
def rope_append_kernel(
    shape: AttentionShape, format: KVFormat, options: RopeOptions
) -> tirx.PrimFunc:
    """Add the bias, normalize q and k, rotate them, append k and v to their pages.

    (x [n, (q_heads + 2 kv_heads) dim], cos, sin [n, dim / 2], slots [n], bias?, q_norm?, k_norm?,
    *page tensors) -> q [n, q_heads, dim], and the page tensors written in place. Feature i is
    paired with i + dim / 2. Optional arguments that do not apply are left out.
    """
    q_heads, heads, dim = shape.q_heads, shape.kv_heads, shape.head_dim
    width, half = (q_heads + 2 * heads) * dim, dim // 2
    lanes = math.gcd(half, 16)

    def span(start: Expr | int) -> Expr:
        return T.ramp(start, 1, lanes) if lanes > 1 else start

    def at(buffer: tirx.Buffer, *index: Expr | int, dtype: str = "float32") -> Expr:
        return to_float32(buffer.vload([*index], vector(dtype, lanes)), lanes)

    def normalize(row: tirx.Buffer, weight: tirx.Buffer) -> None:
        squares, factor = scratch(lanes, "float32"), scratch(1, "float32")
        T.buffer_store(squares, splat(0.0, lanes), [span(0)])
        with T.serial(dim // lanes) as i:
            added = multiply_add(at(row, i * lanes), at(row, i * lanes), at(squares, 0))
            T.buffer_store(squares, added, [span(0)])
        total = reduce_sum(at(squares, 0), lanes) if lanes > 1 else squares[0]
        mean = multiply_add(total, T.float32(1 / dim), T.float32(options.eps))
        T.buffer_store(factor, T.float32(1) / T.sqrt(mean), [0])
        with T.serial(dim // lanes) as i:
            scale = splat(factor[0], lanes) * at(weight, i * lanes, dtype=str(weight.dtype))
            T.buffer_store(row, at(row, i * lanes) * scale, [span(i * lanes)])

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, width), "float32")
        cos, sin = (tensor(name, (n, half), "float32") for name in ("cos", "sin"))
        slots = tensor("slots", (n,), "int32")
        bias = tensor("bias", (width,), options.bias) if options.bias else None
        q_norm, k_norm = (
            tensor(name, (dim,), options.norm) if options.norm else None
            for name in ("q_norm", "k_norm")
        )
        pages = PageWriter.declare(shape, format)
        q = tensor("q", (n, q_heads, dim), "float32")

        def load(token: Expr, head: Expr, row: tirx.Buffer) -> None:
            """x of one head, bias added."""
            with T.serial(dim // lanes) as i:
                value = at(x, token, head * dim + i * lanes)
                if bias is not None:
                    value = value + at(bias, head * dim + i * lanes, dtype=str(bias.dtype))
                T.buffer_store(row, value, [span(i * lanes)])

        def rotate(token: Expr, row: tirx.Buffer) -> None:
            left, right = scratch(lanes, "float32"), scratch(lanes, "float32")
            with T.serial(half // lanes) as i:
                T.buffer_store(left, at(row, i * lanes), [span(0)])
                T.buffer_store(right, at(row, half + i * lanes), [span(0)])
                c, s = at(cos, token, i * lanes), at(sin, token, i * lanes)
                # Fused by name: LLVM's choice might differ between copies of this loop.
                turned = multiply_add(at(left, 0), c, at(right, 0) * -s)
                T.buffer_store(row, turned, [span(i * lanes)])
                turned = multiply_add(at(right, 0), c, at(left, 0) * s)
                T.buffer_store(row, turned, [span(half + i * lanes)])

        def one_token(token: Expr) -> None:
            key, value = scratch(dim, "float32"), scratch(dim, "float32")
            with T.serial(q_heads) as head:
                load(token, head, key)
                if q_norm is not None:
                    normalize(key, q_norm)
                rotate(token, key)
                with T.serial(dim // lanes) as i:
                    T.buffer_store(q, at(key, i * lanes), [token, head, span(i * lanes)])
            with T.serial(heads) as head:
                load(token, q_heads + head, key)
                load(token, q_heads + heads + head, value)
                if k_norm is not None:
                    normalize(key, k_norm)
                rotate(token, key)
                pages.store(slots[token], head, key, value)

        with T.If(n * width <= SERIAL):
            with T.Then(), T.serial(n) as token:
                one_token(token)
            with T.Else(), T.parallel(n) as token:
                one_token(token)

    return emit(body, [reduce_sum_ir(lanes)] if lanes > 1 and options.norm else [])
