"""Norms, activations and rotary embeddings on CPUs against float64 NumPy."""

import math

import ml_dtypes
import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels import cpu_append
from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.cpu_elementwise import (
    SERIAL,
    gelu_kernel,
    norm_kernel,
    silu_mul_kernel,
)
from relaxlm.compiler.kernels.cpu_rope import RopeOptions, rope_append_kernel
from relaxlm.quantization.kv_cache import KV_FORMATS
from tests.compiler.test_cpu_attention import build

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(int(np.prod(shape)))
    return (rng.standard_normal(shape) * 2 + 0.1).astype("float32")


def normed(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype("float64")
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight.astype("float64")


# One row, a few rows, and enough for several threads.
@pytest.mark.parametrize("rows", [1, 3, SERIAL // 20 + 1])
@pytest.mark.parametrize(("size", "dtype"), [(64, "float16"), (20, "float32"), (7, "float32")])
def test_norm(size: int, dtype: str, rows: int) -> None:
    x, y, weight = random(rows, size), random(rows + 1, size)[1:], random(size).astype(dtype)
    out, total = (tvm.runtime.tensor(np.zeros((rows, size), "float32")) for _ in range(2))
    arrays = [tvm.runtime.tensor(array) for array in (x, y, weight)]
    build(norm_kernel(size, 1e-3, dtype, False))(arrays[0], arrays[2], out)
    np.testing.assert_allclose(out.numpy(), normed(x, weight, 1e-3), rtol=2e-6, atol=1e-7)
    build(norm_kernel(size, 1e-3, dtype, True))(*arrays, total, out)
    np.testing.assert_array_equal(total.numpy(), x + y)
    np.testing.assert_allclose(out.numpy(), normed(x + y, weight, 1e-3), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, SERIAL // 24 + 1])
@pytest.mark.parametrize("size", [128, 48, 24, 7])
def test_silu_mul(size: int, rows: int) -> None:
    x = random(rows, 2 * size)
    x[0, :6] = [-1e4, -130, -90, 90, 130, 1e4]  # far beyond what exp2 has an exponent for
    out = tvm.runtime.tensor(np.zeros((rows, size), "float32"))
    build(silu_mul_kernel(size))(tvm.runtime.tensor(x), out)
    gate, up = x[:, :size].astype("float64"), x[:, size:]
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("size", "dtype"), [(128, "float16"), (24, None), (7, "float32")], ids=str)
@pytest.mark.parametrize("rows", [1, SERIAL // 24 + 1])
def test_gelu(size: int, dtype: str | None, rows: int) -> None:
    x = random(rows, size)
    x[0, :7] = [-1e4, -12, -3, 1e-6, 3, 12, 1e4]
    bias = [] if dtype is None else [random(size).astype(dtype)]
    out = tvm.runtime.tensor(np.zeros((rows, size), "float32"))
    build(gelu_kernel(size, dtype))(*map(tvm.runtime.tensor, (x, *bias)), out)
    whole = x if dtype is None else x + bias[0].astype("float32")
    normal = 0.5 * (1 + np.vectorize(math.erf)(whole.astype("float64") / math.sqrt(2)))
    np.testing.assert_allclose(out.numpy(), whole * normal, rtol=1e-6, atol=1e-6)


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    a, b = np.split(x.astype("float64"), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("format", KV_FORMATS.values(), ids=KV_FORMATS)
@pytest.mark.parametrize(
    ("head_dim", "bias", "norm"),
    [(64, None, None), (20, "float16", None), (8, None, "float32"), (80, "bfloat16", "float16")],
    ids=str,
)
def test_rope_and_append(head_dim, bias, norm, format, tokens) -> None:
    shape = AttentionShape(6, 2, head_dim, window=0, sinks=0, scale=0.0)
    numpy = {"bfloat16": BFLOAT16}
    x = random(tokens, 10 * head_dim)
    angles = random(tokens, head_dim // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    slots = np.random.default_rng(1).permutation(16 * 4)[:tokens].astype("int32")
    extras = [random(10 * head_dim).astype(numpy.get(bias, bias))] if bias else []
    weights = [random(n * head_dim)[-head_dim:].astype(norm) for n in (1, 2)] if norm else []

    heads = (x + (extras[0].astype("float32") if bias else 0)).reshape(tokens, 10, head_dim)
    q, k, v = heads[:, :6], heads[:, 6:8], heads[:, 8:]
    if norm:
        q, k = normed(q, weights[0], 1e-5), normed(k, weights[1], 1e-5)
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)

    def pages() -> list:
        return [
            tvm.runtime.tensor(
                np.zeros((4, *tensor.page_shape), numpy.get(tensor.dtype, tensor.dtype))
            )
            for tensor in cpu_append.page_tensors(shape, format)
        ]

    found, expected = pages(), pages()
    inputs = (tvm.runtime.tensor(array) for array in (x, cos, sin, slots, *extras, *weights))
    out = tvm.runtime.tensor(np.zeros((tokens, 6, head_dim), "float32"))
    options = RopeOptions(bias, norm, 1e-5)
    build(rope_append_kernel(shape, format, options))(*inputs, *found, out)
    np.testing.assert_allclose(out.numpy(), q, rtol=1e-5, atol=1e-5)

    # What the plain kernel, tested with attention, makes of the same keys and values.
    kv = (tvm.runtime.tensor(part.astype("float32")) for part in (k, v))
    build(cpu_append.append_kernel(shape, format, "float32"))(
        *kv, tvm.runtime.tensor(slots), *expected
    )
    for ours, theirs in zip(found, expected, strict=True):
        if str(ours.dtype) == "uint8":  # neighbours of a rounding boundary may differ by a code
            assert np.abs(ours.numpy().astype(int) - theirs.numpy()).max() <= 1
        else:
            near, far = (tensor.numpy().astype("float32") for tensor in (ours, theirs))
            tolerance = {"float32": 1e-5, "float16": 1e-3}.get(str(ours.dtype), 1e-2)
            np.testing.assert_allclose(near, far, rtol=tolerance, atol=tolerance)
