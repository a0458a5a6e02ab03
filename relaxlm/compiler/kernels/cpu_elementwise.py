"""Sums, activations and norms of rows on CPUs: one pass over memory for each norm, and one more.

What a kernel computes it writes as float32, or rounded for the matmul that reads it (`Rounding`),
or both. It runs on one thread where waking the others would take longer than the work.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels import row_expression
from relaxlm.compiler.kernels.activations import ACTIVATIONS
from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
from relaxlm.compiler.kernels.packed import Value
from relaxlm.compiler.kernels.rounding import Rounding
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
    parts,
)
from relaxlm.compiler.kernels.vector import (
    multiply_add,
    reduce_sum,
    reduce_sum_ir,
    splat,
    to_float32,
    vector,
)

# Elements that one thread works through in about the time it takes to wake another.
SERIAL = 16384
# Elements of a row that are a task of their own, where rows may be split.
PIECE = 8192


def span(start: Expr | int, lanes: int) -> Expr | int:
    """The index of `lanes` neighbours."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def sum_of(value: Expr, lanes: int) -> Expr:
    """The sum of a float32 vector of one or more lanes."""
    return reduce_sum(value, lanes) if lanes > 1 else value


def for_each_row(n: Expr, elements: int, row: Callable[[Expr], None]) -> None:
    """Emit the loop over rows of so many elements each, on one thread or on all."""
    with T.If(n * elements <= SERIAL):
        with T.Then(), T.serial(n) as i:
            row(i)
        with T.Else(), T.parallel(n) as i:
            row(i)


@dataclass(frozen=True)
class RowKernel:
    """What a kernel computes of every row: `value`, and a norm of it if there is one.

    The kernel is (*inputs, *outputs) with these outputs, as far as they are wanted:

        value   [n, size] float32; wanted by `keep`
        result  [n, size] float32; wanted by `plain`. The norm, or the value if there is none.
        rounded [n, row_words] int32: the result, wanted by `rounding`
    """

    size: int
    inputs: tuple[Input, ...]
    value: Expression
    norm: Norm | None = None
    keep: bool = False
    plain: bool = True
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        assert self.plain or self.rounding is not None
        assert self.norm is not None or not self.keep
        assert self.rounding is None or self.rounding.k == self.size
        # Three passes would compute anything else three times.
        assert self.norm is None or self.keep or isinstance(self.value, Matrix)

    @property
    def lanes(self) -> int:
        return math.gcd(self.size, 16)

    @property
    def norms(self) -> list[Normed]:
        """Those within the value."""
        return [part for part in parts(self.value) if isinstance(part, Normed)]

    @property
    def piece(self) -> int:
        """Elements of a row that are one task; all, if they depend on each other."""
        if self.norm is not None or self.norms or self.rounding is not None:
            return self.size
        divisors = [d for d in range(1, self.size // self.lanes + 1) if self.size % d == 0]
        fitting = (self.size // d for d in divisors if self.size // d % self.lanes == 0)
        return next((piece for piece in fitting if piece <= PIECE), self.lanes)

    @property
    def cost(self) -> int:
        """Work on an element, in that of a norm: an exponential costs as much once more."""
        return 1 + sum(isinstance(part, Activation) for part in parts(self.value))


def emit_value(
    expression: Expression,
    inputs: list[tirx.Buffer],
    row: Expr,
    statistics: dict[Normed, tirx.Buffer] | None = None,
) -> Value:
    """Code for the elements of an expression of one row, (i, lanes) -> float32.

    Args:
        statistics: centre and factor of the norms within.
    """

    def value(i: Expr | int, lanes: int) -> Expr:
        def visit(part: Expression) -> Expr:
            if isinstance(part, Matrix):
                return inputs[part.input].vload([row, part.first + i], vector("float32", lanes))
            if isinstance(part, Vector):
                buffer = inputs[part.input]
                loaded = buffer.vload([part.first + i], vector(str(buffer.dtype), lanes))
                return to_float32(loaded, lanes)
            if isinstance(part, Number):
                return splat(part.value, lanes)
            if isinstance(part, Activation):
                # Written out as often as it is used, what an activation is of would be long code.
                x = scratch(lanes, "float32")
                T.buffer_store(x, visit(part.x), [span(0, lanes)])
                return ACTIVATIONS[part.name](x.vload([0], vector("float32", lanes)), lanes)
            if isinstance(part, Normed):
                assert statistics is not None
                return normalize(part.norm, visit(part.x), statistics[part], visit, lanes)
            return _binary(part, visit)

        return visit(expression)

    return value


def _binary(part: Binary, visit: Callable[[Expression], Expr]) -> Expr:
    # Fused by name, as everywhere: LLVM's choice might differ between copies of a loop.
    if part.operator == "add":
        for one, other in ((part.left, part.right), (part.right, part.left)):
            if isinstance(one, Binary) and one.operator == "multiply":
                return multiply_add(visit(one.left), visit(one.right), visit(other))
        return visit(part.left) + visit(part.right)
    left, right = visit(part.left), visit(part.right)
    if part.operator == "subtract":
        return left - right
    return left * right if part.operator == "multiply" else left / right


def normalize(
    norm: Norm,
    x: Expr,
    statistics: tirx.Buffer,
    visit: Callable[[Expression], Expr],
    lanes: int,
) -> Expr:
    """The norm of elements x, from the centre and factor of their row."""
    if norm.kind == "layer":
        x = x - splat(statistics[0], lanes)
    result = x * splat(statistics[1], lanes)
    weight = None if norm.weight is None else visit(norm.weight)
    if weight is not None and norm.shift:
        weight = weight + splat(norm.shift, lanes)
    if norm.bias is None:
        return result if weight is None else result * weight
    if weight is None:
        return result + visit(norm.bias)
    return multiply_add(result, weight, visit(norm.bias))


def emit_statistics(norm: Norm, size: int, lanes: int, value: Value) -> tirx.Buffer:
    """Emit the passes over a row that find its centre and factor, [2] float32."""
    sums, statistics = scratch(lanes, "float32"), scratch(2, "float32")

    def total() -> Expr:
        return sums.vload([0], vector("float32", lanes))

    def add_up(next: Callable[[Expr, Expr], Expr]) -> None:
        T.buffer_store(sums, splat(0.0, lanes), [span(0, lanes)])
        with T.serial(size // lanes) as i:
            T.buffer_store(sums, next(value(i * lanes, lanes), total()), [span(0, lanes)])

    def square(x: Expr, before: Expr) -> Expr:
        if norm.kind == "layer":
            x = x - splat(statistics[0], lanes)
        return multiply_add(x, x, before)

    if norm.kind == "layer":
        # Two passes: the mean of squares minus the squared mean loses digits.
        add_up(lambda x, before: before + x)
        T.buffer_store(statistics, sum_of(total(), lanes) * T.float32(1 / size), [0])
    add_up(square)
    mean = multiply_add(sum_of(total(), lanes), T.float32(1 / size), T.float32(norm.eps))
    T.buffer_store(statistics, T.float32(1) / T.sqrt(mean), [1])
    return statistics


@functools.cache  # every layer asks
def row_kernel(kernel: RowKernel) -> tirx.PrimFunc:
    """The kernel that a `RowKernel` describes."""
    size, lanes, norm = kernel.size, kernel.lanes, kernel.norm

    def body() -> None:
        n = length("n")
        inputs = [
            tensor(f"x{i}", (given.width,) if given.is_vector else (n, given.width), given.dtype)
            for i, given in enumerate(kernel.inputs)
        ]
        kept = tensor("value", (n, size), "float32") if kernel.keep else None
        plain = tensor("result", (n, size), "float32") if kernel.plain else None
        rounded = None
        if kernel.rounding is not None:
            rounded = tensor("rounded", (n, kernel.rounding.row_words), "int32")

        def store(buffer: tirx.Buffer, row: Expr, i: Expr, new: Expr) -> None:
            T.buffer_store(buffer, new, [row, span(i, lanes)])

        def one(row: Expr, first: Expr | int, count: int) -> None:
            statistics: dict[Normed, tirx.Buffer] = {}
            for inner in kernel.norms:
                x = emit_value(inner.x, inputs, row, statistics)
                statistics[inner] = emit_statistics(inner.norm, size, lanes, x)
            result = emit_value(kernel.value, inputs, row, statistics)
            if norm is not None:
                result = normed(norm, row, result)
            if rounded is not None and kernel.rounding is not None:
                if plain is not None:
                    result = stored_in(plain, result, row)
                kernel.rounding.emit_pack(result, rounded, row, n)
                return
            with T.serial(count // lanes) as i:
                store(plain, row, first + i * lanes, result(first + i * lanes, lanes))

        def normed(norm: Norm, row: Expr, value: Value) -> Value:
            stored = value
            if kept is not None:
                stored = stored_in(kept, value, row)
            found = emit_statistics(norm, size, lanes, stored)

            def result(i: Expr | int, count: int) -> Expr:
                def visit(part: Expression) -> Expr:
                    return emit_value(part, inputs, row)(i, count)

                return normalize(norm, stored(i, count), found, visit, count)

            return result

        def stored_in(buffer: tirx.Buffer, value: Value, row: Expr) -> Value:
            with T.serial(size // lanes) as i:
                store(buffer, row, i * lanes, value(i * lanes, lanes))
            return emit_value(Matrix(0), [buffer], row)

        pieces = size // kernel.piece
        if pieces == 1:
            for_each_row(n, size * kernel.cost, lambda row: one(row, 0, size))
            return
        # Rows are split, so that one alone may be shared out, too.
        for_each_row(
            n * pieces,
            kernel.piece * kernel.cost,
            lambda task: one(task // pieces, task % pieces * kernel.piece, kernel.piece),
        )

    sums = kernel.norm is not None or kernel.norms
    return emit(body, [reduce_sum_ir(lanes)] if lanes > 1 and sums else [])


def gated(size: int, activation: str = "silu") -> RowKernel:
    """x [n, 2 size] -> activation(x[:, :size]) * x[:, size:]."""
    return RowKernel(size, (Input(2 * size),), row_expression.gated(size, activation))


@functools.cache
def round_kernel(rounding: Rounding) -> tirx.PrimFunc:
    """(x [n, k] float32) -> its rows rounded, [n, row_words] int32."""
    k = rounding.k
    return row_kernel(RowKernel(k, (Input(k),), Matrix(0), plain=False, rounding=rounding))
