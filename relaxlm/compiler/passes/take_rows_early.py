"""Compute the last layer only for the rows whose logits are wanted.

    y = take_rows(a + matmul(f(b), w), rows)   ->   y = take_rows(a, rows)
                                                        + matmul(f(take_rows(b, rows)), w)

Operators that treat every row of [n, ...] by itself give the same rows whether rows are chosen
before or after them. After the last attention nothing else is left, so a prompt of n tokens pays
for the last layer's output projection and feed-forward network once, not n times. Runs first,
while the IR still has one operator per operation, for every target. A family's own operators, such
as layer norms, are loop nests already: whether they keep rows apart is read from their indices.
"""

from collections.abc import Sequence

import tvm
from tvm import relax, s_tir, te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm_ffi import structural_equal
from tvm_ffi.structural import structural_walk

from relaxlm.compiler.passes.rewrite import rewrite_functions, variables

# Operators that keep rows apart, whatever their attributes.
_ELEMENTWISE = ("add", "subtract", "multiply", "divide", "astype", "tanh", "square")
_ONE = tirx.const(1, "int64")
_ACTIVATIONS = ("nn.silu", "nn.gelu", "nn.gelu_tanh", "nn.relu", "sigmoid")


@tvm.transform.module_pass(opt_level=0, name="TakeRowsEarly")
class TakeRowsEarly:
    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod)
        return rewrite_functions(mod, rewriter, rewriter.rewrite)


def _is(expr: relax.Expr, *operators: str) -> bool:
    return isinstance(expr, relax.Call) and expr.op in [
        tvm.ir.Op.get(f"relax.{name}") for name in operators
    ]


def _takes_rows(value: relax.Expr) -> bool:
    return _is(value, "call_tir") and value.args[0].name_hint == "take_rows"


def _keeps_rows_apart(value: relax.Expr, mod: tvm.IRModule) -> bool:
    if isinstance(value, relax.TupleGetItem) or _is(value, *_ELEMENTWISE, *_ACTIVATIONS):
        return True
    if _is(value, "call_tir") and isinstance(value.ty, relax.TensorType):
        return not _takes_rows(value) and _rows_stay_apart(mod[value.args[0]])
    if _is(value, "split"):
        return int(value.attrs.axis) in (-1, len(value.args[0].ty.shape) - 1)
    if _is(value, "nn.rms_norm"):
        return all(int(axis) in (-1, 1) for axis in value.attrs.axes)
    return _is(value, "matmul") and len(value.args[1].ty.shape) == 2


def _rows_stay_apart(function: tirx.PrimFunc) -> bool:
    """Whether row i of what a loop nest writes comes from rows i of what it reads, and no others.

    Tensors with rows are those whose first extent is the one symbolic length; no other extent may
    depend on it. Each block has to use one and the same of its variables as first index of all.
    """
    shapes = [parameter.ty.shape for parameter in function.params]
    lengths = {shape[0] for shape in shapes if shape and isinstance(shape[0], tirx.Var)}
    found: list[s_tir.SBlock] = []
    structural_walk(function.body, (s_tir.SBlock, found.append))
    blocks = [block for block in found if block.iter_vars]
    return len(lengths) == 1 and bool(blocks) and all(_one_row(b, *lengths) for b in blocks)


def _one_row(block: s_tir.SBlock, n: tirx.Var) -> bool:
    rows = []
    for region in (*block.reads, *block.writes):
        first, *others = region.source.ty.shape or [_ONE]
        if not all(isinstance(extent, tirx.IntImm) for extent in others):
            return False
        if structural_equal(first, n):
            rows.append(region.region[0])
        elif not isinstance(first, tirx.IntImm):
            return False
    spatial = [one.var for one in block.iter_vars if one.iter_type == one.DataPar]
    return any(
        all(row.min.same_as(var) and structural_equal(row.extent, _ONE) for row in rows)
        for var in spatial
    )


def _take_rows(x: te.Tensor, rows: te.Tensor) -> te.Tensor:
    shape = (rows.shape[0], *x.shape[1:])
    return te.compute(shape, lambda i, *rest: x[(rows[i], *rest)], name="take_rows")


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)

    def rewrite(self, function: relax.Function) -> relax.Expr:
        self.early: dict[relax.Var, relax.Expr] = {}  # what is computed after rows are chosen
        self.taken: dict[relax.Var, relax.Expr] = {}
        blocks = getattr(function.body, "blocks", [])
        bindings = [binding for block in blocks for binding in block.bindings]
        takes = [binding for binding in bindings if _takes_rows(binding.value)]
        if len(takes) != 1:
            return function
        x, self.rows = takes[0].value.args[1].fields
        self.n = x.ty.shape[0]
        users: dict[relax.Var, list[relax.Var]] = {}
        for binding in bindings:
            for operand in variables(binding.value):
                users.setdefault(operand, []).append(binding.var)
        for binding in reversed(bindings):
            if (
                isinstance(binding.var, relax.DataflowVar)
                and _keeps_rows_apart(binding.value, self.builder_.get())
                and binding.var in users
                and all(user == takes[0].var or user in self.early for user in users[binding.var])
            ):
                self.early[binding.var] = binding.value
        # A part of a tuple whose other parts are needed whole is taken from the tuple as it is.
        for var, value in list(self.early.items()):
            if isinstance(value, relax.TupleGetItem) and value.tuple_value not in self.early:
                del self.early[var]
        return self.visit_expr(function)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if _takes_rows(call):
            return self.compute(call.args[1].fields[0])
        return super().visit_call_(call)

    def take(self, var: relax.Expr) -> relax.Expr:
        """The chosen rows of a tensor, or of every tensor of a tuple."""
        if var not in self.taken:
            self.taken[var] = self.builder_.emit(self.compute(var))
        return self.taken[var]

    def compute(self, var: relax.Expr) -> relax.Expr:
        if var not in self.early:
            x, rows = self.visit_expr(var), self.visit_expr(self.rows)
            return self.builder_.call_te(_take_rows, x, rows, primfunc_name_hint="take_rows")
        value = self.early[var]
        if isinstance(value, relax.TupleGetItem):
            return relax.TupleGetItem(self.take(value.tuple_value), value.index)
        if _is(value, "call_tir"):
            arguments = self.arguments(value.args[1].fields)
            ty = value.ty_args[0]
            shape = [self.visit_expr(self.rows).ty.shape[0], *list(ty.shape)[1:]]
            return relax.call_tir(value.args[0], arguments, relax.TensorType(shape, ty.dtype))
        return relax.Call(value.op, self.arguments(value.args), value.attrs)

    def arguments(self, arguments: Sequence[relax.Expr]) -> list[relax.Expr]:
        """Arguments of an operator that now gets the chosen rows only."""
        return [self.take(a) if self.has_rows(a) else self.visit_expr(a) for a in arguments]

    def has_rows(self, expr: relax.Expr) -> bool:
        """Whether the first axis is that of the tokens: it has their symbolic length."""
        if not isinstance(expr, relax.Var):
            return False
        if isinstance(expr.ty, relax.TupleType):
            return True
        shape = expr.ty.shape
        return len(shape) > 0 and structural_equal(shape[0], self.n)
