"""Multiply with weights in their stored form on GPUs, and do what follows at once.

    w = dequantize(q, s); y = matmul(x, permute_dims(w)); z = y + b; r = h + z
    ->
    r = call_tir(matmul, (x, q, s, b, h))

The bias and the residual may be missing, and each sum only counts if nobody else reads what it is
made of. A gated product is computed by the product that both its halves are of, under the same
condition:

    y = matmul(x, w); z = multiply(silu(split(y)[0]), split(y)[1])   ->   z = gated_matmul(x, q, s)

Without this pass a step writes every weight out as float16 first. Runs before LegalizeOps.
"""

from typing import Any, NamedTuple

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels.cuda_matmul import (
    PAIRED_ROWS,
    CudaFormat,
    gated_matmul_kernel,
    matmul_kernel,
)
from relaxlm.compiler.kernels.row_expression import Activation, Binary, gated
from relaxlm.compiler.passes.graph import Graph, is_op, row_size
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.compiler.passes.row_matching import RowMatcher, Rows
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


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, shared_limit: int) -> None:
        super().__init__(mod)
        self.mod, self.shared_limit = mod, shared_limit

    def rewrite(self, function: relax.Function) -> relax.Expr:
        # Patterns are matched on the function as it was.
        self.graph = Graph(function)
        return self.visit_expr(function)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        product = self.product(call)
        if product is not None:
            return self.emit(product)
        gated = self.gated(call)
        return super().visit_call_(call) if gated is None else gated

    def product(self, call: Any) -> _Product | None:
        """The product that an expression is, with what is added to it."""
        if is_op(call, "matmul"):
            return self.matmul(call)
        if not is_op(call, "add"):
            return None
        for mine, other in (call.args, reversed(call.args)):
            if not self.graph.used_once(mine):
                continue
            product = self.product(self.graph.value(mine))
            if product is None or product.residual is not None:
                continue
            if len(other.ty.shape) == 1 and product.bias is None:
                return product._replace(bias=self.graph.stored(other))
            if str(other.ty) == str(product.out_type):
                return product._replace(residual=other)
        return None

    def matmul(self, call: relax.Call) -> _Product | None:
        x, transposed = call.args
        permute = self.graph.value(transposed)
        if not is_op(permute, "permute_dims") or permute.attrs.axes is not None:
            return None
        weight = stored_weight(self.mod, permute.args[0], self.graph.value)
        if weight is None or len(weight.shape) != 2 or len(x.ty.shape) != 2:
            return None
        if str(weight.stored[-1].ty.dtype) != str(x.ty.dtype):
            return None
        return _Product(x, weight, call.ty)

    def gated(self, call: relax.Call) -> relax.Expr | None:
        """A gated product in the product that its halves are of; None where there is no kernel."""
        if not is_op(call, "multiply"):
            return None
        dtype, size = str(call.ty.dtype), row_size(call)
        matcher = RowMatcher(self.graph, self.mod, dtype)
        if size is None or not matcher.is_elementwise(call):
            return None
        rows = Rows(matcher, size, set())
        value = rows.of(call)
        if not isinstance(value, Binary) or not isinstance(value.left, Activation):
            return None
        if value != gated(size, value.left.name):
            return None
        (source,) = rows.tensors
        product = self.product(self.graph.value(source)) if self.graph.used_once(source) else None
        if product is None or product.bias is not None or product.residual is not None:
            return None
        weight = product.weight
        if dtype == "float32" or weight.shape[0] != 2 * size or size % PAIRED_ROWS:
            return None
        format = CudaFormat.of(weight.shape, weight.quant, dtype)
        kernel = gated_matmul_kernel(format, value.left.name, self.shared_limit)
        function = self.builder_.add_func(kernel, "gated_matmul")
        arguments = [self.visit_expr(part) for part in (product.x, *weight.stored)]
        return relax.call_tir(function, arguments, call.ty)

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
