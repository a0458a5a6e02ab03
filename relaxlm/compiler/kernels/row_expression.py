"""What a kernel computes of each row, as data: sums, products, activations and norms of inputs.

A pass builds an expression of the operators that it finds; `Evaluator` turns it into code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeAlias

Operator = Literal["add", "subtract", "multiply", "divide"]


@dataclass(frozen=True)
class Matrix:
    """Elements `first` and those after it of the row of input number `input`."""

    input: int
    first: int = 0


@dataclass(frozen=True)
class Vector:
    """The same for every row: elements `first` and those after it of input number `input`."""

    input: int
    first: int = 0


@dataclass(frozen=True)
class Number:
    value: float


@dataclass(frozen=True)
class Binary:
    operator: Operator
    left: "Expression"
    right: "Expression"


@dataclass(frozen=True)
class Activation:
    """`name` is one of `activations.ACTIVATIONS`."""

    name: str
    x: "Expression"


@dataclass(frozen=True)
class Norm:
    """A norm over whole rows: (x - centre) / spread * (weight + shift) + bias.

    The spread is the root of eps plus the mean square of x - centre; the centre is the mean of a
    row for `kind` "layer", and 0 for "rms". Weight and bias are vectors, or None for none.
    """

    kind: Literal["rms", "layer"]
    eps: float
    weight: Vector | None
    bias: Vector | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class Normed:
    x: "Expression"
    norm: Norm


Expression: TypeAlias = Matrix | Vector | Number | Binary | Activation | Normed


@dataclass(frozen=True)
class Input:
    """What a kernel reads: [n, width] of `dtype`, or, for a vector, [width]."""

    width: int
    dtype: str = "float32"
    is_vector: bool = False


def parts(expression: Expression) -> Iterator[Expression]:
    """An expression and all in it, operands before what is computed of them."""
    if isinstance(expression, Binary):
        yield from parts(expression.left)
        yield from parts(expression.right)
    elif isinstance(expression, (Activation, Normed)):
        yield from parts(expression.x)
    yield expression


def gated(size: int, activation: str) -> Expression:
    """activation(x[:, :size]) * x[:, size:] of rows [n, 2 size], or wider ones."""
    return Binary("multiply", Activation(activation, Matrix(0)), Matrix(0, size))


def name_of(expression: Expression) -> str:
    """A name for a kernel: its operators in order, "silu_mul"."""
    short = {"multiply": "mul", "subtract": "sub", "divide": "div"}
    found = []
    for part in parts(expression):
        if isinstance(part, Binary):
            found.append(short.get(part.operator, part.operator))
        elif isinstance(part, Activation):
            found.append(part.name)
        elif isinstance(part, Normed):
            found.append("norm")
    return "_".join(name for name, _ in groupby(found))
