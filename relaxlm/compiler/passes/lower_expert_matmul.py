"""Multiply each row with the weights of its own expert, as they are stored.

    w = dequantize(q, s)                                   y = call_tir(expert_matmul,
    y = relaxlm.expert_matmul(x, w, chosen, repeat)    ->                (x, chosen, q, s))

`w` is [E, N, K]; what it is, and what `repeat` means, says `models/moe.py`. No expert's weights are
read but those of the chosen ones. On GPUs, rows are sorted by expert first, once for all matrices
that read the same choice:

    plan = call_tir(plan_experts, (chosen,)); y = call_tir(expert_matmul, (x, chosen, plan, q, s))

(on those other than NVIDIA's a plan is two tensors).

On CPUs, the loop nest `choose_experts` that finds a token's experts becomes a kernel, too.

Runs after QuantizeParameters and before LegalizeOps.
"""

import re

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels import gpu_experts
from relaxlm.compiler.kernels.cpu_choose import choose_kernel
from relaxlm.compiler.kernels.cpu_experts import expert_kernel
from relaxlm.compiler.kernels.cuda_experts import expert_kernel as cuda_expert_kernel
from relaxlm.compiler.kernels.cuda_experts import plan_kernel, plan_size
from relaxlm.compiler.kernels.cuda_matmul import CudaFormat
from relaxlm.compiler.kernels.isa import dot_products
from relaxlm.compiler.kernels.vector import vector_unit
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.compiler.passes.weights import StoredWeight, stored_weight
from relaxlm.models.moe import EXPERT_MATMUL


@tvm.transform.module_pass(opt_level=0, name="LowerExpertMatmul")
class LowerExpertMatmul:
    """The pass.

    Args:
        kind: of the target.
        shared_memory: bytes that a block of a GPU may use.
        act_quant: on CPUs, rows of x may be rounded where an expert has many.
    """

    def __init__(self, kind: str, shared_memory: int = 0, act_quant: bool = False) -> None:
        self.kind, self.shared_memory, self.act_quant = kind, shared_memory, act_quant

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_functions(mod, _Rewriter(mod, self))


def _chooses(call: relax.Call) -> bool:
    """Whether this is the loop nest of `models/routing.choose`."""
    return call.op == tvm.ir.Op.get("relax.call_tir") and bool(
        re.fullmatch(r"choose_experts\d*", call.args[0].name_hint)
    )


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, lowering: LowerExpertMatmul) -> None:
        super().__init__(mod)
        self.mod, self.lowering = mod, lowering
        target = tvm.target.Target.current(allow_none=True)
        self.unit = vector_unit(target)
        self.isa = dot_products(target) if lowering.act_quant else None
        self.plans: dict[tuple[relax.Expr, int], list[relax.Var]] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if self.lowering.kind == "cpu" and _chooses(call):
            (scores,) = call.args[1]
            each = int(call.ty_args[0].fields[0].shape[1])
            kernel = choose_kernel(int(scores.ty.shape[1]), each, self.unit)
            function = self.builder_.add_func(kernel, "choose_experts")
            return relax.call_tir(function, [scores], list(call.ty_args[0].fields))
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
        if self.lowering.kind == "cuda":
            return self.on_cuda(x, weight, chosen, call.ty)
        if self.lowering.kind == "gpu":
            return self.on_plain_gpu(x, weight, chosen, int(repeat.value), call.ty)
        dtype = str(weight.stored[-1].ty.dtype)
        each = int(chosen.ty.shape[1])
        kernel = expert_kernel(
            weight.shape, weight.quant, dtype, each, int(repeat.value), self.unit, self.isa
        )
        function = self.builder_.add_func(kernel, "expert_matmul")
        return relax.call_tir(function, [x, chosen, *weight.stored], call.ty)

    def on_cuda(
        self, x: relax.Expr, weight: StoredWeight, chosen: relax.Expr, ty: relax.TensorType
    ) -> relax.Expr:
        experts, shared = weight.shape[0], self.lowering.shared_memory
        format = CudaFormat.of(weight.shape, weight.quant, str(x.ty.dtype))
        key = (chosen, experts)
        if key not in self.plans:
            function = self.builder_.add_func(plan_kernel(format, experts, shared), "plan_experts")
            rows = chosen.ty.shape[0] * chosen.ty.shape[1]
            plan = relax.call_tir(function, [chosen], relax.TensorType((plan_size(rows),), "int32"))
            self.plans[key] = [self.builder_.emit(plan)]
        function = self.builder_.add_func(
            cuda_expert_kernel(format, experts, shared), "expert_matmul"
        )
        return relax.call_tir(function, [x, chosen, *self.plans[key], *weight.stored], ty)

    def on_plain_gpu(
        self,
        x: relax.Expr,
        weight: StoredWeight,
        chosen: relax.Expr,
        repeat: int,
        ty: relax.TensorType,
    ) -> relax.Expr:
        n, each = chosen.ty.shape[0], int(chosen.ty.shape[1])
        experts = weight.shape[0]
        key = (chosen, experts)
        if key not in self.plans:
            kernel = gpu_experts.plan_kernel(experts, each)
            function = self.builder_.add_func(kernel, "plan_experts")
            types = [
                relax.TensorType(shape, dtype)
                for shape, dtype in gpu_experts.plan_types(n * each, experts)
            ]
            plan = self.builder_.emit(relax.call_tir(function, [chosen], types))
            # Order and tiles; what is counted is for the plan itself.
            self.plans[key] = [self.builder_.emit(relax.TupleGetItem(plan, i)) for i in range(2)]
        dtypes = str(weight.stored[-1].ty.dtype), str(x.ty.dtype)
        kernel = gpu_experts.expert_kernel(weight.shape, weight.quant, *dtypes, each, repeat)
        function = self.builder_.add_func(kernel, "expert_matmul")
        return relax.call_tir(function, [x, chosen, *self.plans[key], *weight.stored], ty)
