"""Sums, activations and norms of rows on GPUs of any kind: a workgroup per row, or a thread for
each element where rows are not summed up.

Threads keep the elements that they compute in float32, which are rounded once.
"""

import functools
from collections.abc import Callable, Mapping

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import emit, tensor
from relaxlm.compiler.kernels.gpu_activations import ACTIVATIONS
from relaxlm.compiler.kernels.gpu_tiles import MOST_THREADS, length, private, put, shared
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
from relaxlm.compiler.kernels.workgroup import MOST_BUFFERS, grid, reduce, when

# What a norm makes of an element, given the code for the vectors that it reads there.
_Normalize = Callable[[Expr, Callable[[Expression], Expr]], Expr]


@functools.cache  # every layer asks
def row_kernel(
    size: int,
    inputs: tuple[Input, ...],
    value: Expression,
    norm: Norm | None,
    keep: bool,
    dtype: str,
) -> tirx.PrimFunc | None:
    """(*inputs) -> [value [n, size],] result [n, size], of `dtype`. n must not be 0.

    Args:
        norm: of the value, which is the result; None: the value itself is.
        keep: whether the value is wanted, too.

    Returns:
        None where a kernel cannot have so many buffers.
    """
    if len(inputs) + 1 + keep > MOST_BUFFERS:
        return None
    inner = [part for part in parts(value) if isinstance(part, Normed)]

    def body() -> None:
        n = length("n")
        given = [
            tensor(f"x{i}", (one.width,) if one.is_vector else (n, one.width), one.dtype)
            for i, one in enumerate(inputs)
        ]
        kept = tensor("value", (n, size), dtype) if keep else None
        out = tensor("result", (n, size), dtype)

        def store(buffer: tirx.Buffer, row: Expr, i: Expr, new: Expr) -> None:
            T.buffer_store(buffer, T.cast(new, dtype), [row, i])

        def one_element() -> None:
            with grid([(n * size + MOST_THREADS - 1) // MOST_THREADS], MOST_THREADS) as (block, t):
                place = block * MOST_THREADS + t
                row, i = place // size, place % size
                with when(place < n * size):
                    store(out, row, i, _element(value, given, row, i, {}))

        def one_row() -> None:
            threads = min(MOST_THREADS, 1 << max(size - 1, 1).bit_length() - 1)
            each = -(-size // threads)
            with grid([n], threads) as (row, t):
                elements, sums = private(each), shared(threads)
                norms: dict[Normed, _Normalize] = {}

                def all_elements(use: Callable[[int, Expr], None]) -> None:
                    """Emit something for each of the thread's elements, those that are there."""
                    for i in range(each):
                        at = i * threads + t
                        with when(True if (i + 1) * threads <= size else at < size):
                            use(i, at)

                def load(part: Expression) -> None:
                    def one(i: int, at: Expr) -> None:
                        put(elements, _element(part, given, row, at, norms), i)

                    all_elements(one)

                for part in inner:
                    load(part.x)
                    norms[part] = _normalizer(part.norm, size, elements, sums, t, all_elements)
                load(value)
                last = None
                if norm is not None:
                    last = _normalizer(norm, size, elements, sums, t, all_elements)

                def finish(i: int, at: Expr) -> None:
                    if kept is not None:
                        store(kept, row, at, elements[i])
                    x: Expr = elements[i]
                    if last is not None:
                        x = last(x, lambda part: _element(part, given, row, at, norms))
                    store(out, row, at, x)

                all_elements(finish)

        if norm is None and not inner:
            one_element()
        else:
            one_row()

    return emit(body)


def _normalizer(
    norm: Norm,
    size: int,
    elements: tirx.Buffer,
    sums: tirx.Buffer,
    t: Expr,
    all_elements: Callable[[Callable[[int, Expr], None]], None],
) -> _Normalize:
    """Emit what finds a row's centre and spread.

    Args:
        elements: the thread's own.
        sums: of the workgroup, one for each thread.
    """
    threads, found, mine = int(sums.shape[0]), private(2), private(1)

    def total(of: Callable[[Expr], Expr]) -> Expr:
        put(mine, 0.0)
        all_elements(lambda i, _: put(mine, mine[0] + of(elements[i])))
        put(sums, mine[0], t)
        reduce([sums], t, t, threads)
        return sums[0]

    def centred(x: Expr) -> Expr:
        return x - found[0] if norm.kind == "layer" else x

    if norm.kind == "layer":
        # Two passes: the mean of squares minus the squared mean loses digits.
        put(found, total(lambda x: x) / T.float32(size), 0)
    mean = total(lambda x: centred(x) * centred(x)) / T.float32(size)
    put(found, T.float32(1) / T.sqrt(mean + T.float32(norm.eps)), 1)

    def normalize(x: Expr, visit: Callable[[Expression], Expr]) -> Expr:
        result = centred(x) * found[1]
        if norm.weight is not None:
            weight = visit(norm.weight)
            result = result * (weight + T.float32(norm.shift) if norm.shift else weight)
        return result if norm.bias is None else result + visit(norm.bias)

    return normalize


def _element(
    expression: Expression,
    inputs: list[tirx.Buffer],
    row: Expr,
    i: Expr,
    norms: Mapping[Normed, _Normalize],
) -> Expr:
    """Element i of an expression of a row, float32.

    Args:
        norms: what the norms within do.
    """

    def visit(part: Expression) -> Expr:
        if isinstance(part, Matrix):
            return T.cast(inputs[part.input][row, part.first + i], "float32")
        if isinstance(part, Vector):
            return T.cast(inputs[part.input][part.first + i], "float32")
        if isinstance(part, Number):
            return T.float32(part.value)
        if isinstance(part, Normed):
            return norms[part](visit(part.x), visit)
        if isinstance(part, Activation):
            x = private(1)
            put(x, visit(part.x))
            return ACTIVATIONS[part.name](x[0])
        return _binary(part, visit)

    return visit(expression)


def _binary(part: Binary, visit: Callable[[Expression], Expr]) -> Expr:
    left, right = visit(part.left), visit(part.right)
    if part.operator == "add":
        return left + right
    if part.operator == "subtract":
        return left - right
    return left * right if part.operator == "multiply" else left / right
