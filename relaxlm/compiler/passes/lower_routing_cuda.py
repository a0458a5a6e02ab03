"""Choose experts on GPUs with a warp per token.

    scores, chosen = call_tir(choose_experts, (p,))   ->   the same with a kernel of our own

and so for `limit_to_groups`. What these compute says `models/routing.py`, which marks them with an
attribute. Runs before the schedules of TVM, which have none for searches.
"""

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels.cuda_routing import MOST_GROUPS, choose_kernel, limit_kernel
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.models.routing import ROUTING


@tvm.transform.module_pass(opt_level=0, name="LowerRoutingCUDA")
class LowerRoutingCUDA:
    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.mod = mod

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
            function = self.builder_.add_func(choose_kernel(experts, each), "choose_experts")
            return relax.call_tir(function, [scores], list(call.ty.fields))
        groups, kept, best, otherwise = numbers
        if int(groups) > MOST_GROUPS:
            return call
        kernel = limit_kernel(experts, int(groups), int(kept), int(best), float(otherwise))
        function = self.builder_.add_func(kernel, "limit_to_groups")
        return relax.call_tir(function, [scores], call.ty)
