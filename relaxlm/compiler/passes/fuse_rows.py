"""Groups of operators on rows [n, size] become one kernel: what the passes of all targets share.

y = multiply(silu(split(x)[0]), split(x)[1])       ->   y = silu_mul(x)
x = add(a, b); y = rms_norm(x, astype(w))          ->   x, y = add_norm(a, b, w)
x = add(a, rms_norm(b, v)); y = rms_norm(x, w)     ->   x, y = norm_add_norm(a, b, v, w)
"""

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator

from relaxlm.compiler.kernels.row_expression import Expression, Matrix, Norm, name_of
from relaxlm.compiler.passes.graph import Graph, row_size
from relaxlm.compiler.passes.row_matching import RowMatcher, Rows


class RowFusion(PyExprMutator):
    """Rewrites functions; what calls the kernels is `emit`, which each target has its own of."""

    def __init__(self, mod: tvm.IRModule, dtype: str) -> None:
        """`dtype`: that the model computes in; rows of others stay as they are."""
        super().__init__(mod)
        self.mod, self.dtype = mod, dtype

    def rewrite(self, function: relax.Function) -> relax.Expr:
        # Patterns are matched on the function as it was.
        self.graph = Graph(function)
        self.matcher = RowMatcher(self.graph, self.mod, self.dtype)
        self.variables = {value: var for var, value in self.graph.bound.items()}
        self.made: set[relax.Var] = set()  # sums that a kernel has written besides
        return self.visit_expr(function)

    def emit(
        self,
        value: Expression,
        norm: Norm | None,
        keep: bool,
        rows: Rows,
        call: relax.Call,
        var: relax.Var,
    ) -> tuple[relax.Expr | None, relax.Expr | None]:
        """Call a kernel for the value of `var`, which `call` is.

        Args:
            keep: whether others read the value that the norm is of.
            rows: what the expressions read.

        Returns:
            The value that it keeps, if any, and the result; None where there is no kernel.
        """
        raise NotImplementedError

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        fused = None
        if call in self.variables:
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

    def norm(self, call: relax.Call, var: relax.Var) -> relax.Expr | None:
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
        total, result = self.emit(value, norm, not isinstance(value, Matrix), rows, call, var)
        if total is not None and isinstance(x, relax.DataflowVar):
            self.set_var_remap(x, total)
            self.made.add(x)
        return result

    def elementwise(self, call: relax.Call, var: relax.Var) -> relax.Expr | None:
        size = row_size(call)
        assert size is not None
        rows = Rows(self.matcher, size, self.made)
        return self.emit(rows.of(call), None, False, rows, call, var)[1]

    def arguments(self, rows: Rows) -> list[relax.Expr]:
        """What a kernel gets: tensors [n, ...] as it reads them, [n, size]."""
        return [
            self.visit_expr(tensor) if given.is_vector else self.flat(tensor)
            for tensor, given in zip(rows.tensors, rows.inputs, strict=True)
        ]

    def flat(self, tensor: relax.Expr) -> relax.Expr:
        """A tensor [n, ...] as [n, size]."""
        new = self.visit_expr(tensor)
        if len(tensor.ty.shape) == 2:
            return new
        shape = relax.ShapeExpr([tensor.ty.shape[0], row_size(tensor)])
        return self.builder_.emit(relax.op.reshape(new, shape))


def kernel_name(value: Expression, norm: Norm | None) -> str:
    """A name for a kernel: its operators in order, "add_norm"."""
    return "_".join(filter(None, (name_of(value), "norm" if norm is not None else "")))
