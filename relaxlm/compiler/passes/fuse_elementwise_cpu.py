"""Fewer passes over activations on CPUs: `fuse_rows`, and what is rounded is written so at once.

    y = gelu(add(x, astype(bias)))                     ->   y = add_gelu(x, bias)

What matmuls with rounded activations read is written in their form, by the matmul itself where
there is a kernel for that:

    r = call_tir(round, add_norm(a, b, w)[1])          ->   x, r = add_norm_rounded(a, b, w)
    r = call_tir(round, silu_mul(rounded_matmul(..)))  ->   r = gated_matmul(..)

Runs after FuseRope, which takes biases and norms of q and k along, and LowerMatmulCPU, which
rounds, and before LegalizeOps, which would make a loop nest of each operator.
"""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator

from relaxlm.compiler.kernels.cpu_elementwise import RowKernel, row_kernel
from relaxlm.compiler.kernels.cpu_rounded import gated_matmul_kernel, supports_gated
from relaxlm.compiler.kernels.rounding import Rounding
from relaxlm.compiler.kernels.row_expression import Activation, Binary, Expression, Norm, gated
from relaxlm.compiler.passes.fuse_rows import RowFusion, kernel_name
from relaxlm.compiler.passes.graph import calls, is_op, row_size
from relaxlm.compiler.passes.lower_matmul_cpu import ROUNDING, matrix_of
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.compiler.passes.row_matching import Rows


@tvm.transform.module_pass(opt_level=0, name="FuseElementwiseCPU")
class FuseElementwiseCPU:
    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod, "float32")
        return rewrite_functions(mod, rewriter, rewriter.rewrite)


@dataclass(frozen=True)
class _Rounded:
    """A variable that is rounded, always in one way; `also_plain`: others read it as it is."""

    rounding: Rounding
    also_plain: bool


@mutator
class _Rewriter(RowFusion):
    def rewrite(self, function: relax.Function) -> relax.Expr:
        self.written: dict[relax.Var, relax.Var] = {}  # rounded, besides
        return super().rewrite(function)

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
        if self.rounding(call) is not None:
            source = call.args[1].fields[0]
            written = self.written.get(source)
            x = self.visit_expr(source) if written is None else written
            if str(x.ty.dtype) == "int32":  # it was written rounded
                return x
        return super().visit_call_(call)

    def elementwise(self, call: relax.Call, var: relax.Var) -> relax.Expr | None:
        rounded = self.rounded(var)
        if rounded is not None and not rounded.also_plain:
            size = row_size(call)
            assert size is not None
            rows = Rows(self.matcher, size, self.made)
            product = self.gated_product(rows.of(call), rows, rounded.rounding)
            if product is not None:
                return product
        return super().elementwise(call, var)

    def emit(
        self,
        value: Expression,
        norm: Norm | None,
        keep: bool,
        rows: Rows,
        call: relax.Call,
        var: relax.Var,
    ) -> tuple[relax.Expr | None, relax.Expr]:
        """The result is rounded if only that is read."""
        rounded = self.rounded(var)
        rounding = None if rounded is None else rounded.rounding
        plain = rounded is None or rounded.also_plain
        kernel = RowKernel(rows.size, tuple(rows.inputs), value, norm, keep, plain, rounding)
        name = kernel_name(value, norm) + ("_rounded" if rounding else "")
        function = self.builder_.add_func(row_kernel(kernel), name.removeprefix("_"))
        n = call.ty.shape[0]
        types = [call.ty] * (keep + plain)
        if rounding is not None:
            types.append(relax.TensorType((n, rounding.row_words), "int32"))
        arguments = self.arguments(rows)
        if len(types) == 1:
            return None, relax.call_tir(function, arguments, types[0])
        all_ = self.builder_.emit(relax.call_tir(function, arguments, types))
        items = [relax.TupleGetItem(all_, i) for i in range(len(types))]
        if plain and rounding is not None:
            self.written[var] = self.builder_.emit(items.pop())
        kept = self.builder_.emit(items[0]) if keep else None
        return kept, items[-1]

    def gated_product(self, value: Any, rows: Rows, rounding: Rounding) -> relax.Expr | None:
        """A gated product in the matmul whose halves it is of, if there is a kernel for that."""
        if not isinstance(value, Binary) or not isinstance(value.left, Activation):
            return None
        if value != gated(rounding.k, value.left.name):
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
