"""Turn encoders' abstract attention into a kernel for one target.

    out = call_dps_packed("relaxlm.encoder_attention", (qkv, row_offsets, q_heads, scale))
    ->   out = call_tir(encoder_attention, (qkv, row_offsets))

Runs before LegalizeOps, in place of the passes that lower attention over a cache.
"""

from collections.abc import Callable

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.models.encoder import ENCODER_ATTENTION

# The kernel of a target: see `compiler/kernels/cpu_encoder_attention.py` for its arguments.
Attend = Callable[[AttentionShape, str], tirx.PrimFunc]


@tvm.transform.module_pass(opt_level=0, name="LowerEncoderAttention")
class LowerEncoderAttention:
    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod, self.attend))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, attend: Attend) -> None:
        super().__init__(mod)
        self.attend = attend

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        is_attention = (
            call.op == tvm.ir.Op.get("relax.call_dps_packed")
            and isinstance(call.args[0], relax.ExternFunc)
            and call.args[0].global_symbol == ENCODER_ATTENTION
        )
        if not is_attention:
            return call
        qkv, row_offsets, q_heads, scale = call.args[1]
        _, heads, dim = qkv.ty.shape
        heads, dim, q_heads = int(heads), int(dim), int(q_heads.value)
        shape = AttentionShape(q_heads, (heads - q_heads) // 2, dim, 0, 0, scale.value)
        kernel = self.attend(shape, str(qkv.ty.dtype))
        function = self.builder_.add_func(kernel, "encoder_attention")
        return relax.call_tir(function, [qkv, row_offsets], call.ty)
