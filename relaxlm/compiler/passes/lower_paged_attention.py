"""Turn the models' abstract attention into kernels for one target and one KV-cache format.

    forward(ids, positions, cache: Object, rows, *params):
        out = call_dps_packed(
            "relaxlm.paged_attention",
            (cache, q, k, v, layer, window, sinks, scale, cap[, sink_logits]))
    ->
    forward(ids, positions, slots, row_offsets, page_offsets, page_ids, kv_lengths, dropped,
            [state_sources, state_targets,] rows, kv: Tuple[pages, ...], [states,] *params):
        pages' = call_tir_inplace(append, (k, v, slots, pages))
        out = call_tir(attend, (q, positions, ..., pages'[, sink_logits][, slopes]))

and add `copy_pages(kv, sources, targets)` for copy-on-write. The models' IR is the same for every
format; only this pass and its kernels know what a page looks like. Runs before LegalizeOps.

Layers that don't attend have no pages in `kv`. The arguments in brackets are there if some layer
keeps a state of its own; `lower_state.py` turns the operators that work on states into kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels.attention import AttentionShape, PageTensor, copy_kernel
from relaxlm.compiler.kernels.gpu_attention import VIEW_COLUMNS
from relaxlm.compiler.passes.lower_state import lower_state_operator
from relaxlm.compiler.passes.signature import PagedSignature
from relaxlm.models.base import PAGED_ATTENTION
from relaxlm.models.config import DecoderConfig
from relaxlm.quantization.kv_cache import KVFormat


@dataclass(frozen=True)
class AttentionKernels:
    """The kernels of one target: see `compiler/kernels/cpu_attention.py` for their arguments.

    Where there is a `view`, it makes a tensor of the tables once per step (`view_of_queries`), and
    `attend` takes it, the row offsets and the page ids in their place (`kernels/gpu_attention.py`).
    With `partial_shape`, `attend` writes a second tensor, float32, which nobody else reads.
    """

    kind: str
    page_tensors: Callable[[AttentionShape, KVFormat], tuple[PageTensor, ...]]
    append: Callable[[AttentionShape, KVFormat, str], tirx.PrimFunc]
    attend: Callable[[AttentionShape, KVFormat, str], tirx.PrimFunc]
    view: Callable[[int, int, bool, int], tirx.PrimFunc] | None = None
    partial_shape: Callable[[AttentionShape], tuple[int, ...]] | None = None


def cache_shape(config: DecoderConfig) -> AttentionShape:
    """The shape of every layer's cache; windows and scales make no difference to it."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    alibi = config.alibi_slopes is not None
    return AttentionShape(heads, kv_heads, config.head_dim, 0, 0, 0.0, alibi=alibi)


@tvm.transform.module_pass(opt_level=0, name="LowerPagedAttention")
class LowerPagedAttention:
    def __init__(self, config: DecoderConfig, format: KVFormat, kernels: AttentionKernels) -> None:
        self.config, self.format, self.kernels = config, format, kernels

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        layer = self.kernels.page_tensors(cache_shape(self.config), self.format)
        signature = PagedSignature(self.config, layer)
        mod = signature.rewrite_module(mod, _Rewriter(mod, self, signature))
        return add_copy_pages(mod, signature.page_type(), self.kernels.kind)


@mutator
class _Rewriter(PyExprMutator):
    def __init__(
        self, mod: tvm.IRModule, lowering: LowerPagedAttention, signature: PagedSignature
    ) -> None:
        super().__init__(mod)
        self.lowering, self.signature = lowering, signature
        self.views: dict[tuple[relax.Var, int, int], relax.Var] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op == tvm.ir.Op.get("relax.call_dps_packed") and isinstance(
            call.args[0], relax.ExternFunc
        ):
            if call.args[0].global_symbol == PAGED_ATTENTION:
                return self._attention(call)
            kind = self.lowering.kernels.kind
            lowered = lower_state_operator(call, self.builder_, self.signature, kind)
            return call if lowered is None else lowered
        return call

    def _attention(self, call: relax.Call) -> relax.Expr:
        _, q, k, v, layer, window, sinks, scale, cap, *sink_logits = call.args[1]
        layer, window, sinks = int(layer.value), int(window.value), int(sinks.value)
        config = self.lowering.config
        slopes = config.alibi_slopes
        shape = AttentionShape(
            int(q.ty.shape[1]),
            int(k.ty.shape[1]),
            int(q.ty.shape[2]),
            window,
            sinks,
            scale.value,
            cap=cap.value,
            sink_logits=bool(sink_logits),
            chunked=window > 0 and config.chunked_attention,
            alibi=slopes is not None,
        )
        kernels, format, dtype = self.lowering.kernels, self.lowering.format, str(q.ty.dtype)
        # The append depends on the heads alone: one kernel for all layers.
        cache = AttentionShape(shape.q_heads, shape.kv_heads, shape.head_dim, 0, 0, 0.0)
        count = len(kernels.page_tensors(cache, format))
        first = self.signature.page_index[layer]
        pages = [
            self.builder_.emit(relax.TupleGetItem(self.signature.kv, first + i))
            for i in range(count)
        ]
        append = self.builder_.add_func(kernels.append(cache, format, dtype), "append_to_pages")
        updated = self.builder_.emit(
            relax.call_tir_inplace(
                append,
                [k, v, self.signature.tables["slots"], *pages],
                list(range(3, 3 + count)),
                [page.ty for page in pages],
            )
        )
        pages = [self.builder_.emit(relax.TupleGetItem(updated, i)) for i in range(count)]
        attend = self.builder_.add_func(kernels.attend(shape, format, dtype), "paged_attention")
        arguments = [q, *self._tables(shape), *pages, *sink_logits]
        if slopes is not None:
            arguments.append(relax.const(np.array(slopes, np.float32)))
        out = relax.TensorType(q.ty.shape, dtype)
        partial = kernels.partial_shape and kernels.partial_shape(shape)
        return call_attend(self.builder_, attend, arguments, out, partial)

    def _tables(self, shape: AttentionShape) -> list[relax.Expr]:
        """What a kernel that attends is told of the step."""
        tables, positions = self.signature.tables, self.signature.positions
        names = ("row_offsets", "page_offsets", "page_ids", "kv_lengths", "dropped")
        view = self.lowering.kernels.view
        if view is None:
            return [positions, *(tables[name] for name in names)]
        key = (self.signature.kv, shape.window, shape.sinks)
        if key not in self.views:  # once per step, for all layers that see alike
            kernel = view(shape.window, shape.sinks, shape.chunked, shape.page_size)
            self.views[key] = view_of_queries(self.builder_, self.signature, kernel)
        return [self.views[key], tables["row_offsets"], tables["page_ids"]]


def view_of_queries(
    builder: relax.BlockBuilder, signature: PagedSignature, kernel: tirx.PrimFunc
) -> relax.Var:
    """Emit what a view's kernel makes of the step's tables, [n, columns] int32."""
    function = builder.add_func(kernel, "view_of_queries")
    names = ("row_offsets", "page_offsets", "kv_lengths", "dropped")
    read = [signature.positions, *(signature.tables[name] for name in names)]
    ty = relax.TensorType((signature.positions.ty.shape[0], VIEW_COLUMNS), "int32")
    return builder.emit(relax.call_tir(function, read, ty))


def call_attend(
    builder: relax.BlockBuilder,
    attend: relax.GlobalVar,
    arguments: list[relax.Expr],
    out: relax.TensorType,
    partial_shape: tuple[int, ...] | None,
) -> relax.Expr:
    """The call of a kernel that attends, with room for its partial results if it has any."""
    if partial_shape is None:
        return relax.call_tir(attend, arguments, out)
    partial = relax.TensorType(partial_shape, "float32")
    both = builder.emit(relax.call_tir(attend, arguments, [out, partial]))
    return relax.TupleGetItem(both, 0)


def add_copy_pages(mod: tvm.IRModule, kv_type: relax.TupleType, kind: str) -> tvm.IRModule:
    """Add `copy_pages` for the cache's tensors."""
    builder = relax.BlockBuilder(mod)
    count = tirx.Var("k", "int64")
    kv = relax.Var("kv", kv_type)
    sources = relax.Var("sources", relax.TensorType((count,), "int32"))
    targets = relax.Var("targets", relax.TensorType((count,), "int32"))
    with builder.function("copy_pages", [kv, sources, targets]):
        with builder.dataflow():
            copied = []
            for index, tensor in enumerate(kv_type.fields):
                page_shape = tuple(int(extent) for extent in list(tensor.shape)[1:])
                kernel = builder.add_func(copy_kernel(page_shape, str(tensor.dtype), kind), "copy")
                pages = builder.emit(relax.TupleGetItem(kv, index))
                call = relax.call_tir_inplace(kernel, [pages, sources, targets], [0], [tensor])
                copied.append(builder.emit(call))
            out = builder.emit_output(relax.Tuple(copied))
        builder.emit_func_output(out)
    return builder.finalize()
