"""Multiply each row with the weights of its own expert, as they are stored.

    w = dequantize(q, s)                                   y = call_tir(expert_matmul,
    y = relaxlm.expert_matmul(x, w, chosen, repeat)    ->                (x, chosen, q, s))

`w` is [E, N, K]; what it is, and what `repeat` means, says `models/moe.py`. No expert's weights are
read but those of the chosen ones. Runs after QuantizeParameters and before LegalizeOps.
"""

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels.cpu_experts import expert_kernel
from relaxlm.compiler.kernels.vector import vector_unit
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.compiler.passes.weights import stored_weight
from relaxlm.errors import UnsupportedError
from relaxlm.models.config import DecoderConfig
from relaxlm.models.moe import EXPERT_MATMUL


@tvm.transform.module_pass(opt_level=0, name="LowerExpertMatmul")
class LowerExpertMatmul:
    """The pass.

    Args:
        kind: of the target.

    Raises:
        UnsupportedError: a target that there are no kernels for.
    """

    def __init__(self, config: DecoderConfig, kind: str) -> None:
        # Not where the operator is met: an exception loses its type on its way through TVM.
        if kind != "cpu" and getattr(config, "num_experts", None):
            raise UnsupportedError(
                f"{config.model_type}: mixtures of experts are not supported on {kind}. Compile "
                "for the CPU: --device cpu"
            )

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.mod = mod
        self.unit = vector_unit(tvm.target.Target.current(allow_none=True))

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        is_ours = (
            call.op == tvm.ir.Op.get("relax.call_dps_packed")
            and isinstance(call.args[0], relax.ExternFunc)
            and call.args[0].global_symbol == EXPERT_MATMUL
        )
        if not is_ours:
            return call
        x, matrix, chosen, repeat = call.args[1]
        weight = stored_weight(self.mod, matrix, self.lookup_binding)
        assert weight is not None, f"weights of experts are parameters, not {matrix}"
        dtype = str(weight.stored[-1].ty.dtype)
        each = int(chosen.ty.shape[1])
        kernel = expert_kernel(
            weight.shape, weight.quant, dtype, each, int(repeat.value), self.unit
        )
        function = self.builder_.add_func(kernel, "expert_matmul")
        return relax.call_tir(function, [x, chosen, *weight.stored], call.ty)
