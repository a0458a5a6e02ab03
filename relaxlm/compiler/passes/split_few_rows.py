"""A step of few tokens by kernels of its own, chosen when the step runs.

    forward(ids [n], ..)    ->    forward(ids [n], ..) = if n <= FEW: forward_few(ids, ..)
                                                         else: forward_many(ids, ..)

One compiled step serves a token of a reply and a whole prompt. On a GPU, a matrix times many rows
is computed in tiles of them, which for one row computes dozens in vain; times few, by threads that
share out the sum. The two functions differ in these kernels only. Both come from TVM's schedule
rules. Runs on fused loop nests, before the other schedules, which leave what is scheduled alone.
"""

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.s_tir import dlight

from relaxlm.compiler.passes.gpu_schedules import Matmul

# Rows that kernels of few compute at once: those of a chat. TVM's schedule for more is slower by
# that factor, and shares fewer loads than tiles do.
FEW = 1
# What the names of the two functions end with.
PARTS = ("_few", "_many")
# What a function's lengths are at most, for the memory planner.
UPPER_BOUND = "tir_var_upper_bound"


@tvm.transform.module_pass(opt_level=0, name="SplitFewRows")
class SplitFewRows:
    """The pass.

    Args:
        function: that runs a step; its first parameter is [n].
    """

    def __init__(self, function: str) -> None:
        self.function = function

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        kernels = {name: _for_few_rows(kernel) for name, kernel in mod.functions_items()}
        found = {name: kernel for name, kernel in kernels.items() if kernel is not None}
        step = mod[self.function]
        if not found:
            return mod
        del mod[self.function]
        builder = relax.BlockBuilder(mod)
        names = {
            name: builder.add_func(kernel, f"{name.name_hint}_few")
            for name, kernel in found.items()
        }
        few = relax.utils.copy_with_new_vars(_Replaced(names).visit_expr(step))
        rows = few.params[0].ty.shape[0]
        few = few.with_attr(UPPER_BOUND, {rows.name: FEW})
        public = "global_symbol"
        few_var = builder.add_func(few.without_attr(public), self.function + PARTS[0])
        many = relax.utils.copy_with_new_vars(step).without_attr(public)
        many_var = builder.add_func(many, self.function + PARTS[1])
        params = relax.utils.copy_with_new_vars(step).params
        with builder.function(self.function, list(params), dict(step.attrs)):
            few_rows = params[0].ty.shape[0] <= FEW
            branches = [
                relax.SeqExpr([], relax.Call(var, list(params))) for var in (few_var, many_var)
            ]
            builder.emit_func_output(builder.emit(relax.If(few_rows, *branches)))
        return builder.finalize()


@mutator
class _Replaced(PyExprMutator):
    """A function with other kernels."""

    def __init__(self, names: dict[tvm.ir.GlobalVar, tvm.ir.GlobalVar]) -> None:
        super().__init__()
        self.names = names

    def visit_global_var_(self, var: tvm.ir.GlobalVar) -> tvm.ir.GlobalVar:
        return self.names.get(var, var)


def _for_few_rows(kernel: tvm.ir.BaseFunc) -> tirx.PrimFunc | None:
    """A kernel as TVM schedules it for few rows, if it does and one for many rows is its other."""
    if not isinstance(kernel, tirx.PrimFunc) or _is_scheduled(kernel):
        return None
    few = _scheduled(kernel, dlight.gpu.LowBatchGEMV(FEW))
    return few if few and _scheduled(kernel, Matmul()) else None


def _scheduled(kernel: tirx.PrimFunc, rule: dlight.base.ScheduleRule) -> tirx.PrimFunc | None:
    module = dlight.ApplyDefaultSchedule(rule)(tvm.IRModule({"main": kernel}))
    return module["main"] if _is_scheduled(module["main"]) else None


def _is_scheduled(kernel: tirx.PrimFunc) -> bool:
    return bool((kernel.attrs or {}).get("tirx.is_scheduled"))
