"""Norms and activations on CPUs: one or two passes over memory, vectors of 16 where sizes allow.

What a kernel computes it writes as float32, or rounded for the matmul that reads it (`Rounding`).
A kernel runs on one thread where waking the others would take longer than the work.
"""

import functools
import math
from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.packed import Value
from relaxlm.compiler.kernels.rounding import Rounding
from relaxlm.compiler.kernels.vector import (
    gelu,
    multiply_add,
    reduce_sum,
    reduce_sum_ir,
    silu,
    splat,
    to_float32,
    vector,
)

# Elements that one thread works through in about the time it takes to wake another.
SERIAL = 16384


def span(start: Expr, lanes: int) -> Expr:
    """The index of `lanes` neighbours."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def sum_of(value: Expr, lanes: int) -> Expr:
    """The sum of a float32 vector of one or more lanes."""
    return reduce_sum(value, lanes) if lanes > 1 else value


class _Output:
    """The last parameter of a kernel: [n, size] float32, or its rows rounded."""

    def __init__(self, n: Expr, size: int, rounding: Rounding | None) -> None:
        assert rounding is None or rounding.k == size
        self.n, self.size, self.rounding = n, size, rounding
        width, dtype = (size, "float32") if rounding is None else (rounding.row_words, "int32")
        self.buffer = tensor("out", (n, width), dtype)

    def write(self, row: Expr, value: Value) -> None:
        if self.rounding is not None:
            self.rounding.emit_pack(value, self.buffer, row, self.n)
            return
        lanes = math.gcd(self.size, 16)
        with T.serial(self.size // lanes) as i:
            T.buffer_store(self.buffer, value(i * lanes, lanes), [row, span(i * lanes, lanes)])


def for_each_row(n: Expr, elements: int, row: Callable[[Expr], None]) -> None:
    """Emit the loop over rows of so many elements each, on one thread or on all."""
    with T.If(n * elements <= SERIAL):
        with T.Then(), T.serial(n) as i:
            row(i)
        with T.Else(), T.parallel(n) as i:
            row(i)


@functools.cache
def norm_kernel(
    size: int, eps: float, dtype: str, residual: bool, rounding: Rounding | None = None
) -> tirx.PrimFunc:
    """Root mean square norm: (x [n, size], weight [size]) -> [n, size].

    With `residual`: (x, y, weight) -> x + y and its norm.

    Args:
        dtype: of the weight; everything else is float32.
        rounding: how the norm is rounded; float32 if None.
    """
    lanes = math.gcd(size, 16)

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, size), "float32")
        y = tensor("y", (n, size), "float32") if residual else None
        weight = tensor("weight", (size,), dtype)
        total = tensor("total", (n, size), "float32") if residual else x
        out = _Output(n, size, rounding)

        def load(buffer: tirx.Buffer, row: Expr, i: Expr, count: int = lanes) -> Expr:
            return buffer.vload([row, i], vector("float32", count))

        def one(row: Expr) -> None:
            squares, factor = scratch(lanes, "float32"), scratch(1, "float32")

            def squared() -> Expr:
                return squares.vload([0], vector("float32", lanes))

            T.buffer_store(squares, splat(0.0, lanes), [span(0, lanes)])
            with T.serial(size // lanes) as i:
                if y is not None:
                    both = load(x, row, i * lanes) + load(y, row, i * lanes)
                    T.buffer_store(total, both, [row, span(i * lanes, lanes)])
                element = load(total, row, i * lanes)
                T.buffer_store(squares, multiply_add(element, element, squared()), [span(0, lanes)])
            # Fused by name, as everywhere: LLVM's choice might differ between copies of a loop.
            mean = multiply_add(sum_of(squared(), lanes), T.float32(1 / size), T.float32(eps))
            T.buffer_store(factor, T.float32(1) / T.sqrt(mean), [0])

            def value(i: Expr | int, count: int) -> Expr:
                scale = to_float32(weight.vload([i], vector(dtype, count)), count)
                return load(total, row, i, count) * splat(factor[0], count) * scale

            out.write(row, value)

        for_each_row(n, size, one)

    return emit(body, [reduce_sum_ir(lanes)] if lanes > 1 else [])


def gated(x: tirx.Buffer, row: Expr, size: int) -> Value:
    """Elements of silu(x[row, :size]) * x[row, size:]."""

    def value(i: Expr | int, lanes: int) -> Expr:
        gate, up = (x.vload([row, at], vector("float32", lanes)) for at in (i, size + i))
        return silu(gate, lanes) * up

    return value


@functools.cache
def silu_mul_kernel(size: int, rounding: Rounding | None = None) -> tirx.PrimFunc:
    """x [n, 2 size] -> silu(x[:, :size]) * x[:, size:], float32 or rounded."""

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, 2 * size), "float32")
        out = _Output(n, size, rounding)

        def one(row: Expr) -> None:
            out.write(row, gated(x, row, size))

        # The exponential makes an element cost as much as two of a norm.
        for_each_row(n, 2 * size, one)

    return emit(body)


@functools.cache
def gelu_kernel(
    size: int, dtype: str | None = None, rounding: Rounding | None = None
) -> tirx.PrimFunc:
    """(x [n, size], bias [size]) -> gelu(x + bias), float32 or rounded.

    Args:
        dtype: of the bias; None if there is none.
    """

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, size), "float32")
        bias = None if dtype is None else tensor("bias", (size,), dtype)
        out = _Output(n, size, rounding)

        def one(row: Expr) -> None:
            def value(i: Expr | int, lanes: int) -> Expr:
                element = x.vload([row, i], vector("float32", lanes))
                if bias is not None:
                    element += to_float32(bias.vload([i], vector(str(dtype), lanes)), lanes)
                return gelu(element, lanes)

            out.write(row, value)

        # As for silu_mul: an element costs as much as two of a norm.
        for_each_row(n, 2 * size, one)

    return emit(body)


@functools.cache
def round_kernel(rounding: Rounding) -> tirx.PrimFunc:
    """(x [n, k] float32) -> its rows rounded, [n, row_words] int32."""

    def body() -> None:
        n = length("n")
        x = tensor("x", (n, rounding.k), "float32")
        out = _Output(n, rounding.k, rounding)

        def one(row: Expr) -> None:
            out.write(row, lambda i, lanes: x.vload([row, i], vector("float32", lanes)))

        for_each_row(n, rounding.k, one)

    return emit(body)
