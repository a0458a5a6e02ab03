"""Multiply with weights in their stored form on CPUs.

    w = dequantize(q, s); y = matmul(x, permute_dims(w))   ->   y = call_tir(matmul, (x, q, s))

The same for weights that are only cast, or stored as they are used. Without it a step writes every
weight out as float32 first, and multiplies with one thread. Runs before LegalizeOps, with the
target in scope, whose vectors decide the kernels' tiles.

With `act_quant`, and where the format allows it:

    y = matmul(x, ...)   ->   c, s, t = call_tir(quantize, x); y = call_tir(matmul, (c, s, t, ...))
"""

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels import cpu_int8
from relaxlm.compiler.kernels.cpu_matmul import matmul_kernel
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.kernels.vector import vector_unit
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.compiler.passes.weights import stored_weight


@tvm.transform.module_pass(opt_level=0, name="LowerMatmulCPU")
class LowerMatmulCPU:
    """The pass.

    Args:
        act_quant: round activations to int8; the target must have `options.ACT_QUANT_FEATURES`.
    """

    def __init__(self, act_quant: bool = False) -> None:
        self.act_quant = act_quant

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod, self.act_quant))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, act_quant: bool) -> None:
        super().__init__(mod)
        self.mod, self.act_quant = mod, act_quant
        target = tvm.target.Target.current(allow_none=True)
        self.unit = vector_unit(target)

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
        dtype = str(weight.stored[-1].ty.dtype)
        matrix = StoredMatrix(*weight.shape, weight.quant, dtype)
        if self.act_quant and cpu_int8.supports(matrix):
            return self._int8(call, x, weight.stored, matrix)
        kernel = matmul_kernel(weight.shape, weight.quant, dtype, str(call.ty.dtype), self.unit)
        function = self.builder_.add_func(kernel, "matmul")
        return relax.call_tir(function, [x, *weight.stored], call.ty)

    def _int8(
        self, call: relax.Call, x: relax.Expr, stored: tuple[relax.Expr, ...], matrix: StoredMatrix
    ) -> relax.Expr:
        rows, k = x.ty.shape
        quantize = self.builder_.add_func(cpu_int8.quantize_kernel(int(k)), "quantize")
        types = [
            relax.TensorType((rows, matrix.groups * cpu_int8.GROUP_WORDS), "int32"),
            relax.TensorType((rows, matrix.groups), "float32"),
            relax.TensorType((rows, matrix.groups), "int32"),
        ]
        parts = self.builder_.emit(relax.call_tir(quantize, [x], types))
        kernel = cpu_int8.int8_matmul_kernel(matrix, str(call.ty.dtype))
        function = self.builder_.add_func(kernel, "matmul_int8")
        codes = [self.builder_.emit(relax.TupleGetItem(parts, i)) for i in range(len(types))]
        return relax.call_tir(function, [*codes, *stored], call.ty)
