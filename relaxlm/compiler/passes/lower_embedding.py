"""Look up only the rows of an embedding that are asked for.

    w = dequantize(q, s); x = take(w, ids, axis=0)   ->   x = embedding_lookup(q, s, ids)

Without it the whole matrix is dequantized at every step. Runs after QuantizeParameters and before
LegalizeOps, for every target.
"""

import tvm
from tvm import relax, te
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.compiler.passes.weights import stored_weight
from relaxlm.quantization.transform import element


@tvm.transform.module_pass(opt_level=0, name="LowerEmbedding")
class LowerEmbedding:
    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.mod = mod

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op != tvm.ir.Op.get("relax.take") or int(call.attrs.axis or 0) != 0:
            return call
        table, ids = call.args
        if len(table.ty.shape) != 2 or len(ids.ty.shape) != 1:
            return call
        weight = stored_weight(self.mod, table, self.lookup_binding)
        if weight is None:
            return call
        dtype, quant = str(call.ty.dtype), weight.quant

        def embedding_lookup(ids: te.Tensor, *stored: te.Tensor) -> te.Tensor:
            def value(t, h):
                if quant is None:
                    return stored[0][ids[t], h].astype(dtype)
                words, scales = stored
                return element(quant, words, scales, ids[t], h, dtype)

            return te.compute((ids.shape[0], weight.shape[1]), value, name="embedding_lookup")

        return self.builder_.call_te(
            embedding_lookup, ids, *weight.stored, primfunc_name_hint="embedding_lookup"
        )
