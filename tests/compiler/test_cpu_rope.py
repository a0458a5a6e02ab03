"""From products to queries and pages on CPUs, against float64 NumPy."""

import ml_dtypes
import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels import cpu_append
from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.cpu_rope import rope_append_kernel
from relaxlm.compiler.kernels.rope import RopeOptions
from relaxlm.quantization.kv_cache import get_kv_format
from tests.compiler.test_cpu_attention import build
from tests.compiler.test_cpu_elementwise import normed, random

NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
Q, KV = 6, 2  # heads


def joined(dim: int, **options) -> RopeOptions:
    """q, k and v in one product."""
    places = ((0, 0), (0, Q * dim), (0, (Q + KV) * dim))
    return RopeOptions(((Q + 2 * KV) * dim,), places, **{"biases": (None,), **options})


def apart(dim: int, **options) -> RopeOptions:
    """A product for each, of which k's is a part of a wider one."""
    widths = (Q * dim, 3 + KV * dim, KV * dim)
    places = ((0, 0), (1, 3), (2, 0))
    return RopeOptions(widths, places, **{"biases": (None,) * 3, **options})


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, in_pairs: bool) -> np.ndarray:
    x = x.astype("float64")
    half = cos.shape[1]
    turned = x[..., : 2 * half]
    pairs = turned.reshape(*x.shape[:-1], half, 2) if in_pairs else None
    a, b = (pairs[..., 0], pairs[..., 1]) if in_pairs else np.split(turned, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    new = [a * cos - b * sin, b * cos + a * sin]
    both = np.stack(new, -1).reshape(turned.shape) if in_pairs else np.concatenate(new, -1)
    return np.concatenate([both, x[..., 2 * half :]], -1)


CASES = {
    "whole": (64, joined(64, turned=64)),
    "bias": (20, joined(20, turned=20, biases=("float16",))),
    "norm": (8, joined(8, turned=8, norm="float32", eps=1e-5)),
    "bias, norm": (80, joined(80, turned=80, biases=("bfloat16",), norm="float16", eps=1e-5)),
    "part": (80, joined(80, turned=32)),
    "odd part": (24, joined(24, turned=6, biases=("float32",))),
    "pairs": (32, joined(32, turned=32, in_pairs=True, scaled=True)),
    "part in pairs": (24, joined(24, turned=12, in_pairs=True)),
    "none": (64, joined(64, biases=("float32",))),
    "apart": (32, apart(32, turned=32, norm="float16", eps=1e-3, scaled=True)),
    "apart, biases": (16, apart(16, turned=8, biases=("float32", None, "float16"))),
}


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("format", ["f32", "fp8"])
@pytest.mark.parametrize("case", CASES)
def test_rope_and_append(case: str, format: str, tokens: int) -> None:
    check(*CASES[case], format, tokens)


@pytest.mark.parametrize("format", ["f16", "bf16"])
def test_other_formats(format: str) -> None:
    check(*CASES["whole"], format, 21)


def check(dim: int, options: RopeOptions, format_name: str, tokens: int) -> None:
    format = get_kv_format(format_name)
    shape = AttentionShape(Q, KV, dim, window=0, sinks=0, scale=0.0)
    products = [random(tokens + i, width)[i:] for i, width in enumerate(options.widths)]
    biases = [
        None if dtype is None else random(width).astype(NUMPY.get(dtype, dtype))
        for dtype, width in zip(options.biases, options.widths, strict=True)
    ]
    weights = [random(n * dim)[-dim:].astype(options.norm) for n in (1, 2)] if options.norm else []
    angles = random(tokens, options.turned // 2) if options.turned else None
    tables = [] if angles is None else [np.cos(angles), np.sin(angles)]
    factor = [random(tokens)] if options.scaled else []
    slots = np.random.default_rng(1).permutation(16 * 4)[:tokens].astype("int32")

    def heads_of(part: int, heads: int) -> np.ndarray:
        number, first = options.places[part]
        x, bias = products[number], biases[number]
        if bias is not None:
            x = x + bias.astype("float32")
        return x[:, first : first + heads * dim].reshape(tokens, heads, dim)

    q, k, v = heads_of(0, Q), heads_of(1, KV), heads_of(2, KV)
    if weights:
        q, k = normed(q, weights[0], options.eps), normed(k, weights[1], options.eps)
    if tables:
        q, k = (rotated(x, *tables, options.in_pairs) for x in (q, k))
    if factor:
        q = q * factor[0][:, None, None]

    def pages() -> list:
        return [
            tvm.runtime.tensor(
                np.zeros((4, *tensor.page_shape), NUMPY.get(tensor.dtype, tensor.dtype))
            )
            for tensor in cpu_append.page_tensors(shape, format)
        ]

    found, expected = pages(), pages()
    arrays = (*products, *(b for b in biases if b is not None), *weights, *tables, *factor, slots)
    out = tvm.runtime.tensor(np.zeros((tokens, Q, dim), "float32"))
    kernel = build(rope_append_kernel(shape, format, options))
    kernel(*(tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays), *found, out)
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
