"""Sums, activations and norms of rows on GPUs against float64 NumPy, run by the emulation."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from relaxlm.compiler.kernels.cuda_rows import row_kernel
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
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.test_cpu_elementwise import EXACT

ROWS = 3
SUM = Binary("add", Matrix(0), Matrix(1))
# A step of rounding, for results of about 1.
STEP = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 5e-3}


class Case(NamedTuple):
    size: int
    inputs: tuple[Input, ...]
    value: Expression
    norm: Norm | None = None
    keep: bool = False


def rows(width: int, dtype: str, *vectors: str, count: int = 1) -> tuple[Input, ...]:
    return (*(Input(width, dtype),) * count, *(Input(width, kind, True) for kind in vectors))


HALF = "float16"
CASES = {
    # More than one step of a block, warps that share a row, and a row in one value at a time.
    "norm": Case(
        9000, rows(9000, HALF, "float32"), Matrix(0), Norm("rms", 1e-3, Vector(1), shift=1)
    ),
    "sum and its norm": Case(
        200, rows(200, "bfloat16", "bfloat16", count=2), SUM, Norm("rms", 1e-5, Vector(2)), True
    ),
    "layer norm": Case(
        67,
        rows(67, "float32", HALF, "bfloat16", count=2),
        Binary("subtract", Matrix(0), Matrix(1)),
        Norm("layer", 1e-3, Vector(2), Vector(3), shift=0.5),
        keep=True,
    ),
    "bare layer norm": Case(96, rows(96, HALF), Matrix(0), Norm("layer", 1e-3, None)),
    "norms within": Case(
        520,
        rows(520, HALF, HALF, HALF, HALF, count=2),
        Binary(
            "add",
            Normed(Matrix(0), Norm("layer", 1e-2, Vector(2))),
            Binary(
                "multiply",
                Normed(Binary("add", Matrix(1), Vector(3)), Norm("rms", 1e-2, Vector(4))),
                Number(0.25),
            ),
        ),
        Norm("rms", 1e-3, Vector(2)),
        keep=True,
    ),
    # Parts of wider rows, more elements than a block has.
    "gated": Case(
        2200,
        (Input(2 * 2200, HALF),),
        Binary("multiply", Activation("silu", Matrix(0)), Matrix(0, 2200)),
    ),
    **{
        name: Case(
            40,
            rows(40, "float32", count=2),
            Binary("divide", Activation(name, Matrix(0)), Matrix(1)),
        )
        for name in EXACT
    },
}


def evaluated(part: Expression, arrays: list[np.ndarray], size: int) -> np.ndarray:
    """The slow, obvious meaning of an expression."""
    if isinstance(part, (Matrix, Vector)):
        return arrays[part.input][..., part.first : part.first + size]
    if isinstance(part, Number):
        return np.float64(part.value)
    if isinstance(part, Binary):
        left, right = (evaluated(one, arrays, size) for one in (part.left, part.right))
        return getattr(np, part.operator)(left, right)
    x = evaluated(part.x, arrays, size)
    return EXACT[part.name](x) if isinstance(part, Activation) else normed(x, part.norm, arrays)


def normed(x: np.ndarray, norm: Norm, arrays: list[np.ndarray]) -> np.ndarray:
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps)
    if norm.weight is not None:
        x = x * (arrays[norm.weight.input] + norm.shift)
    return x if norm.bias is None else x + arrays[norm.bias.input]


@pytest.fixture(scope="module")
def kernels():
    with CudaEmulation("random") as cuda:
        built = cuda.build_all(
            [row_kernel(*case[:5], dtype=case.inputs[0].dtype) for case in CASES.values()]
        )
        yield dict(zip(CASES, built, strict=True))


def as_plain(case: Case) -> Case:
    """The same with float16 in place of bfloat16."""
    kinds = {"bfloat16": HALF}
    inputs = [replace(one, dtype=kinds.get(one.dtype, one.dtype)) for one in case.inputs]
    return case._replace(inputs=tuple(inputs))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_rows(kernels: dict[str, Callable[..., None]], name: str) -> None:
    check_rows(kernels[name], CASES[name])


def check_rows(kernel: Callable[..., None], case: Case, step: float = 0) -> None:
    """Compare what a kernel makes of random rows with what float64 does."""
    rng = np.random.default_rng(3)
    dtype = case.inputs[0].dtype
    given = [
        (rng.standard_normal(one.width if one.is_vector else (ROWS, one.width)) * 2 + 0.1).astype(
            getattr(ml_dtypes, one.dtype, one.dtype)
        )
        for one in case.inputs
    ]
    outputs = [np.full((ROWS, case.size), np.nan, given[0].dtype) for _ in range(1 + case.keep)]
    kernel(*given, *outputs)
    exact = [array.astype("float64") for array in given]
    value = evaluated(case.value, exact, case.size)
    expected = [value] if case.norm is None else [normed(value, case.norm, exact)]
    for found, right in zip(outputs, [value, *expected][-len(outputs) :], strict=True):
        error = np.abs(found.astype("float64") - right) / np.maximum(np.abs(right), 1)
        assert error.max() < (step or STEP[dtype])
