"""Sums, activations and norms on CPUs against float64 NumPy."""

import math

import ml_dtypes
import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels.activations import ACTIVATIONS
from relaxlm.compiler.kernels.cpu_elementwise import SERIAL, RowKernel, gated, row_kernel
from relaxlm.compiler.kernels.packed import pack_kernel
from relaxlm.compiler.kernels.rounding import Rounding
from relaxlm.compiler.kernels.row_expression import (
    Activation,
    Binary,
    Input,
    Matrix,
    Norm,
    Normed,
    Number,
    Vector,
)
from tests.compiler.test_cpu_attention import build

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(int(np.prod(shape)))
    return (rng.standard_normal(shape) * 2 + 0.1).astype("float32")


def normed(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype("float64")
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight.astype("float64")


def layer_normed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype("float64")
    x = x - x.mean(-1, keepdims=True)
    return normed(x, np.ones(x.shape[-1]), eps) * weight.astype("float64") + bias


def run(kernel: RowKernel, *arrays: np.ndarray, rows: int) -> list[np.ndarray]:
    outputs = [np.zeros((rows, kernel.size), "float32") for _ in range(kernel.keep + kernel.plain)]
    if kernel.rounding is not None:
        outputs.append(np.zeros((rows, kernel.rounding.row_words), "int32"))
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in (*arrays, *outputs)]
    build(row_kernel(kernel))(*tensors)
    return [tensor.numpy() for tensor in tensors[len(arrays) :]]


SUM = Binary("add", Matrix(0), Matrix(1))


# One row, a few rows, and enough for several threads.
@pytest.mark.parametrize("rows", [1, 3, SERIAL // 20 + 1])
@pytest.mark.parametrize(("size", "dtype"), [(64, "float16"), (20, "float32"), (7, "float32")])
def test_norm(size: int, dtype: str, rows: int) -> None:
    x, y, weight = random(rows, size), random(rows + 1, size)[1:], random(size).astype(dtype)
    given = (Input(size), Input(size, dtype, is_vector=True))
    kernel = RowKernel(size, given, Matrix(0), Norm("rms", 1e-3, Vector(1)))
    (out,) = run(kernel, x, weight, rows=rows)
    np.testing.assert_allclose(out, normed(x, weight, 1e-3), rtol=2e-6, atol=1e-7)
    given = (Input(size), Input(size), Input(size, dtype, is_vector=True))
    kernel = RowKernel(size, given, SUM, Norm("rms", 1e-3, Vector(2)), keep=True)
    total, out = run(kernel, x, y, weight, rows=rows)
    np.testing.assert_array_equal(total, x + y)
    np.testing.assert_allclose(out, normed(x + y, weight, 1e-3), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 900])
@pytest.mark.parametrize("size", [64, 20])
def test_layer_norm(size: int, rows: int) -> None:
    x, y = random(rows, size) + 30, random(rows + 1, size)[1:]  # digits are lost in squares
    weight, bias = random(size).astype("float16"), random(2 * size)[size:].astype(BFLOAT16)
    vectors = (Input(size, "float16", True), Input(size, "bfloat16", True))
    norm = Norm("layer", 1e-3, Vector(2), Vector(3), shift=0.5)
    kernel = RowKernel(size, (Input(size), Input(size), *vectors), SUM, norm, keep=True)
    total, out = run(kernel, x, y, weight, bias, rows=rows)
    np.testing.assert_array_equal(total, x + y)
    expected = layer_normed(total, weight + np.float32(0.5), bias.astype("float64"), 1e-3)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    bare = RowKernel(size, (Input(size),), Matrix(0), Norm("layer", 1e-3, None))
    expected = layer_normed(x, np.ones(size), np.zeros(size), 1e-3)
    np.testing.assert_allclose(run(bare, x, rows=rows)[0], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 400])
def test_a_norm_within_a_sum_before_a_norm(rows: int) -> None:
    size = 48
    x, y = random(rows, size), random(rows + 1, size)[1:]
    inner, scale, weight = (random(n * size)[-size:] for n in (1, 2, 3))
    vectors = (Input(size, "float32", True),) * 3
    value = Binary(
        "add",
        Matrix(0),
        Binary(
            "multiply",
            Normed(Binary("add", Matrix(1), Vector(2)), Norm("rms", 1e-2, Vector(3))),
            Number(0.25),
        ),
    )
    kernel = RowKernel(
        size,
        (Input(size), Input(size), *vectors),
        value,
        Norm("rms", 1e-3, Vector(4)),
        keep=True,
    )
    total, out = run(kernel, x, y, inner, scale, weight, rows=rows)
    expected = x + 0.25 * normed(y + inner, scale, 1e-2)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, normed(expected, weight, 1e-3), rtol=1e-5, atol=1e-5)


ERF = np.vectorize(math.erf)
EXACT = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + ERF(x / 2**0.5)),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "square": lambda x: x * x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), np.logspace(-30, 3, 500)])
    x = np.concatenate([x, -x[-500:], [0.0] * (-(len(x) + 500) % 16)]).astype("float32")[None]
    kernel = RowKernel(x.shape[1], (Input(x.shape[1]),), Activation(name, Matrix(0)))
    with np.errstate(over="ignore"):
        expected = EXACT[name](x.astype("float64"))
    (found,) = run(kernel, x, rows=1)
    # float32 does not have the digits that 1 + erf cancels, nor the exponents of exp(-88).
    absolute = {"gelu": 1e-6, "gelu_tanh": 3e-7}.get(name, 1e-20)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=absolute)


@pytest.mark.parametrize("rows", [1, 3, SERIAL // 24 + 1])
@pytest.mark.parametrize("size", [128, 48, 24, 7])
def test_silu_mul(size: int, rows: int) -> None:
    x = random(rows, 2 * size)
    x[0, :6] = [-1e4, -130, -90, 90, 130, 1e4]  # far beyond what exp2 has an exponent for
    (out,) = run(gated(size), x, rows=rows)
    gate, up = x[:, :size].astype("float64"), x[:, size:]
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("rows", [1, 5])
def test_long_rows_are_split(rows: int) -> None:
    size = 30_000
    kernel = RowKernel(
        size,
        (Input(size), Input(size + 8, is_vector=True)),
        Binary(
            "subtract",
            Binary("divide", Activation("square", Matrix(0)), Number(3.0)),
            Binary("multiply", Vector(1, first=8), Matrix(0)),
        ),
    )
    assert size % kernel.piece == 0 and 1000 < kernel.piece <= 8192
    x, y = random(rows, size), random(size + 8)
    (found,) = run(kernel, x, y, rows=rows)
    expected = x.astype("float64") ** 2 / 3 - y[8:].astype("float64") * x
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_result_is_written_rounded_and_as_it_is(rows: int) -> None:
    size, isa = 96, "avx2"
    x, y, weight = random(rows, size), random(rows + 1, size)[1:], random(size)
    given = (Input(size), Input(size), Input(size, is_vector=True))
    norm, rounding = Norm("rms", 1e-3, Vector(2)), Rounding(size, isa)
    for plain in (False, True):
        kernel = RowKernel(size, given, SUM, norm, True, plain, rounding)
        total, *normed_, packed = run(kernel, x, y, weight, rows=rows)
        np.testing.assert_array_equal(total, x + y)
        only = RowKernel(size, given, SUM, norm, True)
        _, result = run(only, x, y, weight, rows=rows)
        for found in normed_:
            np.testing.assert_array_equal(found, result)
        expected = tvm.runtime.tensor(np.zeros_like(packed))
        build(pack_kernel(size, isa))(tvm.runtime.tensor(result), expected)
        np.testing.assert_array_equal(packed, expected.numpy())
