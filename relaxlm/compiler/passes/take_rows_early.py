"""Compute the last layer only for the rows whose logits are wanted.

    y = take_rows(a + matmul(f(b), w), rows)   ->   y = take_rows(a, rows)
                                                        + matmul(f(take_rows(b, rows)), w)

Operators that treat every row of [n, ...] by itself give the same rows whether rows are chosen
before or after them. After the last attention nothing else is left, so a prompt of n tokens pays
for the last layer's output projection and feed-forward network once, not n times. Runs first,
while the IR still has one operator per operation, for every target.
"""

import tvm
from tvm import relax, te
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm_ffi import structural_equal

from relaxlm.compiler.passes.rewrite import rewrite_functions, variables

# Operators that keep rows apart, whatever their attributes.
_ELEMENTWISE = ("add", "subtract", "multiply", "divide", "astype", "tanh")
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


def _keeps_rows_apart(value: relax.Expr) -> bool:
    if isinstance(value, relax.TupleGetItem) or _is(value, *_ELEMENTWISE, *_ACTIVATIONS):
        return True
    if _is(value, "split"):
        return int(value.attrs.axis) in (-1, len(value.args[0].ty.shape) - 1)
    if _is(value, "nn.rms_norm"):
        return all(int(axis) in (-1, 1) for axis in value.attrs.axes)
    return _is(value, "matmul") and len(value.args[1].ty.shape) == 2


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
                and _keeps_rows_apart(binding.value)
                and binding.var in users
                and all(user == takes[0].var or user in self.early for user in users[binding.var])
            ):
                self.early[binding.var] = binding.value
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
        arguments = [self.take(a) if self.has_rows(a) else self.visit_expr(a) for a in value.args]
        return relax.Call(value.op, arguments, value.attrs)

    def has_rows(self, expr: relax.Expr) -> bool:
        """Whether the first axis is that of the tokens: it has their symbolic length."""
        if not isinstance(expr, relax.Var):
            return False
        if isinstance(expr.ty, relax.TupleType):
            return True
        shape = expr.ty.shape
        return len(shape) > 1 and structural_equal(shape[0], self.n)
