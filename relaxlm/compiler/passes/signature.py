"""The parameters that a compiled step has in place of a model's abstract cache."""

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator

from relaxlm.compiler.kernels.attention import PageTensor
from relaxlm.models.config import DecoderConfig, StateTensor

# What the runtime says of a step, in this order (docs/architecture.md): name -> its length.
TABLES = {
    "slots": "n",
    "row_offsets": "b + 1",
    "page_offsets": "b + 1",
    "page_ids": "p",
    "kv_lengths": "b",
    "dropped": "b",
}
# Further ones of a model with recurrent layers: where each sequence's state is read and written.
STATE_TABLES = {"state_sources": "b", "state_targets": "b"}


class PagedSignature:
    """Makes the parameters of an entry point: tables of the step, pages, and recurrent states.

    Args:
        tensors: the cache's, of each layer that has pages.

    Attributes:
        positions, tables, kv, states: parameters of the function that is being rewritten; `states`
            is None for a model without any.
        page_index: layer -> place of its first tensor in `kv`.
        state_index: layer and name of a `StateTensor` -> its place in `states`.
    """

    positions: relax.Var
    tables: dict[str, relax.Var]
    kv: relax.Var
    states: relax.Var | None

    def __init__(self, config: DecoderConfig, tensors: tuple[PageTensor, ...]) -> None:
        layers = [layer for layer in range(config.num_hidden_layers) if config.has_pages(layer)]
        self.tensors = tensors * len(layers)
        self.page_index = {layer: i * len(tensors) for i, layer in enumerate(layers)}
        states = state_tensors(config)
        self.state_tensors = [tensor for _, tensor in states]
        self.state_index = {(layer, tensor.name): i for i, (layer, tensor) in enumerate(states)}
        assert len(self.state_index) == len(states), f"a layer names a state twice: {states}"

    def page_type(self) -> relax.TupleType:
        """All page tensors in one tuple."""
        pages = tirx.Var("pages", "int64")
        return relax.TupleType(
            [relax.TensorType((pages, *tensor.page_shape), tensor.dtype) for tensor in self.tensors]
        )

    def state_type(self) -> relax.TupleType:
        """All state tensors in one tuple."""
        slots = tirx.Var("state_slots", "int64")
        return relax.TupleType(
            [
                relax.TensorType((slots, *tensor.shape), tensor.dtype)
                for tensor in self.state_tensors
            ]
        )

    def rewrite_module(self, mod: tvm.IRModule, rewriter: PyExprMutator) -> tvm.IRModule:
        """Rewrite every function that has a cache; `rewriter` was made for the module."""
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function):
                if any(param.name == "cache" for param in function.params):
                    rewriter.builder_.update_func(name, self.rewrite(function, rewriter))
        return rewriter.builder_.finalize()

    def rewrite(self, function: relax.Function, rewriter: PyExprMutator) -> relax.Function:
        """The function with these parameters; its body is what `rewriter` makes of it."""
        inputs = int(function.attrs["num_input"])
        self.positions = next(param for param in function.params if param.name == "positions")
        n = self.positions.ty.shape[0]
        batch, table = tirx.Var("b", "int64"), tirx.Var("p", "int64")
        extents = {"n": n, "b": batch, "b + 1": batch + 1, "p": table}
        lengths = {**TABLES, **(STATE_TABLES if self.state_tensors else {})}
        self.tables = {
            name: relax.Var(name, relax.TensorType((extents[length],), "int32"))
            for name, length in lengths.items()
        }
        self.kv = relax.Var("kv", self.page_type())
        self.states = relax.Var("states", self.state_type()) if self.state_tensors else None
        leading = []
        for param in function.params[:inputs]:
            leading += list(self.tables.values()) if param.name == "cache" else [param]
        leading += [self.kv] if self.states is None else [self.kv, self.states]
        params = [*leading, *function.params[inputs:]]
        # The builder has to know the new symbolic lengths while it emits.
        rewriter.builder_.begin_scope(params)
        body = rewriter.visit_expr(function.body)
        rewriter.builder_.end_scope()
        rewritten = relax.Function(params, body, function.ret_ty, attrs=function.attrs)
        self._check_complete(rewritten)
        return rewritten.with_attr("num_input", len(leading))

    def _check_complete(self, function: relax.Function) -> None:
        """Assert that the layers use what their configuration says that they have, each once."""
        used: dict[str, list[int]] = {"kv": [], "states": []}

        def visit(expr: relax.Expr) -> None:
            if isinstance(expr, relax.TupleGetItem):
                for name, var in (("kv", self.kv), ("states", self.states)):
                    if var is not None and expr.tuple_value.same_as(var):
                        used[name].append(int(expr.index))

        relax.analysis.post_order_visit(function.body, visit)
        for name, count in (("kv", len(self.tensors)), ("states", len(self.state_tensors))):
            assert sorted(used[name]) == list(range(count)), (
                f"{name}: the configuration has {count} tensors, the layers use {used[name]}"
            )


def state_tensors(config: DecoderConfig) -> list[tuple[int, StateTensor]]:
    """The states of all layers, with their layers, in the order of the `states` tuple."""
    layers = range(config.num_hidden_layers)
    return [(layer, tensor) for layer in layers for tensor in config.layer_states(layer)]
