"""From the products that are q, k and v to rotated queries and pages, in one kernel.

    q, k, v = split(reshape(add(x, astype(bias))))
    q, k = rotate(rms_norm(q, ..)), rotate(rms_norm(k, ..))
    pages = append_to_pages(k, v, slots, pages)        ->   q, pages = rope_append(x, .., pages)

q, k and v may be products of their own. The biases may be missing, the norms and the rotation, too,
and queries may be scaled by a factor of each token. On GPUs products come with their biases. Runs
after LowerPagedAttention, which emits the append, and what lowers products, and before the pass
that fuses rows, which would take the norms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.rope import RopeOptions
from relaxlm.compiler.passes.graph import Graph, calls, is_op, is_tensor, row_size
from relaxlm.compiler.passes.rewrite import rewrite_functions
from relaxlm.quantization.kv_cache import KVFormat

_ROTATIONS = ("rotate", "rotate_part", "rotate_pairs")


# (shape of attention, format of the cache, what to do) -> the kernel, see `cpu_rope`; None where
# there is none.
Kernel = Callable[[AttentionShape, KVFormat, RopeOptions], tirx.PrimFunc | None]


@tvm.transform.module_pass(opt_level=0, name="FuseRope")
class FuseRope:
    """The pass.

    Args:
        dtype: that the model computes in.
        adds_biases: whether the kernel can.
        joins_tables: whether it takes cosines and sines as one table.
    """

    def __init__(
        self,
        format: KVFormat,
        kernel: Kernel,
        dtype: str,
        adds_biases: bool = False,
        joins_tables: bool = False,
    ) -> None:
        self.format, self.kernel = format, kernel
        self.dtype, self.adds_biases, self.joins_tables = dtype, adds_biases, joins_tables

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self)
        return rewrite_functions(mod, rewriter, rewriter.rewrite)


@dataclass
class _Part:
    """Where q, k or v comes from, from the last operator to the first.

    Attributes:
        factor: of each token, if it is scaled.
        rotation: name of the kernel and its tables.
        norm: the norm of every head.
        product: what it is columns of, and the first of them.
        bias: of the product.
    """

    factor: relax.Expr | None = None
    rotation: tuple[str, relax.Expr, relax.Expr] | None = None
    norm: relax.Call | None = None
    product: relax.Expr = None
    first: int = 0
    bias: relax.Expr | None = None


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, plan: FuseRope) -> None:
        super().__init__(mod)
        self.plan = plan

    def rewrite(self, function: relax.Function) -> relax.Expr:
        # Patterns are matched on the function as it was.
        self.graph = graph = Graph(function)
        self.joined: dict[tuple[relax.Expr, ...], relax.Var] = {}  # tables, as one
        self.queries: dict[relax.Expr, relax.Var] = {}  # of appends, what attends to the pages
        for value in graph.bound.values():
            if calls(value, "paged_attention"):
                q, *others = value.args[1].fields
                pages = [graph.value(expr) for expr in others]
                updated = {p.tuple_value for p in pages if isinstance(p, relax.TupleGetItem)}
                for var in updated:
                    if calls(graph.value(var), "append_to_pages", "call_tir_inplace"):
                        self.queries[graph.value(var)] = q
        return self.visit_expr(function)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        fused = self.fused(call) if call in self.queries else None
        return super().visit_call_(call) if fused is None else fused

    def visit_tuple_getitem_(self, item: relax.TupleGetItem) -> relax.Expr:
        item = super().visit_tuple_getitem_(item)
        if isinstance(item, relax.TupleGetItem) and isinstance(item.tuple_value, relax.Var):
            value = self.lookup_binding(item.tuple_value)
            if isinstance(value, relax.Tuple):
                return value.fields[item.index]
        return item

    def part(self, expr: relax.Expr) -> _Part:
        """Follow what became q, k or v back to the product that it is a part of."""
        graph, part = self.graph, _Part()
        value = graph.value(expr)
        if calls(value, "scale_by_position"):
            expr, part.factor = value.args[1].fields
            value = graph.value(expr)
        for name in _ROTATIONS:
            if calls(value, name):
                expr, cos, sin = value.args[1].fields
                part.rotation = (name, cos, sin)
                value = graph.value(expr)
        if is_op(value, "nn.rms_norm") and [int(a) for a in value.attrs.axes] in ([-1], [2]):
            part.norm, expr = value, value.args[0]
        part.product, part.first = graph.columns(expr)
        add = graph.value(part.product)
        if is_op(add, "add") and len(add.args[1].ty.shape) == 1 and self.is_row(add.args[0]):
            part.product, part.bias = add.args[0], graph.stored(add.args[1])
        return part

    def fused(self, call: relax.Call) -> relax.Expr | None:
        k, v, slots, *pages = call.args[1].fields
        q = self.queries[call]
        if not is_tensor(k, self.plan.dtype, 3) or not self.graph.used_once(q):
            return None
        parts = [self.part(expr) for expr in (q, k, v)]
        options = self.options(parts)
        if options is None:
            return None
        heads, kv_heads, dim = (int(e) for e in (q.ty.shape[1], k.ty.shape[1], k.ty.shape[2]))
        shape = AttentionShape(heads, kv_heads, dim, 0, 0, 0.0)
        kernel = self.plan.kernel(shape, self.plan.format, options)
        if kernel is None:
            return None
        function = self.builder_.add_func(kernel, "rope_append")
        products = _distinct(part.product for part in parts)
        bias_of = {part.product: part.bias for part in parts}
        inputs = [self.flat(product) for product in products]
        given: list[Any] = [bias_of[product] for product in products]
        given += [self.graph.stored(p.norm.args[1]) for p in parts[:2] if p.norm is not None]
        inputs += [self.visit_expr(one) for one in given if one is not None]
        inputs += self.tables(parts[0].rotation[1:]) if parts[0].rotation else []
        given = [parts[0].factor, slots, *pages]
        inputs += [self.visit_expr(one) for one in given if one is not None]
        places = [len(inputs) - len(pages) + i for i in range(len(pages))]
        types = [q.ty, *(page.ty for page in pages)]
        all_ = self.builder_.emit(relax.call_tir_inplace(function, inputs, [-1, *places], types))
        self.set_var_remap(q, self.builder_.emit(relax.TupleGetItem(all_, 0)))
        updated = [self.builder_.emit(relax.TupleGetItem(all_, i + 1)) for i in range(len(pages))]
        return relax.Tuple(updated)

    def tables(self, both: tuple[relax.Expr, ...]) -> list[relax.Expr]:
        """Cosines and sines, as the kernel takes them."""
        tables = [self.visit_expr(table) for table in both]
        if not self.plan.joins_tables:
            return tables
        if both not in self.joined:  # once per step, for all layers that turn alike
            self.joined[both] = self.builder_.emit(relax.op.concat(tables, axis=1))
        return [self.joined[both]]

    def options(self, parts: list[_Part]) -> RopeOptions | None:
        """What the kernel has to do; None where it can't."""
        q, k, v = parts
        if k.factor is not None or any((v.factor, v.rotation, v.norm)):
            return None
        if (q.rotation is None) != (k.rotation is None) or (q.norm is None) != (k.norm is None):
            return None
        if q.rotation is not None and k.rotation is not None:
            same = all(a.same_as(b) for a, b in zip(q.rotation[1:], k.rotation[1:], strict=True))
            if q.rotation[0].rstrip("0123456789") != k.rotation[0] or not same:
                return None
        if q.norm is not None and k.norm is not None:
            rules = [
                (float(norm.attrs.epsilon), str(self.graph.stored(norm.args[1]).ty.dtype))
                for norm in (q.norm, k.norm)
            ]
            if rules[0] != rules[1]:
                return None
        products = _distinct(part.product for part in parts)
        widths = [row_size(product) for product in products]
        if None in widths or not all(str(p.ty.dtype) == self.plan.dtype for p in products):
            return None
        biases = {part.product: part.bias for part in parts}
        added = [biases[product] for product in products]
        if any(bias is not None for bias in added) and not self.plan.adds_biases:
            return None
        dtypes = tuple(None if bias is None else str(bias.ty.dtype) for bias in added)
        q_at, k_at, v_at = ((products.index(part.product), part.first) for part in parts)
        norm, eps = (None, 0.0) if q.norm is None else (rules[0][1], rules[0][0])
        return RopeOptions(
            tuple(width for width in widths if width is not None),
            (q_at, k_at, v_at),
            dtypes,
            norm,
            eps,
            turned=0 if q.rotation is None else 2 * int(q.rotation[1].ty.shape[1]),
            in_pairs=q.rotation is not None and q.rotation[0] == "rotate_pairs",
            scaled=q.factor is not None,
            dtype=self.plan.dtype,
        )

    def is_row(self, expr: relax.Expr) -> bool:
        return is_tensor(expr, self.plan.dtype, 2)

    def flat(self, product: relax.Expr) -> relax.Expr:
        """A product as [n, width]."""
        new = self.visit_expr(product)
        if len(product.ty.shape) == 2:
            return new
        shape = relax.ShapeExpr([product.ty.shape[0], row_size(product)])
        return self.builder_.emit(relax.op.reshape(new, shape))


def _distinct(exprs) -> list[relax.Expr]:
    return list(dict.fromkeys(exprs))
