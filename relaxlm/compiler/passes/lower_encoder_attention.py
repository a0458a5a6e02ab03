"""Turn encoders' abstract attention into a kernel for one target.

    out = call_dps_packed("relaxlm.encoder_attention", (qkv, row_offsets, q_heads, scale))
    ->   out = call_tir(encoder_attention, (qkv, row_offsets))

Where a kernel wants to know of each row where its text begins and ends, another one finds that out
once per step:

    view = call_tir(text_view, (row_offsets,)); out = call_tir(encoder_attention, (qkv, view))

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
    """The pass.

    Args:
        attend: makes the kernel.
        view: the kernel that makes a [n, 2] int32 view of row_offsets, if `attend`'s reads one.
    """

    def __init__(self, attend: Attend, view: tirx.PrimFunc | None = None) -> None:
        self.attend, self.view = attend, view

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod, self))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, lowering: LowerEncoderAttention) -> None:
        super().__init__(mod)
        self.lowering = lowering
        self.views: dict[relax.Expr, relax.Var] = {}

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
        kernel = self.lowering.attend(shape, str(qkv.ty.dtype))
        function = self.builder_.add_func(kernel, "encoder_attention")
        texts = row_offsets if self.lowering.view is None else self._view(qkv, row_offsets)
        return relax.call_tir(function, [qkv, texts], call.ty)

    def _view(self, qkv: relax.Expr, row_offsets: relax.Expr) -> relax.Var:
        if row_offsets not in self.views:
            function = self.builder_.add_func(self.lowering.view, "text_view")
            ty = relax.TensorType((qkv.ty.shape[0], 2), "int32")
            view = relax.call_tir(function, [row_offsets], ty)
            self.views[row_offsets] = self.builder_.emit(view)
        return self.views[row_offsets]
