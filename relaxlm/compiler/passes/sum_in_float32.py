"""Matrix products of float16 are summed up in float32, and rounded once.

    y = matmul(x, w)    ->    y = astype(matmul(x, w, out_dtype="float32"), "float16")

CPUs compute in float32 anyway, and the kernels of CUDA sum up in it; this is for the targets whose
kernels are TVM's, which otherwise round after every product. Runs before FuseTransposeMatmul.
"""

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.passes.rewrite import rewrite_functions


@tvm.transform.module_pass(opt_level=0, name="SumInFloat32")
class SumInFloat32:
    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod))


@mutator
class _Rewriter(PyExprMutator):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op != tvm.ir.Op.get("relax.matmul") or str(call.ty.dtype) != "float16":
            return call
        product = self.builder_.emit(relax.op.matmul(*call.args, out_dtype="float32"))
        return relax.op.astype(product, "float16")
