"""x @ W.T on CPUs with rounded activations, straight from the stored form of W: what runs when.

    rows of x   amx            avx512          avxvnni, avx2, dotprod, i8mm
    1 - FEW     cpu_few_rows   cpu_few_rows    cpu_narrow
    more        cpu_amx        cpu_int8_gemm   cpu_narrow

The rows of x come packed as `rounding.Rounding` says.
"""

import functools
from types import ModuleType

from tvm import tirx
from tvm.script import tirx as T

import importlib
def _m(n):
    try: return importlib.import_module("relaxlm.compiler.kernels."+n)
    except ImportError: return None
cpu_amx, cpu_few_rows, cpu_int8_gemm, cpu_narrow = map(_m, ("cpu_amx","cpu_few_rows","cpu_int8_gemm","cpu_narrow"))
from relaxlm.compiler.kernels.builder import emit, length, tensor
from relaxlm.compiler.kernels.isa import Isa
from relaxlm.compiler.kernels.packed import FEW
from relaxlm.compiler.kernels.rounding import Rounding
from relaxlm.compiler.kernels.stored import StoredMatrix

# The kernels for few rows, and those for many.
KERNELS: dict[Isa, tuple[ModuleType, ModuleType]] = {
    "amx": (cpu_few_rows, cpu_amx),
    "avx512": (cpu_few_rows, cpu_int8_gemm),
    **dict.fromkeys(("avxvnni", "avx2", "i8mm", "dotprod"), (cpu_narrow, cpu_narrow)),
}


def supports(matrix: StoredMatrix, isa: Isa) -> bool:
    """Whether there are kernels for a weight's format, for every number of rows."""
    return all(kernels is not None for kernels in KERNELS[isa]) and all(kernels.supports(matrix, isa) for kernels in KERNELS[isa])


@functools.cache
def rounded_matmul_kernel(matrix: StoredMatrix, isa: Isa) -> tirx.PrimFunc:
    """(x [m, row_words] int32 as `Rounding` packs it, *stored weight, out [m, N] float32)."""
    assert supports(matrix, isa), (matrix, isa)
    few, many = KERNELS[isa]

    def body() -> None:
        m = length("m")
        x = tensor("x", (m, Rounding(matrix.k, isa).row_words), "int32")
        weight = tensor("weight", matrix.word_shape, matrix.word_dtype)
        scale = tensor("scale", matrix.scale_shape, matrix.dtype) if matrix.quant else None
        out = tensor("out", (m, matrix.n), "float32")
        if few is many:
            few.emit_matmul(matrix, isa, m, x, weight, scale, out)
            return
        with T.If(m <= FEW):
            with T.Then():
                few.emit_matmul(matrix, isa, m, x, weight, scale, out)
            with T.Else():
                many.emit_matmul(matrix, isa, m, x, weight, scale, out)

    texts = [*few.imports(matrix, isa), *many.imports(matrix, isa)]
    return emit(body, list(dict.fromkeys(texts)))
