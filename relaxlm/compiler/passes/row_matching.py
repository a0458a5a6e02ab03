"""Find what a kernel of rows can compute: sums, products, activations and norms of [n, size]."""

import tvm
from tvm import relax, tirx

from relaxlm.compiler.kernels.row_expression import (
    Activation,
    Binary,
    Expression,
    Input,
    Matrix,
    Norm,
    Normed,
    Number,
    Vector,
)
from relaxlm.compiler.passes.graph import Graph, calls, is_op, is_tensor, row_size
from relaxlm.models.layers import LAYER_NORM

_BINARY = ("add", "subtract", "multiply", "divide")
_ACTIVATIONS = {
    "relax.nn.silu": "silu",
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.relu": "relu",
    "relax.sigmoid": "sigmoid",
    "relax.tanh": "tanh",
    "relax.square": "square",
}


def _shape(expr: relax.Expr) -> str:
    return str(expr.ty.shape)


def _number(expr: relax.Expr) -> float | None:
    if isinstance(expr, tvm.ir.GenericConst) and len(expr.ty.shape) == 0:
        return float(expr.value.numpy())
    return None


class RowMatcher:
    """Finds expressions in a function, of rows of one dtype."""

    def __init__(self, graph: Graph, mod: tvm.IRModule, dtype: str) -> None:
        self.graph, self.mod, self.dtype = graph, mod, dtype

    def is_elementwise(self, value: object) -> bool:
        """Whether every element of [n, size] comes of the same element of others."""
        if not isinstance(value, relax.Call) or not self._has_rows(value):
            return False
        if value.op.name in _ACTIVATIONS:
            return True
        if not is_op(value, *_BINARY):
            return False
        kinds = [self._kind(value, operand) for operand in value.args]
        return "matrix" in kinds and None not in kinds

    def is_norm(self, value: object) -> bool:
        """Whether this is a norm over whole rows of [n, size]."""
        if not isinstance(value, relax.Call) or not self._has_rows(value):
            return False
        if is_op(value, "nn.rms_norm"):
            return [int(axis) for axis in value.attrs.axes] in ([-1], [1])
        return calls(value, "layer_norm") and LAYER_NORM in (self.mod[value.args[0]].attrs or {})

    def is_absorbed(self, var: relax.Var) -> bool:
        """Whether a variable is read by one such value alone, which will compute it, too."""
        (user, *others) = self.graph.users.get(var, [None])
        if others or not isinstance(var, relax.DataflowVar):
            return False
        return self.is_norm(user) or (self.is_elementwise(user) and _shape(user) == _shape(var))

    def normed(self, value: relax.Call) -> relax.Expr:
        """What a norm is of."""
        return value.args[0] if is_op(value, "nn.rms_norm") else value.args[1].fields[0]

    def _has_rows(self, value: relax.Call) -> bool:
        # One row of a parameter, [1, size], is none of a step's rows.
        return (
            is_tensor(value, self.dtype, 2)
            and row_size(value) is not None
            and not isinstance(value.ty.shape[0], tirx.IntImm)
        )

    def _kind(self, value: relax.Call, operand: relax.Expr) -> str | None:
        if _number(operand) is not None:
            return "number"
        if not isinstance(operand, relax.Var) or str(operand.ty.dtype) != self.dtype:
            return None
        if _shape(operand) == _shape(value):
            return "matrix"
        shape = list(operand.ty.shape)
        whole = len(shape) == 1 and isinstance(shape[0], tirx.IntImm)
        return "vector" if whole and int(shape[0]) == row_size(value) else None


class Rows:
    """An expression of rows, and the tensors that it reads.

    Attributes:
        inputs: what kernels get: shapes, in order.
        tensors: the function's expressions for them.
    """

    def __init__(self, matcher: RowMatcher, size: int, made: set[relax.Var]) -> None:
        """`made`: variables that are there already, and are not computed again."""
        self.matcher, self.graph, self.size, self.made = matcher, matcher.graph, size, made
        self.inputs: list[Input] = []
        self.tensors: list[relax.Expr] = []

    def of(self, value: relax.Call, first: int = 0) -> Expression:
        """The expression of an elementwise value, or of the norm that it is.

        Args:
            first: of its columns, where it has more than `size`.
        """
        if self.matcher.is_norm(value):
            return Normed(self.inner(self.matcher.normed(value)), self.norm(value))
        if value.op.name in _ACTIVATIONS:
            return Activation(_ACTIVATIONS[value.op.name], self.inner(value.args[0], first))
        left, right = (self._operand(operand, first) for operand in value.args)
        return Binary(value.op.name.removeprefix("relax."), left, right)

    def inner(self, expr: relax.Expr, first: int = 0) -> Expression:
        """Columns of a tensor [n, ...]: computed here if nobody else reads it, else an input."""
        base, offset = self.graph.columns(expr)
        first += offset
        value = self.graph.value(base)
        if self.graph.used_once(base) and base not in self.made:
            if self.matcher.is_elementwise(value):
                return self.of(value, first)
            whole = first == 0 and isinstance(value, relax.Call) and row_size(base) == self.size
            if whole and self.matcher.is_norm(value):
                return self.of(value)
        return Matrix(self._input(base, Input(row_size(base) or 0, self.matcher.dtype)), first)

    def norm(self, value: relax.Call) -> Norm:
        """What a norm does."""
        if is_op(value, "nn.rms_norm"):
            return Norm("rms", float(value.attrs.epsilon), self._vector(value.args[1], 0))
        eps, shift, weight, _ = self.matcher.mod[value.args[0]].attrs[LAYER_NORM].split()
        given = [self._vector(expr, 0) for expr in value.args[1].fields[1:]]
        scale = given.pop(0) if weight == "1" else None
        return Norm("layer", float(eps), scale, given[0] if given else None, float(shift))

    def _operand(self, expr: relax.Expr, first: int) -> Expression:
        number = _number(expr)
        if number is not None:
            return Number(number)
        return self._vector(expr, first) if len(expr.ty.shape) == 1 else self.inner(expr, first)

    def _vector(self, expr: relax.Expr, first: int) -> Vector:
        stored = self.graph.stored(expr)
        given = Input(int(stored.ty.shape[0]), str(stored.ty.dtype), is_vector=True)
        return Vector(self._input(stored, given), first)

    def _input(self, expr: relax.Expr, given: Input) -> int:
        for i, known in enumerate(self.tensors):
            if known.same_as(expr):
                return i
        self.inputs.append(given)
        self.tensors.append(expr)
        return len(self.inputs) - 1
