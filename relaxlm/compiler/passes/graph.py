"""A function's bindings as they were before a pass, for passes that match several at a time."""

import math
import re
from typing import Any

import tvm
from tvm import relax, tirx
from tvm_ffi import structural_equal

from relaxlm.compiler.passes.rewrite import variables


def is_op(expr: Any, *operators: str) -> bool:
    """Whether this is a call of one of some Relax operators."""
    return isinstance(expr, relax.Call) and expr.op in [
        tvm.ir.Op.get(f"relax.{name}") for name in operators
    ]


def calls(expr: Any, kernel: str, operator: str = "call_tir") -> bool:
    """Whether this calls a kernel of that name, which may have a number behind it."""
    return is_op(expr, operator) and bool(re.fullmatch(kernel + r"\d*", expr.args[0].name_hint))


def is_tensor(expr: relax.Expr, dtype: str, ndim: int) -> bool:
    """Whether this is a tensor of a dtype, with so many axes."""
    ty = expr.ty
    return isinstance(ty, relax.TensorType) and str(ty.dtype) == dtype and len(ty.shape) == ndim


def row_size(expr: relax.Expr) -> int | None:
    """How many values a row of [n, ...] has, if that is known."""
    inner = list(expr.ty.shape)[1:]
    if not all(isinstance(extent, tirx.IntImm) for extent in inner):
        return None
    return math.prod(int(extent) for extent in inner)


class Graph:
    """Of one function.

    Attributes:
        bound: every variable and its value, in order.
        users: the values that read a variable; None for a result of the function.
    """

    def __init__(self, function: relax.Function) -> None:
        self.bound: dict[relax.Var, relax.Expr] = {}
        self.users: dict[relax.Var, list[relax.Expr | None]] = {}
        if not isinstance(function.body, relax.SeqExpr):
            return
        for block in function.body.blocks:
            for binding in block.bindings:
                self.bound[binding.var] = binding.value
                output = not isinstance(binding.var, relax.DataflowVar)
                self.users.setdefault(binding.var, []).extend([None] if output else [])
                for operand in variables(binding.value):
                    self.users.setdefault(operand, []).append(binding.value)

    def value(self, expr: relax.Expr) -> Any:
        """What a variable is bound to; None for anything else."""
        return self.bound.get(expr) if isinstance(expr, relax.Var) else None

    def used_once(self, expr: relax.Expr) -> bool:
        """Whether one value alone reads a variable."""
        return isinstance(expr, relax.DataflowVar) and len(self.users.get(expr, ())) == 1

    def stored(self, expr: relax.Expr) -> relax.Expr:
        """A parameter without the cast to float32: kernels convert what they read."""
        value = self.value(expr)
        return value.args[0] if is_op(value, "astype") else expr

    def columns(self, expr: relax.Expr) -> tuple[relax.Expr, int]:
        """What rows [n, ...] are neighbouring columns of, and the first of them.

        Looks through splits and reshapes that leave rows as they are.
        """
        value = self.value(expr)
        if is_op(value, "reshape"):
            source = value.args[0]
            same = structural_equal(source.ty.shape[0], expr.ty.shape[0])
            if same and row_size(source) == row_size(expr) is not None:
                return self.columns(source)
        if isinstance(value, relax.TupleGetItem):
            split = self.value(value.tuple_value)
            if is_op(split, "split") and int(split.attrs.axis) in (-1, 1):
                source = split.args[0]
                if int(split.attrs.axis) == 1 or len(source.ty.shape) == 2:
                    before = list(value.tuple_value.ty.fields)[: value.index]
                    sizes = [row_size(relax.Var("part", ty)) for ty in before]
                    if None not in sizes:
                        base, first = self.columns(source)
                        return base, first + sum(size for size in sizes if size is not None)
        return expr, 0
