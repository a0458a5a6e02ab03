"""Read a matmul's weight as it is stored, in the matmul's own kernel.

    w = call_tir(dequantize, (q, s)); y = call_tir(NT_matmul, (x, w))
    ->  y = fused(x, q, s), a primitive function of the two calls, which FuseTIR makes one kernel of

FuseOps puts elementwise functions behind a reduction, but none in front of it: without this pass
every step would write each weight in full and read it back. Runs after FuseOps and FuseTIR, so that
what is fused behind a matmul stays with it, and before another FuseTIR. TVM's schedules then
compute a weight's elements where they are read.
"""

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.quantization.transform import DEQUANTIZE


@tvm.transform.module_pass(opt_level=0, name="FuseDequantizeMatmul")
class FuseDequantizeMatmul:
    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.mod = mod

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if not self._calls(call) or "matmul" not in call.args[0].name_hint:
            return call
        weights = [self._dequantized(argument) for argument in call.args[1]]
        if all(weight is None for weight in weights):
            return call
        params: list[relax.Var] = []
        arguments: list[relax.Expr] = []

        def param(argument: relax.Expr) -> relax.Var:
            params.append(relax.Var(f"p{len(params)}", argument.ty))
            arguments.append(argument)
            return params[-1]

        inside = []  # per argument: what is computed before the matmul, and its inputs
        for argument, weight in zip(call.args[1], weights, strict=True):
            inputs = [argument] if weight is None else list(weight.args[1])
            inside.append((weight, [param(read) for read in inputs]))
        builder = relax.BlockBuilder(self.mod)
        with builder.function("fused", params, attrs={"Primitive": True}):
            with builder.dataflow():
                read = [
                    taken[0]
                    if weight is None
                    else builder.emit(relax.call_tir(weight.args[0], taken, weight.ty))
                    for weight, taken in inside
                ]
                result = relax.call_tir(call.args[0], read, call.ty)
                result = builder.emit_output(result)
            builder.emit_func_output(result)
        function = builder.get()["fused"].without_attr("global_symbol")
        # Symbolic lengths of this function are its own.
        function = relax.utils.copy_with_new_vars(function)
        name = self.builder_.add_func(function, f"dequantize_{call.args[0].name_hint}")
        return relax.Call(name, arguments)

    @staticmethod
    def _calls(expr: relax.Expr) -> bool:
        return isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.call_tir")

    def _dequantized(self, expr: relax.Expr) -> relax.Call | None:
        """The call that dequantizes a weight, if `expr` is its result."""
        value = self.lookup_binding(expr) if isinstance(expr, relax.Var) else None
        if value is None or not self._calls(value):
            return None
        function = self.mod[value.args[0]]
        marked = isinstance(function, tirx.PrimFunc) and DEQUANTIZE in (function.attrs or {})
        return value if marked else None
