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

from relaxlm.compiler.kernels.product import Product, ProductKernel
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


@tvm.transform.module_pass(opt_level=0, name="LowerMatmulGPU")
class LowerMatmulGPU:
    """The pass.

    Args:
        kernel: gives the kernels.
    """

    def __init__(self, kernel: ProductKernel) -> None:
        self.kernel = kernel

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self.kernel)
        return rewrite_functions(mod, rewriter, rewriter.rewrite)


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, kernel: ProductKernel) -> None:
        super().__init__(mod)
        self.mod, self.kernel = mod, kernel

    def rewrite(self, function: relax.Function) -> relax.Expr:
        # Patterns are matched on the function as it was.
        self.graph = Graph(function)
        return self.visit_expr(function)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        product = self.product(call)
        made = self.gated(call) if product is None else self.emit(product)
        return super().visit_call_(call) if made is None else made

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
        if product.weight.shape[0] != 2 * size:
            return None
        kernel = self.kernel(self.description(product, dtype, activation=value.left.name))
        if kernel is None:
            return None
        function = self.builder_.add_func(kernel, "gated_matmul")
        arguments = [self.visit_expr(part) for part in (product.x, *product.weight.stored)]
        return relax.call_tir(function, arguments, call.ty)

    def emit(self, product: _Product) -> relax.Expr | None:
        bias, residual = product.bias, product.residual
        kernel = self.kernel(
            self.description(
                product,
                str(product.out_type.dtype),
                bias=None if bias is None else str(bias.ty.dtype),
                residual=residual is not None,
            )
        )
        if kernel is None:
            return None
        added = [term for term in (bias, residual) if term is not None]
        arguments = [self.visit_expr(part) for part in (product.x, *product.weight.stored, *added)]
        function = self.builder_.add_func(kernel, "matmul")
        return relax.call_tir(function, arguments, product.out_type)

    @staticmethod
    def description(product: _Product, out_dtype: str, **more: Any) -> Product:
        """What a kernel has to compute."""
        weight = product.weight
        n, k = weight.shape
        stored = str(weight.stored[-1].ty.dtype)
        return Product((n, k), weight.quant, stored, str(product.x.ty.dtype), out_dtype, **more)
