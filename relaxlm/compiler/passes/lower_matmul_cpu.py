"""Multiply with weights in their stored form on CPUs.

    w = dequantize(q, s); y = matmul(x, permute_dims(w))   ->   y = call_tir(matmul, (x, q, s))

The same for weights that are only cast, or stored as they are used. Without it a step writes every
weight out as float32 first, and multiplies with one thread. Runs before LegalizeOps, with the
target in scope, whose vectors decide the kernels' tiles.

With `act_quant`, and where the CPU and the format allow it:

    y = matmul(x, ...)   ->   r = call_tir(round, x); y = call_tir(rounded_matmul, (r, q, s))
"""

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels import cpu_rounded
from relaxlm.compiler.kernels.cpu_elementwise import round_kernel
from relaxlm.compiler.kernels.cpu_matmul import matmul_kernel
from relaxlm.compiler.kernels.isa import dot_products
from relaxlm.compiler.kernels.rounding import Rounding
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import vector_unit
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.compiler.passes.weights import stored_weight
from relaxlm.quantization.transform import format_tag, read_tag

# What says of a call of `round` how it rounds, for passes after this one.
ROUNDING = "relaxlm.rounding"
# What says of a rounded matmul which matrix it reads.
_MATRIX = "relaxlm.matrix"


def matrix_of(function: tvm.tirx.PrimFunc) -> StoredMatrix:
    """The matrix that a kernel named `rounded_matmul` reads."""
    n, k, dtype, *quant = str(function.attrs[_MATRIX]).split(" ", 3)
    return StoredMatrix(int(n), int(k), read_tag(quant[0]) if quant else None, dtype)


@tvm.transform.module_pass(opt_level=0, name="LowerMatmulCPU")
class LowerMatmulCPU:
    """The pass.

    Args:
        act_quant: round activations where there are kernels for it.
        invariant: let no row's result depend on the number of rows.
    """

    def __init__(self, act_quant: bool = False, invariant: bool = False) -> None:
        self.act_quant, self.invariant = act_quant, invariant

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod, self.act_quant, self.invariant))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, act_quant: bool, invariant: bool) -> None:
        super().__init__(mod)
        target = tvm.target.Target.current(allow_none=True)
        self.mod, self.unit = mod, vector_unit(target)
        self.isa = dot_products(target) if act_quant else None
        self.invariant = invariant

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op != tvm.ir.Op.get("relax.matmul"):
            return call
        x, transposed = call.args
        permute = self.lookup_binding(transposed) if isinstance(transposed, relax.Var) else None
        is_transpose = (
            isinstance(permute, relax.Call)
            and permute.op == tvm.ir.Op.get("relax.permute_dims")
            and permute.attrs.axes is None
        )
        if (
            permute is None
            or not is_transpose
            or len(x.ty.shape) != 2
            or str(x.ty.dtype) != "float32"
        ):
            return call
        weight = stored_weight(self.mod, permute.args[0], self.lookup_binding)
        if weight is None or len(weight.shape) != 2:
            return call
        dtype, out_dtype = str(weight.stored[-1].ty.dtype), str(call.ty.dtype)
        matrix = StoredMatrix(*weight.shape, weight.quant, dtype)
        invariant = self.invariant
        if (
            self.isa
            and out_dtype == "float32"
            and cpu_rounded.supports(matrix, self.isa, invariant)
        ):
            kernel = cpu_rounded.rounded_matmul_kernel(matrix, self.isa, invariant)
            text = f"{matrix.n} {matrix.k} {dtype}"
            if matrix.quant is not None:
                text += f" {format_tag(matrix.quant)}"
            kernel = kernel.with_attr(_MATRIX, text)
            function = self.builder_.add_func(kernel, "rounded_matmul")
            x = self.rounded(x, Rounding(matrix.k, self.isa, invariant))
        else:
            kernel = matmul_kernel(
                weight.shape, weight.quant, dtype, out_dtype, self.unit, invariant
            )
            function = self.builder_.add_func(kernel, "matmul")
        return relax.call_tir(function, [x, *weight.stored], call.ty)

    def rounded(self, x: relax.Expr, rounding: Rounding) -> relax.Expr:
        kernel = round_kernel(rounding).with_attr(ROUNDING, str(rounding))
        function = self.builder_.add_func(kernel, "round")
        ty = relax.TensorType((x.ty.shape[0], rounding.row_words), "int32")
        return self.builder_.emit(relax.call_tir(function, [x], ty))
