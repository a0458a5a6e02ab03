"""x @ W.T on CPUs with rounded activations, straight from the stored form of W: what runs when.

    rows of x   amx            avx512          avxvnni, avx2, dotprod, i8mm
    1 - FEW     cpu_few_rows   cpu_few_rows    cpu_narrow
    more        cpu_amx        cpu_int8_gemm   cpu_narrow

The rows of x come packed as `rounding.Rounding` says. Where a row's result must not depend on the
number of rows (`invariant`), all kernels add up the products of groups in one order, and amx has
cpu_amx_int8 or, where rows of W are long or do not fit it, cpu_int8_gemm for more rows.
"""

from types import ModuleType

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels import (
    cpu_amx,
    cpu_amx_int8,
    cpu_few_rows,
    cpu_int8_gemm,
    cpu_narrow,
    tuning,
)
from relaxlm.compiler.kernels.builder import emit, length, tensor
from relaxlm.compiler.kernels.cpu_elementwise import emit_value, for_each_row, gated
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


def supports_gated(matrix: StoredMatrix, isa: Isa) -> bool:
    """Whether `gated_matmul_kernel` gains something: sums that stay where they were made."""
    return isa == "amx" and supports(matrix, isa) and cpu_amx.supports_gated(matrix, isa)


def supports(matrix: StoredMatrix, isa: Isa, invariant: bool = False) -> bool:
    """Whether there are kernels for a weight's format, for every number of rows."""
    return all(kernels.supports(matrix, isa) for kernels in _kernels(matrix, isa, invariant))


def _kernels(matrix: StoredMatrix, isa: Isa, invariant: bool) -> tuple[ModuleType, ModuleType]:
    if invariant and isa == "amx":
        many = cpu_amx_int8 if cpu_amx_int8.supports(matrix, isa) else cpu_int8_gemm
        return cpu_few_rows, many
    return KERNELS[isa]


@tuning.cached
def rounded_matmul_kernel(matrix: StoredMatrix, isa: Isa, invariant: bool = False) -> tirx.PrimFunc:
    """(x [m, row_words] int32 as `Rounding` packs it, *stored weight, out [m, N] float32).

    `invariant`: whether a row's result may not depend on m.
    """
    assert supports(matrix, isa, invariant), (matrix, isa)
    few, many = _kernels(matrix, isa, invariant)

    def body() -> None:
        m = length("m")
        x = tensor("x", (m, Rounding(matrix.k, isa, invariant).row_words), "int32")
        weight = tensor("weight", matrix.word_shape, matrix.word_dtype)
        scale = tensor("scale", matrix.scale_shape, matrix.dtype) if matrix.quant else None
        out = tensor("out", (m, matrix.n), "float32")
        operands = (matrix, isa, m, x, weight, scale, out)
        if few is many:
            few.emit_matmul(*operands, invariant)
            return
        with T.If(m <= FEW):
            with T.Then():
                few.emit_matmul(*operands, invariant)
            with T.Else():
                if many is cpu_int8_gemm and invariant:
                    cpu_int8_gemm.emit_matmul(*operands, cpu_few_rows.QUARTERS)
                else:
                    many.emit_matmul(*operands)

    texts = [*few.imports(matrix, isa), *many.imports(matrix, isa)]
    return emit(body, list(dict.fromkeys(texts)))


@tuning.cached
def gated_matmul_kernel(matrix: StoredMatrix, isa: Isa, activation: str = "silu") -> tirx.PrimFunc:
    """act(x @ W1.T) * (x @ W2.T) for W = [W1, W2], rounded for the matmul that follows.

    (x [m, row_words] int32, *stored weight, out [m, row_words of N / 2] int32). `activation` is
    one of `activations.ACTIVATIONS`. A few rows are
    multiplied first and gated then; of many, each tile of sums is gated as it is stored.
    """
    assert supports_gated(matrix, isa), (matrix, isa)
    size = matrix.n // 2
    rounding = Rounding(size, isa)

    def body() -> None:
        m = length("m")
        x = tensor("x", (m, Rounding(matrix.k, isa).row_words), "int32")
        weight = tensor("weight", matrix.word_shape, matrix.word_dtype)
        scale = tensor("scale", matrix.scale_shape, matrix.dtype)
        out = tensor("out", (m, rounding.row_words), "int32")
        with T.If(m > FEW):
            with T.Then():
                cpu_amx.emit_matmul(matrix, isa, m, x, weight, scale, out, activation)
            with T.Else():
                both = T.decl_buffer((m, matrix.n), "float32", scope="global")
                cpu_few_rows.emit_matmul(matrix, isa, m, x, weight, scale, both)

                def one(row: Expr) -> None:
                    value = emit_value(gated(size, activation).value, [both], row)
                    rounding.emit_pack(value, out, row, m)

                for_each_row(m, 2 * size, one)

    texts = [*cpu_few_rows.imports(matrix, isa), *cpu_amx.imports(matrix, isa)]
    return emit(body, list(dict.fromkeys(texts)))
