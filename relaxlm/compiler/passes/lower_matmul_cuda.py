"""Multiply with weights in their stored form on GPUs, and add what follows at once.

    w = dequantize(q, s); y = matmul(x, permute_dims(w)); z = y + b; r = h + z
    ->
    r = call_tir(matmul, (x, q, s, b, h))

The bias and the residual may be missing, and each sum only counts if nobody else reads what it is
made of. Without this pass a step writes every weight out as float16 first. Runs before LegalizeOps.
"""

from typing import Any, NamedTuple

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels.cuda_matmul import CudaFormat, matmul_kernel
from relaxlm.compiler.passes.rewrite import rewrite_functions, variables
from relaxlm.compiler.passes.weights import StoredWeight, stored_weight


class _Product(NamedTuple):
    x: relax.Expr
    weight: StoredWeight
    out_type: relax.TensorType
    bias: relax.Expr | None = None
    residual: relax.Expr | None = None


@tvm.transform.module_pass(opt_level=0, name="LowerMatmulCUDA")
class LowerMatmulCUDA:
    """The pass.

    Args:
        shared_limit: bytes of shared memory that a block may use, on every GPU compiled for.
    """

    def __init__(self, shared_limit: int) -> None:
        self.shared_limit = shared_limit

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self.shared_limit)
        return rewrite_functions(mod, rewriter, rewriter.rewrite)


def _is(expr: Any, operator: str) -> bool:
    return isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get(f"relax.{operator}")


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, shared_limit: int) -> None:
        super().__init__(mod)
        self.mod, self.shared_limit = mod, shared_limit

    def rewrite(self, function: relax.Function) -> relax.Expr:
        # Patterns are matched on the function as it was.
        self.bound: dict[relax.Var, relax.Expr] = {}
        self.uses: dict[relax.Var, int] = {}
        if isinstance(function.body, relax.SeqExpr):
            for block in function.body.blocks:
                for binding in block.bindings:
                    self.bound[binding.var] = binding.value
                    for var in variables(binding.value):
                        self.uses[var] = self.uses.get(var, 0) + 1
        return self.visit_expr(function)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        product = self.product(call)
        return super().visit_call_(call) if product is None else self.emit(product)

    def value(self, expr: relax.Expr) -> Any:
        """What a variable is bound to; None for anything else."""
        return self.bound.get(expr) if isinstance(expr, relax.Var) else None

    def product(self, call: Any) -> _Product | None:
        """The product that an expression is, with what is added to it."""
        if _is(call, "matmul"):
            return self.matmul(call)
        if not _is(call, "add"):
            return None
        for mine, other in (call.args, reversed(call.args)):
            if not isinstance(mine, relax.DataflowVar) or self.uses[mine] != 1:
                continue
            product = self.product(self.value(mine))
            if product is None or product.residual is not None:
                continue
            if len(other.ty.shape) == 1 and product.bias is None:
                bias = self.value(other)
                stored = bias.args[0] if _is(bias, "astype") else other
                return product._replace(bias=stored)
            if str(other.ty) == str(product.out_type):
                return product._replace(residual=other)
        return None

    def matmul(self, call: relax.Call) -> _Product | None:
        x, transposed = call.args
        permute = self.value(transposed)
        if not _is(permute, "permute_dims") or permute.attrs.axes is not None:
            return None
        weight = stored_weight(self.mod, permute.args[0], self.value)
        if weight is None or len(weight.shape) != 2 or len(x.ty.shape) != 2:
            return None
        if str(weight.stored[-1].ty.dtype) != str(x.ty.dtype):
            return None
        return _Product(x, weight, call.ty)

    def emit(self, product: _Product) -> relax.Expr:
        weight, bias, residual = product.weight, product.bias, product.residual
        format = CudaFormat.of(weight.shape, weight.quant, str(product.x.ty.dtype))
        kernel = matmul_kernel(
            format,
            str(product.out_type.dtype),
            self.shared_limit,
            None if bias is None else str(bias.ty.dtype),
            residual is not None,
        )
        added = [term for term in (bias, residual) if term is not None]
        arguments = [self.visit_expr(part) for part in (product.x, *weight.stored, *added)]
        function = self.builder_.add_func(kernel, "matmul")
        return relax.call_tir(function, arguments, product.out_type)
