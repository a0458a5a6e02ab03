"""Norms and activations on CPUs: one pass over memory each, vectors of 16 where sizes allow.

A kernel runs on one thread where waking the others would take longer than the work.
"""

import functools
import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.vector import (
    LOG2E,
    as_relax_kernel,
    exp2,
    import_reduce_sum,
    multiply_add,
    reduce_sum,
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


@functools.cache  # parsing TVMScript takes 0.2 s, and every layer asks
def norm_kernel(size: int, eps: float, dtype: str, residual: bool) -> tirx.PrimFunc:
    """Root mean square norm: (x [n, size], weight [size]) -> [n, size].

    With `residual`: (x, y, weight) -> x + y and its norm.

    Args:
        dtype: of the weight; everything else is float32.
    """
    lanes = math.gcd(size, 16)

    def at(buffer, row, i):
        return buffer.vload([row, i * lanes], vector("float32", lanes))

    @T.macro
    def norm(x, weight, out, row):
        squares = T.decl_buffer((lanes,), "float32", scope="global")
        factor = T.decl_buffer((1,), "float32", scope="global")
        squares[span(0, lanes)] = splat(0.0, lanes)
        for i in T.serial(size // lanes):
            squares[span(0, lanes)] = multiply_add(
                at(x, row, i), at(x, row, i), squares.vload([0], vector("float32", lanes))
            )
        factor[0] = T.float32(1) / T.sqrt(
            sum_of(squares.vload([0], vector("float32", lanes)), lanes) * T.float32(1 / size)
            + T.float32(eps)
        )
        for i in T.serial(size // lanes):
            out[row, span(i * lanes, lanes)] = (
                at(x, row, i)
                * splat(factor[0], lanes)
                * to_float32(weight.vload([i * lanes], vector(dtype, lanes)), lanes)
            )

    @T.macro
    def add(x, y, total, row):
        for i in T.serial(size // lanes):
            total[row, span(i * lanes, lanes)] = at(x, row, i) + at(y, row, i)

    if residual:

        @T.prim_func(s_tir=True, check_well_formed=False)
        def add_norm(
            x_h: T.handle,
            y_h: T.handle,
            weight: T.Buffer((size,), dtype),
            total_h: T.handle,
            out_h: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            n = T.int64()
            x = T.match_buffer(x_h, (n, size), "float32")
            y = T.match_buffer(y_h, (n, size), "float32")
            total = T.match_buffer(total_h, (n, size), "float32")
            out = T.match_buffer(out_h, (n, size), "float32")
            if n * size <= SERIAL:
                for row in T.serial(n):
                    add(x, y, total, row)
                    norm(total, weight, out, row)
            else:
                for row in T.parallel(n):
                    add(x, y, total, row)
                    norm(total, weight, out, row)

        kernel = add_norm
    else:

        @T.prim_func(s_tir=True, check_well_formed=False)
        def plain_norm(
            x_h: T.handle,
            weight: T.Buffer((size,), dtype),
            out_h: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            n = T.int64()
            x = T.match_buffer(x_h, (n, size), "float32")
            out = T.match_buffer(out_h, (n, size), "float32")
            if n * size <= SERIAL:
                for row in T.serial(n):
                    norm(x, weight, out, row)
            else:
                for row in T.parallel(n):
                    norm(x, weight, out, row)

        kernel = plain_norm
    return as_relax_kernel(import_reduce_sum(kernel, lanes) if lanes > 1 else kernel)


@functools.cache
def silu_mul_kernel(size: int) -> tirx.PrimFunc:
    """x [n, 2 size] -> silu(x[:, :size]) * x[:, size:], float32."""
    lanes = math.gcd(size, 16)
    # Columns per task: a prompt has rows enough, a batch of single tokens may not.
    parts = next(n for n in (8, 4, 2, 1) if size % (n * lanes) == 0)
    width = size // parts

    def gated(gate, up):
        exponent = T.min(gate * splat(-LOG2E, lanes), splat(126.0, lanes))
        return gate * up / (splat(1.0, lanes) + exp2(exponent, lanes))

    @T.macro
    def one_task(x, out, row, first):
        for i in T.serial(width // lanes):
            out[row, span(first + i * lanes, lanes)] = gated(
                x.vload([row, first + i * lanes], vector("float32", lanes)),
                x.vload([row, size + first + i * lanes], vector("float32", lanes)),
            )

    @T.prim_func(s_tir=True, check_well_formed=False)
    def silu_mul(x_h: T.handle, out_h: T.handle):
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(x_h, (n, 2 * size), "float32")
        out = T.match_buffer(out_h, (n, size), "float32")
        if n * size <= SERIAL // 2:
            for task in T.serial(n * parts):
                one_task(x, out, task // parts, task % parts * width)
        else:
            for task in T.parallel(n * parts):
                one_task(x, out, task // parts, task % parts * width)

    return as_relax_kernel(silu_mul)
