"""Fewer kernels between the matrices of a layer on GPUs: `fuse_rows`.

Matmuls have added their bias and the residual already, where nobody else reads what it is added to.
Runs after LowerMatmulCUDA and FuseRope, which takes the norms of q and k along, and before
LegalizeOps, which would make a loop nest of each operator.
"""

import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator

from relaxlm.compiler.kernels.cuda_rows import row_kernel
from relaxlm.compiler.kernels.row_expression import Expression, Norm
from relaxlm.compiler.passes.fuse_rows import RowFusion, kernel_name
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.compiler.passes.row_matching import Rows


@tvm.transform.module_pass(opt_level=0, name="FuseElementwiseCUDA")
class FuseElementwiseCUDA:
    """The pass.

    Args:
        dtype: that the model computes in.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self.dtype)
        return rewrite_functions(mod, rewriter, rewriter.rewrite)


@mutator
class _Rewriter(RowFusion):
    def emit(
        self,
        value: Expression,
        norm: Norm | None,
        keep: bool,
        rows: Rows,
        call: relax.Call,
        var: relax.Var,
    ) -> tuple[relax.Expr | None, relax.Expr]:
        kernel = row_kernel(rows.size, tuple(rows.inputs), value, norm, keep, self.dtype)
        function = self.builder_.add_func(kernel, kernel_name(value, norm))
        arguments = self.arguments(rows)
        if not keep:
            return None, relax.call_tir(function, arguments, call.ty)
        both = self.builder_.emit(relax.call_tir(function, arguments, [call.ty, call.ty]))
        return self.builder_.emit(relax.TupleGetItem(both, 0)), relax.TupleGetItem(both, 1)
