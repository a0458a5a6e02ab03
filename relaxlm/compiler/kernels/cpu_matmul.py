"""x @ W.T on CPUs, straight from the stored form of W: which kernel runs when.

    rows of x       weights row by row          weights transposed
    1, 2-4, 5-8     cpu_gemv                    cpu_gemm
    more            cpu_gemm                    cpu_gemm

The number of rows is known when a kernel runs, so one function holds all of them.
"""

import functools

from tvm import tirx
from tvm.script import tirx as T

from relaxlm.compiler.kernels.cpu_gemm import gemm
from relaxlm.compiler.kernels.cpu_gemv import gemv, vector_words
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import VectorUnit, as_relax_kernel, import_reduce_sum
from relaxlm.quantization.groupwise import GroupQuant


@functools.cache  # parsing TVMScript takes 0.2 s, and every layer asks
def matmul_kernel(
    shape: tuple[int, int],
    quant: GroupQuant | None,
    dtype: str,
    out_dtype: str,
    unit: VectorUnit,
) -> tirx.PrimFunc:
    """(x [m, K] float32, *stored weight, out [m, N]).

    Args:
        shape: (N, K).
        quant: the weight's format; None for a plain [N, K] tensor of `dtype`.
        dtype: of the scales, or of the plain tensor.
        out_dtype: of the result; sums are in float32.
        unit: the vectors of the CPU to compile for.
    """
    n, k = shape
    matrix = StoredMatrix(n, k, quant, dtype)
    size = n * matrix.words
    one, four, eight = (gemv(matrix, out_dtype, unit, rows) for rows in (1, 4, 8))
    many = gemm(matrix, out_dtype, unit)

    @T.macro
    def run(m, x, weight, scales, out):
        words = T.decl_buffer((size,), matrix.word_dtype, data=weight.data)
        if matrix.columns:
            many(m, x, words, scales, out)
        else:
            if m == 1:
                one(m, x, words, scales, out)
            else:
                if m <= 4:
                    four(m, x, words, scales, out)
                else:
                    if m <= 8:
                        eight(m, x, words, scales, out)
                    else:
                        many(m, x, words, scales, out)

    if quant is None:

        @T.prim_func(s_tir=True, check_well_formed=False)
        def matmul(x_h: T.handle, weight: T.Buffer(matrix.word_shape, dtype), out_h: T.handle):
            T.func_attr({"tirx.noalias": True})
            m = T.int64()
            x = T.match_buffer(x_h, (m, k), "float32")
            out = T.match_buffer(out_h, (m, n), out_dtype)
            run(m, x, weight, weight, out)

    else:

        @T.prim_func(s_tir=True, check_well_formed=False)
        def matmul(
            x_h: T.handle,
            weight: T.Buffer(matrix.word_shape, "uint32"),
            scale: T.Buffer(matrix.scale_shape, dtype),
            out_h: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            m = T.int64()
            x = T.match_buffer(x_h, (m, k), "float32")
            out = T.match_buffer(out_h, (m, n), out_dtype)
            scales = T.decl_buffer((n * matrix.groups,), dtype, data=scale.data)
            run(m, x, weight, scales, out)

    return as_relax_kernel(import_reduce_sum(matmul, vector_words(matrix, unit)))
