"""Fewer kernels between the matrices of a layer on GPUs: `fuse_rows`.

Matmuls have added their bias and the residual already, where nobody else reads what it is added to.
Runs after LowerMatmulGPU and FuseRope, which takes the norms of q and k along, and before
LegalizeOps, which would make a loop nest of each operator.
"""

from collections.abc import Callable

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import mutator

from relaxlm.compiler.kernels.row_expression import Expression, Input, Norm
from relaxlm.compiler.passes.fuse_rows import RowFusion, kernel_name
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.compiler.passes.row_matching import Rows

# (size, inputs, value, norm, keep, dtype) -> the kernel, see `cuda_rows`; None where there is none.
RowKernel = Callable[
    [int, tuple[Input, ...], Expression, Norm | None, bool, str], tirx.PrimFunc | None
]


@tvm.transform.module_pass(opt_level=0, name="FuseElementwiseGPU")
class FuseElementwiseGPU:
    """The pass.

    Args:
        kernel: gives the kernels.
        dtype: that the model computes in.
    """

    def __init__(self, kernel: RowKernel, dtype: str) -> None:
        self.kernel, self.dtype = kernel, dtype

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self.kernel, self.dtype)
        return rewrite_functions(mod, rewriter, rewriter.rewrite)


@mutator
class _Rewriter(RowFusion):
    def __init__(self, mod: tvm.IRModule, kernel: RowKernel, dtype: str) -> None:
        super().__init__(mod, dtype)
        self.kernel = kernel

    def emit(
        self,
        value: Expression,
        norm: Norm | None,
        keep: bool,
        rows: Rows,
        call: relax.Call,
        var: relax.Var,
    ) -> tuple[relax.Expr | None, relax.Expr | None]:
        kernel = self.kernel(rows.size, tuple(rows.inputs), value, norm, keep, self.dtype)
        if kernel is None:
            return None, None
        function = self.builder_.add_func(kernel, kernel_name(value, norm))
        arguments = self.arguments(rows)
        if not keep:
            return None, relax.call_tir(function, arguments, call.ty)
        both = self.builder_.emit(relax.call_tir(function, arguments, [call.ty, call.ty]))
        return self.builder_.emit(relax.TupleGetItem(both, 0)), relax.TupleGetItem(both, 1)
