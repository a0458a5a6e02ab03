"""Run a rewriter over the Relax functions of a module: what the passes here have in common."""

from collections.abc import Callable

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator


def variables(value: relax.Expr) -> list[relax.Var]:
    """The variables that an expression reads, each as often as it does."""
    found: list[relax.Var] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Var):
            found.append(expr)

    relax.analysis.post_order_visit(value, visit)
    return found


def rewrite_functions(
    mod: tvm.IRModule,
    rewriter: PyExprMutator,
    rewrite: Callable[[relax.Function], relax.Function] | None = None,
) -> tvm.IRModule:
    """Replace every Relax function by what the rewriter makes of it, and remove what is unused.

    Args:
        rewriter: made for `mod`; the kernels it adds go into the same module.
        rewrite: of one function; `rewriter.visit_expr` if None.
    """
    for name, function in mod.functions_items():
        if isinstance(function, relax.Function):
            rewriter.builder_.update_func(name, (rewrite or rewriter.visit_expr)(function))
    return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())
