"""Make every tensor of a step once, not once per layer.

    a = alloc_tensor(storage, 0, [n, 896]); ..; b = alloc_tensor(storage, 0, [n, 896])
    ->   a = alloc_tensor(storage, 0, [n, 896]); ..; b is a

The memory planner lets layers share storage; two tensors of one shape at one place in it are the
same bytes, and by the plan the second is written only when nobody reads the first any more. Making
a tensor costs the virtual machine as much as calling a small kernel, and a decoder makes ten of
them per layer. Runs after LowerAllocTensor.
"""

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.passes.rewrite import rewrite_functions


@tvm.transform.module_pass(opt_level=0, name="ShareTensors")
class ShareTensors:
    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod)
        return rewrite_functions(mod, rewriter, rewriter.rewrite)


@mutator
class _Rewriter(PyExprMutator):
    def rewrite(self, function: relax.Function) -> relax.Expr:
        self.made: dict[tuple, relax.Var] = {}
        return self.visit_expr(function)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op != tvm.ir.Op.get("relax.memory.alloc_tensor"):
            return call
        storage, *place = call.args
        key = (storage, *(str(part) for part in place))
        if key not in self.made:
            self.made[key] = self.builder_.emit(call)
        return self.made[key]
