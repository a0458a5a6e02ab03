"""Products with stored matrices on plain GPUs against float64 NumPy, run by the emulation."""

from dataclasses import replace

import numpy as np
import pytest

from relaxlm.compiler.kernels import gpu_matmul
from relaxlm.compiler.kernels.gpu_matmul import product_kernel
from relaxlm.compiler.kernels.product import Product
from relaxlm.quantization.groupwise import FLOAT_DTYPES, GroupQuant
from relaxlm.quantization.schemes import SCHEMES, Scheme
from tests import reference
from tests.compiler.cuda_emulation import needs_compiler
from tests.compiler.gpu_emulation import GpuEmulation
from tests.compiler.test_cpu_elementwise import EXACT

# What rounding the output costs, with some room; sums are made in float32.
ERROR = {"float32": 5e-7, "float16": 3.2e-4}


class Stored:
    """A random matrix [N, K] as a preset stores it, and the values that kernels multiply."""

    def __init__(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        quant, rng = scheme.linear, np.random.default_rng(3)
        weight = rng.uniform(0.2, 1, shape) * rng.choice([-1, 1], shape)
        self.product = Product(shape, quant, scheme.dtype, scheme.dtype, scheme.dtype)
        if quant is None:
            self.arrays = [weight.astype(FLOAT_DTYPES[scheme.dtype])]
            self.values = self.arrays[0].astype(np.float64)
            return
        stored = quant.quantize(weight)
        self.arrays = list(stored.values())
        # Not rounded to the preset's dtype: (code - zero) * scale is kept in float32.
        wide = GroupQuant(quant.bits, quant.group, quant.layout, "float32")
        kept = {**stored, "q_scale": stored["q_scale"].astype(np.float32)}
        self.values = wide.dequantize(kept, shape).astype(np.float64)


def normal(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.random.default_rng(sum(shape)).standard_normal(shape)
    return values.astype(FLOAT_DTYPES[dtype])


CASES = {
    # More than one word of a thread and step of a tile, and rows of several tiles, and part of one.
    "4 bits": ("q4f16_1", (72, 320), "opencl", "random", [1, 4, 7, 40]),
    "a rest of a group": ("q4f16_1", (19, 150), "metal", "reverse", [1, 3, 33]),
    "stored transposed": ("q4f16_0", (76, 288), "metal", "random", [1, 6, 40]),
    "transposed, with a rest": ("q4f16_0", (35, 100), "opencl", "forward", [1, 6, 33]),
    "3 bits": ("q3f16_0", (72, 410), "opencl", "random", [1, 6, 33]),
    "plain": ("q0f16", (40, 136), "opencl", "reverse", [1, 2, 33]),
    "plain, one at a time": ("q0f32", (70, 99), "metal", "random", [1, 5, 70]),
    "float32": ("q4f32_1", (70, 75), "opencl", "reverse", [1, 5, 70]),
}


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_product_with_a_stored_matrix(case: str) -> None:
    preset, shape, kind, order, rows = CASES[case]
    scheme = SCHEMES[preset]
    stored = Stored(scheme, shape)
    with GpuEmulation(kind, order) as gpu:
        (kernel,) = gpu.build_all([product_kernel(stored.product)])
        for m in rows:
            x = normal((m, shape[1]), scheme.dtype)
            out = np.full((m, shape[0]), np.nan, x.dtype)
            kernel(x, *stored.arrays, out)
            expected = x.astype(np.float64) @ stored.values.T
            assert reference.relative_error(out, expected) < ERROR[scheme.dtype], m


@needs_compiler
def test_bias_and_residual_are_added_before_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_matmul, "TALL", 40)
    stored = Stored(SCHEMES["q4f16_1"], (40, 96))
    both = replace(stored.product, bias="float32", residual=True)
    wide = replace(stored.product, bias="float16", out_dtype="float32")
    product_kernel.cache_clear()
    with GpuEmulation("opencl", "random") as gpu:
        with_both, logits = gpu.build_all([product_kernel(both), product_kernel(wide)])
        for m in (1, 2, 40):
            x, bias = normal((m, 96), "float16"), normal((40,), "float32")
            residual = normal((m, 40), "float16")
            product = x.astype(np.float64) @ stored.values.T
            out = np.full((m, 40), np.nan, np.float16)
            with_both(x, *stored.arrays, bias, residual, out)
            expected = product + bias + residual.astype(np.float64)
            np.testing.assert_allclose(out, expected, rtol=2**-10, atol=2e-5)
            bias, found = bias.astype(np.float16), np.full((m, 40), np.nan, np.float32)
            logits(x, *stored.arrays, bias, found)
            np.testing.assert_allclose(found, product + bias, rtol=1e-5, atol=2e-5)
    product_kernel.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    ("preset", "shape", "kind", "activation"),
    [
        ("q4f16_1", (2 * 40, 96), "metal", "silu"),
        ("q4f16_0", (2 * 70, 64), "opencl", "gelu_tanh"),
        ("q0f32", (2 * 33, 20), "metal", "gelu"),
    ],
)
def test_gated_product(preset: str, shape: tuple[int, int], kind: str, activation: str) -> None:
    stored, half = Stored(SCHEMES[preset], shape), shape[0] // 2
    product = replace(stored.product, activation=activation)
    with GpuEmulation(kind, "random") as gpu:
        (kernel,) = gpu.build_all([product_kernel(product)])
        for m in (1, 3, 37):
            x = normal((m, shape[1]), product.dtype)
            out = np.full((m, half), np.nan, x.dtype)
            kernel(x, *stored.arrays, out)
            gate, up = np.split(x.astype(np.float64) @ stored.values.T, 2, axis=1)
            expected = EXACT[activation](gate) * up
            assert reference.relative_error(out, expected) < 2 * ERROR[product.dtype], m
