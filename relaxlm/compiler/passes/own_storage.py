"""Give a function its buffers as an argument, so that they are the same in every call.

    decode(.., params) =                       decode(.., params, storage) =
        s = alloc_storage(4096)         ->         s = storage[0]
        t = alloc_storage(4 * m * 320)             t = storage[1]
                                               decode_storage() =
                                                   (alloc_storage(4096), alloc_storage(20480))

A CUDA graph has addresses, and nothing else may get the memory behind them as long as there is the
graph. Sizes that depend on a length get its upper bound. Runs after LowerAllocTensor.
"""

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

# What a function's lengths are at most, for the memory planner.
UPPER_BOUND = "tir_var_upper_bound"


@tvm.transform.module_pass(opt_level=0, name="OwnStorage")
class OwnStorage:
    """The pass.

    Args:
        name: of the function; without it, nothing is done. NAME_storage makes its buffers.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        names = {var.name_hint for var in mod.get_global_vars()}
        if self.name not in names or f"{self.name}_storage" in names:
            return mod
        rewriter = _Rewriter(mod)
        function = rewriter.rewrite(mod[self.name])
        rewriter.builder_.update_func(mod.get_global_var(self.name), function)
        builder = relax.BlockBuilder(rewriter.builder_.finalize())
        with builder.function(f"{self.name}_storage", [], {"relax.force_pure": True}):
            storages = [builder.emit(call) for call in rewriter.allocations]
            builder.emit_func_output(relax.Tuple(storages))
        return builder.finalize()


@mutator
class _Rewriter(PyExprMutator):
    def rewrite(self, function: relax.Function) -> relax.Function:
        self.shapes = _largest_shapes(function)
        self.allocations: list[relax.Call] = []
        self.storage = relax.Var("storage", relax.TupleType([relax.AnyType()] * len(self.shapes)))
        params = [*function.params, self.storage]
        self.builder_.begin_scope(params)
        body = self.visit_expr(function.body)
        self.builder_.end_scope()
        assert len(self.allocations) == len(self.shapes)
        return relax.Function(params, body, function.ret_ty, attrs=function.attrs)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if not _allocates(call):
            return call
        place = len(self.allocations)
        self.allocations.append(
            relax.Call(call.op, [self.shapes[place], *call.args[1:]], call.attrs)
        )
        return relax.TupleGetItem(self.storage, place)


def _largest_shapes(function: relax.Function) -> list[relax.ShapeExpr]:
    """Of the buffers, in the order in which they are allocated."""
    symbols = {var.name for var in relax.analysis.defined_symbolic_vars(function)}
    bounds = function.attrs[UPPER_BOUND].items()
    largest = {name: int(most) for name, most in bounds if name in symbols}
    shapes: list[relax.ShapeExpr] = []

    def visit(expr: relax.Expr) -> None:
        if _allocates(expr):
            shapes.append(relax.ShapeExpr([int(extent) for extent in expr.args[0].values]))

    relax.analysis.post_order_visit(function.bind_symbolic_vars(largest).body, visit)
    return shapes


def _allocates(expr: relax.Expr) -> bool:
    return isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.memory.alloc_storage")
