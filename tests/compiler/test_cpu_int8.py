"""Matmuls with int8 activations against float64 NumPy, and their selection."""

import numpy as np
import pytest
import tvm

from relaxlm import models
from relaxlm.compiler.build import compile_model
from relaxlm.compiler.kernels.cpu_int8 import int8_matmul_kernel, quantize_kernel
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.options import ACT_QUANT_FEATURES, CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import missing_features
from tests.compiler.test_cpu_matmul import build, inner_loops
from tests.models.parity import tiny_config

needs_vnni = pytest.mark.skipif(
    bool(missing_features(ACT_QUANT_FEATURES)), reason="this CPU has no AVX-512 VNNI"
)
# One vector of words; a rest of words, of elements of a group, and of rows; few rows.
SHAPES = [(33, 128), (35, 330), (16, 224)]


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What int8 keeps of x [m, K], K a multiple of 32: codes [m, K] and scales [m, K / 32]."""
    groups = x.reshape(len(x), -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    codes = np.rint(groups * (np.float32(127) / largest))
    return codes.reshape(x.shape), (largest * np.float32(1 / 127))[..., 0]


def quantized(quantize, x: np.ndarray) -> list[tvm.runtime.Tensor]:
    m, groups = len(x), -(-x.shape[1] // 32)
    parts = [
        tvm.runtime.tensor(np.full((m, groups * words), -1, dtype))
        for words, dtype in ((8, "int32"), (1, "float32"), (1, "int32"))
    ]
    quantize(tvm.runtime.tensor(x), *parts)
    return parts


@needs_vnni
@pytest.mark.parametrize("k", [64, 330])
def test_activations_are_rounded_by_groups(k: int) -> None:
    x = np.random.default_rng(1).standard_normal((3, k)).astype(np.float32)
    x[1, :32] = 0
    codes, scales, sums = (
        part.numpy() for part in quantized(build({"q": quantize_kernel(k)})["q"], x)
    )
    padded = np.pad(x, ((0, 0), (0, -k % 32)))
    padded[1, 0] = 1e-20  # the kernel's smallest divisor
    expected, expected_scales = rounded(padded)
    groups = expected.reshape(3, -1, 16, 2)
    stored = codes.view(np.int8).reshape(3, -1, 2, 16).swapaxes(2, 3)
    stored[1, 0, 0, 0] = groups[1, 0, 0, 0]
    np.testing.assert_array_equal(stored, groups)
    np.testing.assert_allclose(scales, expected_scales, rtol=2e-7)
    sums[1, 0] = -7 * groups[1, 0].sum()
    np.testing.assert_array_equal(sums, -7 * groups.sum((2, 3)))


@needs_vnni
@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f32_1", "q4bf16_1"])
def test_products_with_rounded_activations(scheme: str) -> None:
    quant = get_scheme(scheme).linear
    assert quant is not None
    rng = np.random.default_rng(2)
    kernels = {}
    for n, k in SHAPES:
        matrix = StoredMatrix(n, k, quant, quant.dtype)
        kernels[f"m{n}"], kernels[f"q{n}"] = (
            int8_matmul_kernel(matrix, "float32"),
            quantize_kernel(k),
        )
    library = build(kernels)
    for n, k in SHAPES:
        arrays = quant.quantize(rng.standard_normal((n, k)).astype(np.float32))
        weight = np.pad(quant.dequantize(arrays, (n, k)), ((0, 0), (0, -k % 32)))
        stored = [tvm.runtime.tensor(array) for array in arrays.values()]
        for m in (1, 3, 17):
            x = rng.standard_normal((m, k)).astype(np.float32)
            out = tvm.runtime.tensor(np.full((m, n), np.nan, np.float32))
            library[f"m{n}"](*quantized(library[f"q{n}"], x), *stored, out)
            actual, padded = out.numpy(), np.pad(x, ((0, 0), (0, -k % 32)))
            codes, scales = rounded(padded)
            kept = codes * np.repeat(scales, 32, 1)
            # Exact but for the order of float32 sums, given the rounded activations ...
            terms = np.abs(kept) @ np.abs(weight).T
            assert (np.abs(actual - kept @ weight.T.astype(np.float64)) <= 1e-6 * terms).all()
            # ... which are what the error comes from.
            expected = padded.astype(np.float64) @ weight.T
            error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
            assert 1e-3 < error < 1e-2


@needs_vnni
def test_inner_loops_call_nothing() -> None:
    quant = get_scheme("q4f16_1").linear
    matrix = StoredMatrix(96, 512, quant, "float16")
    loops = inner_loops(
        build({"m": int8_matmul_kernel(matrix, "float32")}).mod.inspect_source("asm")
    )
    assert len(loops) >= 3
    assert not [body for body in loops if "call" in body]


def compile_tiny(scheme_name: str, arch: str | None) -> str:
    raw = tiny_config("llama", hidden_size=128, num_hidden_layers=1)
    config, scheme = models.load_config(raw), get_scheme(scheme_name)
    options = CompileOptions.resolve(config, scheme, opt="act_quant=1")
    compiled = compile_model(config, raw, scheme, resolve_device("cpu", arch), options)
    return compiled.metadata.opt


@needs_vnni
def test_a_library_says_that_it_rounds_activations() -> None:
    assert compile_tiny("q4f16_1", None) == "O2;act_quant=1"


def test_cpus_and_presets_without_such_kernels_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        compile_tiny("q4f16_1", "x86-64-v4")
    assert str(error.value) == (
        "--opt act_quant=1 needs a CPU with avx512f, avx512bw, avx512vnni; x86-64-v4 lacks "
        "avx512vnni. Use act_quant=0"
    )
    if not missing_features(ACT_QUANT_FEATURES):
        with pytest.raises(ConfigError) as error:
            compile_tiny("q4f16_0", None)
        assert str(error.value) == (
            "--opt act_quant=1 is for 4-bit weights stored row by row, such as q4f16_1, not for "
            "q4f16_0. Use act_quant=0"
        )
