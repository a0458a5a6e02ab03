"""Turn multi-head latent attention into kernels: what `LowerPagedAttention` does for other models.

    forward(ids, positions, cache: Object, rows, *params):
        q_latent = call_dps_packed("relaxlm.head_matmul", (q, w_uk))
        out = call_dps_packed(
            "relaxlm.latent_attention", (cache, q_latent, q_rope, latent, k_rope, layer, scale))
    ->
    forward(ids, positions, slots, ..., rows, kv: Tuple[pages, ...], *params):
        q_latent = call_tir(head_matmul, (q, stored w_uk))
        pages' = call_tir_inplace(append, (latent, k_rope, slots, pages))
        out = call_tir(attend, (q_latent, q_rope, positions, ..., pages'))

The weights of `head_matmul` are read as they are stored. Runs before LegalizeOps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels.attention import PAGE_SIZE
from relaxlm.compiler.kernels.cpu_latent_attention import LatentShape, page_tensors
from relaxlm.compiler.passes.lower_paged_attention import (
    add_copy_pages,
    call_attend,
    view_of_queries,
)
from relaxlm.compiler.passes.lower_state import lower_state_operator
from relaxlm.compiler.passes.signature import PagedSignature
from relaxlm.compiler.passes.weights import stored_weight
from relaxlm.errors import UnsupportedError
from relaxlm.models.base import LATENT_ATTENTION
from relaxlm.models.config import DecoderConfig
from relaxlm.models.latent import HEAD_MATMUL
from relaxlm.quantization.kv_cache import KVFormat


@dataclass(frozen=True)
class LatentKernels:
    """The kernels of one target: see `compiler/kernels/cpu_latent_attention.py`.

    `head_matmul` is called with heads, outputs, inputs, and the dtypes of the weight and of x.
    Where there is a `view`, `attend` takes what it makes and the page ids in place of the step's
    tables; `partial_shape` is as in `AttentionKernels`.
    """

    kind: str
    append: Callable[[LatentShape, KVFormat, str], tirx.PrimFunc]
    attend: Callable[..., tirx.PrimFunc]
    head_matmul: Callable[..., tirx.PrimFunc]
    view: Callable[[int, int, bool, int], tirx.PrimFunc] | None = None
    partial_shape: Callable[[LatentShape], tuple[int, ...]] | None = None


@tvm.transform.module_pass(opt_level=0, name="LowerLatentAttention")
class LowerLatentAttention:
    """The pass.

    Raises:
        UnsupportedError: a cache format or a window that there are no kernels for.
    """

    def __init__(self, config: DecoderConfig, format: KVFormat, kernels: LatentKernels) -> None:
        name = config.model_type
        if format.scaled:
            raise UnsupportedError(
                f"{name}: kv_cache_dtype = {format.name} is not supported for latents, expected "
                "float32, float16 or bfloat16"
            )
        if any(config.windows):
            raise UnsupportedError(
                f"{name}: latent attention has no sliding windows; leave out sliding_window_size"
            )
        self.config, self.format, self.kernels = config, format, kernels

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        assert self.config.latent_cache is not None
        tensors = page_tensors(*self.config.latent_cache, self.format)
        signature = PagedSignature(self.config, tensors)
        mod = signature.rewrite_module(mod, _Rewriter(mod, self, signature))
        return add_copy_pages(mod, signature.page_type(), self.kernels.kind)


@mutator
class _Rewriter(PyExprMutator):
    def __init__(
        self, mod: tvm.IRModule, lowering: LowerLatentAttention, signature: PagedSignature
    ) -> None:
        super().__init__(mod)
        self.mod, self.signature = mod, signature
        self.format, self.kernels = lowering.format, lowering.kernels
        self.views: dict[relax.Var, relax.Var] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op == tvm.ir.Op.get("relax.call_dps_packed") and isinstance(
            call.args[0], relax.ExternFunc
        ):
            if call.args[0].global_symbol == LATENT_ATTENTION:
                return self._attention(call)
            if call.args[0].global_symbol == HEAD_MATMUL:
                return self._head_matmul(call)
            lowered = lower_state_operator(call, self.builder_, self.signature, self.kernels.kind)
            return call if lowered is None else lowered
        return call

    def _attention(self, call: relax.Call) -> relax.Expr:
        _, q_latent, q_rope, latent, k_rope, layer, scale = call.args[1]
        heads, size = (int(extent) for extent in list(q_latent.ty.shape)[1:])
        shape = LatentShape(heads, size, int(q_rope.ty.shape[2]), scale.value)
        dtype, given = str(q_latent.ty.dtype), self.signature
        pages = self.builder_.emit(relax.TupleGetItem(given.kv, given.page_index[int(layer.value)]))
        # The append does not depend on the scale: one kernel for all layers.
        cache = LatentShape(heads, size, shape.rope, 0.0)
        append = self.builder_.add_func(
            self.kernels.append(cache, self.format, dtype), "append_latents_to_pages"
        )
        updated = self.builder_.emit(
            relax.call_tir_inplace(
                append, [latent, k_rope, given.tables["slots"], pages], [3], [pages.ty]
            )
        )
        attend = self.builder_.add_func(
            self.kernels.attend(shape, self.format, dtype), "latent_attention"
        )
        arguments = [q_latent, q_rope, *self._tables(), updated]
        partial = self.kernels.partial_shape and self.kernels.partial_shape(shape)
        return call_attend(self.builder_, attend, arguments, call.ty, partial)

    def _tables(self) -> list[relax.Expr]:
        """What a kernel that attends is told of the step."""
        given, view = self.signature, self.kernels.view
        if view is None:
            names = ("row_offsets", "page_offsets", "page_ids", "kv_lengths")
            return [given.positions, *(given.tables[name] for name in names)]
        if given.kv not in self.views:  # once per step, for all layers
            kernel = view(0, 0, False, PAGE_SIZE)
            self.views[given.kv] = view_of_queries(self.builder_, given, kernel)
        return [self.views[given.kv], given.tables["page_ids"]]

    def _head_matmul(self, call: relax.Call) -> relax.Expr:
        x, matrix = call.args[1]
        weight = stored_weight(self.mod, matrix, self.lookup_binding)
        assert weight is not None and weight.quant is None, f"{matrix} is not a plain parameter"
        heads, outputs, inputs = weight.shape
        (stored,) = weight.stored
        dtypes = (str(stored.ty.dtype), str(x.ty.dtype))
        kernel = self.builder_.add_func(
            self.kernels.head_matmul(heads, outputs, inputs, *dtypes), "head_matmul"
        )
        return relax.call_tir(kernel, [x, stored], call.ty)
