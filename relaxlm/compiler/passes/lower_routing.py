"""Choose experts on GPUs with many threads per token.

    scores, chosen = call_tir(choose_experts, (p,))   ->   the same with a kernel of our own

and so for `limit_to_groups`. What these compute says `models/routing.py`, which marks them with an
attribute. Runs before the schedules of TVM, which have none for searches.
"""

from types import ModuleType

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels import cuda_routing, gpu_routing
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.models.routing import ROUTING

KERNELS = {"cuda": cuda_routing, "gpu": gpu_routing}


@tvm.transform.module_pass(opt_level=0, name="LowerRouting")
class LowerRouting:
    """The pass.

    Args:
        kind: of the target, a key of `KERNELS`.
    """

    def __init__(self, kind: str) -> None:
        self.kernels = KERNELS[kind]

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod, self.kernels))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, kernels: ModuleType) -> None:
        super().__init__(mod)
        self.mod, self.kernels = mod, kernels

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op != tvm.ir.Op.get("relax.call_tir"):
            return call
        mark = (self.mod[call.args[0]].attrs or {}).get(ROUTING)
        if mark is None:
            return call
        name, *numbers = str(mark).split()
        (scores,) = call.args[1].fields
        experts = int(scores.ty.shape[1])
        if name == "choose":
            (each,) = map(int, numbers)
            kernel = self.kernels.choose_kernel(experts, each)
            function = self.builder_.add_func(kernel, "choose_experts")
            return relax.call_tir(function, [scores], list(call.ty.fields))
        groups, kept, best, otherwise = numbers
        if int(groups) > self.kernels.MOST_GROUPS:
            return call
        kernel = self.kernels.limit_kernel(
            experts, int(groups), int(kept), int(best), float(otherwise)
        )
        function = self.builder_.add_func(kernel, "limit_to_groups")
        return relax.call_tir(function, [scores], call.ty)
