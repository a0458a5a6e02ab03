"""x @ W.T on CPUs, straight from the stored form of W: which kernel runs when.

    rows of x       weights row by row          weights transposed
    1, 2-4, 5-8     cpu_gemv                    cpu_gemm
    more            cpu_gemm                    cpu_gemm

The number of rows is known when a kernel runs, so one function holds all of them. Where a row's
result must not depend on it (`invariant`), one way to multiply serves all: cpu_gemv for weights row
by row, cpu_gemm for transposed ones, which treats every row alike.
"""

import functools

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, flat, length, tensor
from relaxlm.compiler.kernels.cpu_gemm import gemm
from relaxlm.compiler.kernels.cpu_gemv import gemv, vector_words
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import VectorUnit, reduce_sum_ir
from relaxlm.quantization.groupwise import GroupQuant

# The most rows of x that a kernel of each of these sizes does at a time.
FEW = (1, 4, 8)
# Rows of x that invariant kernels bring to a row of W while it is in the cache.
TOGETHER = 64


@functools.cache  # every layer asks
def matmul_kernel(
    shape: tuple[int, int],
    quant: GroupQuant | None,
    dtype: str,
    out_dtype: str,
    unit: VectorUnit,
    invariant: bool = False,
) -> tirx.PrimFunc:
    """(x [m, K] float32, *stored weight, out [m, N]).

    Args:
        shape: (N, K).
        quant: the weight's format; None for a plain [N, K] tensor of `dtype`.
        dtype: of the scales, or of the plain tensor.
        out_dtype: of the result; sums are in float32.
        unit: the vectors of the CPU to compile for.
        invariant: whether a row's result may not depend on m.
    """
    n, k = shape
    matrix = StoredMatrix(n, k, quant, dtype)

    def body() -> None:
        m = length("m")
        x = tensor("x", (m, k), "float32")
        weight = tensor("weight", matrix.word_shape, matrix.word_dtype)
        scale = weight if quant is None else tensor("scale", matrix.scale_shape, dtype)
        out = tensor("out", (m, n), out_dtype)
        words, scales = flat(weight), flat(scale)

        def choose(sizes: tuple[int, ...]) -> None:
            if not sizes:
                if invariant and not matrix.columns:
                    many = gemv(matrix, out_dtype, unit, FEW[1], alike=True, together=TOGETHER)
                else:
                    many = gemm(matrix, out_dtype, unit)
                many(m, x, words, scales, out)
                return
            with T.If(m <= sizes[0]):
                with T.Then():
                    few = gemv(matrix, out_dtype, unit, sizes[0], alike=invariant)
                    few(m, x, words, scales, out)
                with T.Else():
                    choose(sizes[1:])

        choose(() if matrix.columns else FEW[:2] if invariant else FEW)

    return emit(body, [reduce_sum_ir(vector_words(matrix, unit))])
