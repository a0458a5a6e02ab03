"""x @ W.T on CPUs, straight from the stored form of W.

A task takes a block of rows of W (outputs), widens it once to float32 in scratch memory that
stays in the CPU's cache, and multiplies it with every row of x. So a weight is read once per step
whatever the batch, and widening is paid once per step, too.
"""

import functools

from tvm import tirx
from tvm.script import tirx as T

from relaxlm.compiler.kernels.vector import (
    as_relax_kernel,
    import_reduce_sum,
    multiply_add,
    reduce_sum,
    splat,
    to_float32,
    vector,
)
from relaxlm.quantization.groupwise import GroupQuant

LANES = 16
ROWS = 8


@functools.cache  # parsing TVMScript takes 0.2 s, and every layer asks
def matmul_kernel(
    shape: tuple[int, int], quant: GroupQuant | None, dtype: str, out_dtype: str
) -> tirx.PrimFunc:
    """(x [m, K] float32, *stored weight, out [m, N]).

    Args:
        shape: (N, K).
        quant: the weight's format; None for a plain [N, K] tensor of `dtype`.
        dtype: of the scales, or of the plain tensor.
        out_dtype: of the result; sums are in float32.
    """
    if quant is not None and quant.layout == "KN":
        return _columns(shape, quant, out_dtype)
    return _rows(shape, quant, dtype, out_dtype)


def _codes(quant: GroupQuant, word):
    """The codes in one uint32 as a float32 vector of `per_word` lanes, centred on zero."""
    count = quant.per_word
    shifted = T.shift_right(
        T.broadcast(word, count), T.cast(T.ramp(0, quant.bits, count), f"uint32x{count}")
    )
    codes = T.bitwise_and(shifted, T.broadcast(T.uint32((1 << quant.bits) - 1), count))
    return T.cast(T.cast(codes, f"int32x{count}"), f"float32x{count}") - splat(
        float(quant.max_int), count
    )


def _rows(
    shape: tuple[int, int], quant: GroupQuant | None, dtype: str, out_dtype: str
) -> tirx.PrimFunc:
    """W stored row by row: each row of a block is a dot product along K."""
    n, k = shape
    rows = min(ROWS, n)
    words = 1 if quant is None else -(-k // quant.group) * quant.group // quant.per_word
    width = k if quant is None else words * quant.per_word
    # Scratch rows are padded, so that each starts on a vector.
    stride = -(-width // LANES) * LANES
    full, rest = k // LANES, k % LANES

    @T.macro
    def multiply(task, m, x, panel, out):
        sums = T.decl_buffer((rows * LANES,), "float32", scope="global")
        tail = T.decl_buffer((rows,), "float32", scope="global")
        for row in T.serial(m):
            for r in T.unroll(rows):
                sums[T.ramp(r * LANES, 1, LANES)] = splat(0.0, LANES)
                tail[r] = T.float32(0)
            for i in T.serial(full):
                for r in T.unroll(rows):
                    sums[T.ramp(r * LANES, 1, LANES)] = multiply_add(
                        x.vload([row, i * LANES], vector("float32", LANES)),
                        panel.vload([r * stride + i * LANES], vector("float32", LANES)),
                        sums.vload([r * LANES], vector("float32", LANES)),
                    )
            for i in T.serial(rest):
                for r in T.unroll(rows):
                    tail[r] = (
                        tail[r] + x[row, full * LANES + i] * panel[r * stride + full * LANES + i]
                    )
            for r in T.unroll(rows):
                out[row, T.min(task * rows, n - rows) + r] = T.cast(
                    reduce_sum(sums.vload([r * LANES], vector("float32", LANES)), LANES) + tail[r],
                    out_dtype,
                )

    if quant is None:

        @T.prim_func(s_tir=True, check_well_formed=False)
        def matmul(x_h: T.handle, weight: T.Buffer((n, k), dtype), out_h: T.handle):
            T.func_attr({"tirx.noalias": True})
            m = T.int64()
            x = T.match_buffer(x_h, (m, k), "float32")
            out = T.match_buffer(out_h, (m, n), out_dtype)
            for task in T.parallel((n + rows - 1) // rows):
                panel = T.decl_buffer((rows * stride,), "float32", scope="global")
                for r in T.serial(rows):
                    for i in T.serial(full):
                        panel[T.ramp(r * stride + i * LANES, 1, LANES)] = to_float32(
                            weight.vload(
                                [T.min(task * rows, n - rows) + r, i * LANES], vector(dtype, LANES)
                            ),
                            LANES,
                        )
                    for i in T.serial(rest):
                        panel[r * stride + full * LANES + i] = T.cast(
                            weight[T.min(task * rows, n - rows) + r, full * LANES + i], "float32"
                        )
                multiply(task, m, x, panel, out)

        return as_relax_kernel(import_reduce_sum(matmul, LANES))

    per_word, group = quant.per_word, quant.group

    @T.prim_func(s_tir=True, check_well_formed=False)
    def matmul_quantized(
        x_h: T.handle,
        weight: T.Buffer((n, words), "uint32"),
        scale: T.Buffer((n, width // group), quant.dtype),
        out_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_h, (m, k), "float32")
        out = T.match_buffer(out_h, (m, n), out_dtype)
        for task in T.parallel((n + rows - 1) // rows):
            panel = T.decl_buffer((rows * stride,), "float32", scope="global")
            for r in T.serial(rows):
                for g in T.serial(width // group):
                    for i in T.unroll(group // per_word):
                        panel[T.ramp(r * stride + g * group + i * per_word, 1, per_word)] = _codes(
                            quant,
                            weight[T.min(task * rows, n - rows) + r, g * (group // per_word) + i],
                        ) * splat(
                            T.cast(scale[T.min(task * rows, n - rows) + r, g], "float32"), per_word
                        )
            multiply(task, m, x, panel, out)

    return as_relax_kernel(import_reduce_sum(matmul_quantized, LANES))


def _columns(shape: tuple[int, int], quant: GroupQuant, out_dtype: str) -> tirx.PrimFunc:
    """W stored transposed: neighbouring outputs are neighbouring words, so they are the lanes."""
    n, k = shape
    lanes = next(width for width in (16, 8, 4, 2, 1) if width <= n)
    groups, per_word, bits = -(-k // quant.group), quant.per_word, quant.bits
    words = groups * quant.group // per_word

    def first(task):
        return T.min(task * lanes, n - lanes)

    def across(start):
        return T.ramp(start, 1, lanes) if lanes > 1 else start

    def codes(word, i):
        mask = T.uint32((1 << bits) - 1)
        shift = T.uint32(bits * i) if isinstance(i, int) else T.cast(i * bits, "uint32")
        wide = (lambda value: T.broadcast(value, lanes)) if lanes > 1 else (lambda value: value)
        code = T.bitwise_and(T.shift_right(word, wide(shift)), wide(mask))
        signed = T.cast(code, vector("int32", lanes))
        return T.cast(signed, vector("float32", lanes)) - splat(float(quant.max_int), lanes)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def matmul_columns(
        x_h: T.handle,
        weight: T.Buffer((words, n), "uint32"),
        scale: T.Buffer((groups, n), quant.dtype),
        out_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_h, (m, k), "float32")
        out = T.match_buffer(out_h, (m, n), out_dtype)
        for task in T.parallel((n + lanes - 1) // lanes):
            panel = T.decl_buffer((words * per_word * lanes,), "float32", scope="global")
            sums = T.decl_buffer((lanes,), "float32", scope="global")
            for j in T.serial(words):
                for i in T.unroll(per_word):
                    panel[across((j * per_word + i) * lanes)] = codes(
                        weight.vload([j, first(task)], vector("uint32", lanes)), i
                    ) * to_float32(
                        scale.vload(
                            [j * per_word // quant.group, first(task)], vector(quant.dtype, lanes)
                        ),
                        lanes,
                    )
            for row in T.serial(m):
                sums[across(0)] = splat(0.0, lanes)
                for i in T.serial(k):
                    sums[across(0)] = multiply_add(
                        splat(x[row, i], lanes),
                        panel.vload([i * lanes], vector("float32", lanes)),
                        sums.vload([0], vector("float32", lanes)),
                    )
                out[row, across(first(task))] = T.cast(
                    sums.vload([0], vector("float32", lanes)), vector(out_dtype, lanes)
                )

    return as_relax_kernel(matmul_columns)
