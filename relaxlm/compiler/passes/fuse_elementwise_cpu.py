"""Fewer passes over activations on CPUs: groups of operators on rows [n, size] become one kernel.

    y = multiply(silu(split(x)[0]), split(x)[1])       ->   y = silu_mul(x)
    y = gelu(add(x, astype(bias)))                     ->   y = add_gelu(x, bias)
    x = add(a, b); y = rms_norm(x, astype(w))          ->   x, y = add_norm(a, b, w)
    x = add(a, rms_norm(b, v)); y = rms_norm(x, w)     ->   x, y = norm_add_norm(a, b, v, w)

What matmuls with rounded activations read is written in their form at once, by the matmul itself
where there is a kernel for that:

    r = call_tir(round, add_norm(a, b, w)[1])          ->   x, r = add_norm_rounded(a, b, w)
    r = call_tir(round, silu_mul(rounded_matmul(..)))  ->   r = gated_matmul(..)

Runs after FuseRopeCPU, which takes biases and norms of q and k along, and LowerMatmulCPU, which
rounds, and before LegalizeOps, which would make a loop nest of each operator.
"""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels.cpu_elementwise import RowKernel, gated, row_kernel
from relaxlm.compiler.kernels.cpu_rounded import gated_matmul_kernel, supports_gated
from relaxlm.compiler.kernels.rounding import Rounding
from relaxlm.compiler.kernels.row_expression import Activation, Binary, Matrix, name_of
from relaxlm.compiler.passes.graph import Graph, calls, is_op, row_size
from relaxlm.compiler.passes.lower_matmul_cpu import ROUNDING, matrix_of
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.compiler.passes.row_matching import RowMatcher, Rows


@tvm.transform.module_pass(opt_level=0, name="FuseElementwiseCPU")
class FuseElementwiseCPU:
    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod)
        return rewrite_functions(mod, rewriter, rewriter.rewrite)


@dataclass(frozen=True)
class _Rounded:
    """A variable that is rounded, always in one way; `also_plain`: others read it as it is."""

    rounding: Rounding
    also_plain: bool


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.mod = mod

    def rewrite(self, function: relax.Function) -> relax.Expr:
        # Patterns are matched on the function as it was.
        self.graph = Graph(function)
        self.matcher = RowMatcher(self.graph, self.mod)
        self.variables = {value: var for var, value in self.graph.bound.items()}
        self.made: set[relax.Var] = set()  # sums that a kernel has written besides
        self.written: dict[relax.Var, relax.Var] = {}  # rounded, besides
        return self.visit_expr(function)

    def rounded(self, var: relax.Var) -> _Rounded | None:
        """How a variable is rounded, if it is."""
        found = [self.rounding(user) for user in self.graph.users.get(var, ())]
        kinds = {rounding for rounding in found if rounding is not None}
        if len(kinds) != 1 or not isinstance(var, relax.DataflowVar):
            return None
        return _Rounded(kinds.pop(), None in found)

    def rounding(self, value: Any) -> Rounding | None:
        """How a call rounds; None for anything else."""
        if not is_op(value, "call_tir"):
            return None
        text = (self.mod[value.args[0]].attrs or {}).get(ROUNDING)
        return None if text is None else Rounding.parse(str(text))

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        fused = None
        if self.rounding(call) is not None:
            source = call.args[1].fields[0]
            written = self.written.get(source)
            x = self.visit_expr(source) if written is None else written
            fused = x if str(x.ty.dtype) == "int32" else None  # it was written rounded
        elif call in self.variables:
            var = self.variables[call]
            if self.matcher.is_norm(call):
                fused = None if self.matcher.is_absorbed(var) else self.norm(call, var)
            elif self.matcher.is_elementwise(call) and not self.is_left(var):
                fused = self.elementwise(call, var)
        return super().visit_call_(call) if fused is None else fused

    def is_left(self, var: relax.Var) -> bool:
        """Whether an elementwise value will be computed by a kernel that is made for a user."""
        users = self.graph.users.get(var, ())
        return self.matcher.is_absorbed(var) or any(self.matcher.is_norm(user) for user in users)

    def norm(self, call: relax.Call, var: relax.Var) -> relax.Expr:
        x, size = self.matcher.normed(call), row_size(call)
        assert size is not None
        rows = Rows(self.matcher, size, self.made)
        value = rows.inner(x)
        base, first = self.graph.columns(x)
        summed = self.graph.value(base)
        if (
            isinstance(value, Matrix)
            and first == 0
            and base.same_as(x)
            and isinstance(x, relax.DataflowVar)
            and x not in self.made
            and self.matcher.is_elementwise(summed)
        ):
            # Others read the sum, too: it is written besides.
            rows = Rows(self.matcher, size, self.made)
            value = rows.of(summed)
        norm = rows.norm(call)
        kernel = RowKernel(size, (), value, norm, keep=not isinstance(value, Matrix))
        total, result = self.emit(kernel, rows, call, var)
        if total is not None and isinstance(x, relax.DataflowVar):
            self.set_var_remap(x, total)
            self.made.add(x)
        return result

    def elementwise(self, call: relax.Call, var: relax.Var) -> relax.Expr:
        size = row_size(call)
        assert size is not None
        rows = Rows(self.matcher, size, self.made)
        value = rows.of(call)
        rounded = self.rounded(var)
        if rounded is not None and not rounded.also_plain:
            product = self.gated_product(value, rows, rounded.rounding)
            if product is not None:
                return product
        return self.emit(RowKernel(size, (), value), rows, call, var)[1]

    def emit(
        self, kernel: RowKernel, rows: Rows, call: relax.Call, var: relax.Var
    ) -> tuple[relax.Expr | None, relax.Expr]:
        """Call a kernel for the value of `var`.

        Returns:
            The value that it keeps, if any, and the result, which is rounded if only that is read.
        """
        rounded = self.rounded(var)
        rounding = None if rounded is None else rounded.rounding
        plain = rounded is None or rounded.also_plain
        kernel = RowKernel(
            kernel.size,
            tuple(rows.inputs),
            kernel.value,
            kernel.norm,
            kernel.keep,
            plain,
            rounding,
        )
        parts = [name_of(kernel.value), "norm" if kernel.norm else ""]
        name = "_".join(part for part in (*parts, "rounded" if rounding else "") if part)
        function = self.builder_.add_func(row_kernel(kernel), name)
        n = call.ty.shape[0]
        types = [call.ty] * (kernel.keep + plain)
        if rounding is not None:
            types.append(relax.TensorType((n, rounding.row_words), "int32"))
        arguments = [
            self.visit_expr(tensor) if given.is_vector else self.flat(tensor)
            for tensor, given in zip(rows.tensors, rows.inputs, strict=True)
        ]
        if len(types) == 1:
            return None, relax.call_tir(function, arguments, types[0])
        all_ = self.builder_.emit(relax.call_tir(function, arguments, types))
        items = [relax.TupleGetItem(all_, i) for i in range(len(types))]
        if plain and rounding is not None:
            self.written[var] = self.builder_.emit(items.pop())
        kept = self.builder_.emit(items[0]) if kernel.keep else None
        return kept, items[-1]

    def flat(self, tensor: relax.Expr) -> relax.Expr:
        """A tensor [n, ...] as kernels of rows read it, [n, size]."""
        new = self.visit_expr(tensor)
        if len(tensor.ty.shape) == 2:
            return new
        shape = relax.ShapeExpr([tensor.ty.shape[0], row_size(tensor)])
        return self.builder_.emit(relax.op.reshape(new, shape))

    def gated_product(self, value: Any, rows: Rows, rounding: Rounding) -> relax.Expr | None:
        """A gated product in the matmul whose halves it is of, if there is a kernel for that."""
        if not isinstance(value, Binary) or not isinstance(value.left, Activation):
            return None
        if value != gated(rounding.k, value.left.name).value:
            return None
        (source,) = rows.tensors
        product = self.graph.value(source)
        if not calls(product, "rounded_matmul") or not self.graph.used_once(source):
            return None
        x, *stored = product.args[1].fields
        matrix = matrix_of(self.mod[product.args[0]])
        if (
            rounding.invariant
            or matrix.n != 2 * rounding.k
            or not supports_gated(matrix, rounding.isa)
        ):
            return None
        kernel = gated_matmul_kernel(matrix, rounding.isa, value.left.name)
        function = self.builder_.add_func(kernel, "gated_matmul")
        ty = relax.TensorType((product.ty.shape[0], rounding.row_words), "int32")
        return relax.call_tir(function, [self.visit_expr(part) for part in (x, *stored)], ty)
