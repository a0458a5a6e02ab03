"""Products with stored matrices on GPUs against float64 NumPy, run by the emulation."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm

from relaxlm.compiler.cuda import cuda_compilation, find_nvcc
from relaxlm.compiler.kernels import cuda_matmul
from relaxlm.compiler.kernels.cuda_matmul import (
    CudaFormat,
    gated_matmul_kernel,
    matmul_kernel,
    skinny,
    tiled,
    ways,
)
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.groupwise import FLOAT_DTYPES, round_to
from relaxlm.quantization.schemes import SCHEMES, Scheme
from tests import reference
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.test_cpu_elementwise import EXACT
from tests.compiler.test_cuda import needs_nvcc

SHARED = 99 << 10
# What rounding the output costs, with some room; sums are made in float32.
ERROR = {"float32": 5e-7, "float16": 3.2e-4, "bfloat16": 2.6e-3}


class Stored:
    """A random matrix [..., N, K] as a preset stores it, and the values that kernels multiply."""

    def __init__(self, scheme: Scheme, shape: tuple[int, ...]) -> None:
        quant, rng = scheme.linear, np.random.default_rng(3)
        weight = rng.uniform(0.2, 1, shape) * rng.choice([-1, 1], shape)
        self.format = CudaFormat.of(shape, quant, scheme.dtype)
        if quant is None:
            self.arrays = [weight.astype(FLOAT_DTYPES[scheme.dtype])]
            self.values = self.arrays[0].astype(np.float64)
            return
        stored = quant.quantize(weight)
        self.arrays = list(stored.values())
        # Weights are (code - zero) * scale in the preset's dtype.
        kept = quant.dequantize(stored, shape)
        self.values = round_to(kept, scheme.dtype).astype(np.float64)


def normal(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.random.default_rng(sum(shape)).standard_normal(shape)
    return values.astype(FLOAT_DTYPES[dtype])


@needs_compiler
@pytest.mark.parametrize(
    ("preset", "shape", "order", "rows"),
    [
        # More than one stage and part of one, rows of several tiles and part of one.
        ("q4f16_1", (72, 320), "random", [1, 4, 7, 12, 30, 40, 520]),
        # A rest of a group; rows that are not multiples of 16 bytes.
        ("q4f16_1", (19, 150), "reverse", [3, 33]),
        ("q4bf16_1", (40, 160), "forward", [5, 33]),
        ("q0f16", (40, 136), "reverse", [2, 33]),
        ("q4f16_0", (76, 288), "random", [1, 12, 30, 40, 520]),
        ("q4f16_0", (35, 100), "forward", [6, 33]),
        ("q4bf16_0", (40, 64), "reverse", [6, 33]),
        ("q3f16_0", (72, 410), "random", [6, 33]),
        ("q0f32", (70, 100), "random", [1, 5, 70]),
        ("q4f32_1", (70, 75), "reverse", [1, 5, 70]),
    ],
)
def test_product_with_a_stored_matrix(
    preset: str, shape: tuple[int, int], order: str, rows: list[int]
) -> None:
    scheme = SCHEMES[preset]
    stored = Stored(scheme, shape)
    with CudaEmulation(order) as cuda:
        kernel = cuda.build(matmul_kernel(stored.format, scheme.dtype, SHARED))
        for m in rows:
            x = normal((m, shape[1]), scheme.dtype)
            out = np.full((m, shape[0]), np.nan, x.dtype)
            kernel(x, *stored.arrays, out)
            expected = x.astype(np.float64) @ stored.values.T
            assert reference.relative_error(out, expected) < ERROR[scheme.dtype], m


@needs_compiler
def test_bias_and_residual_are_added_before_rounding() -> None:
    scheme = SCHEMES["q4f16_1"]
    stored = Stored(scheme, (40, 96))
    with CudaEmulation("random") as cuda:
        both, logits = cuda.build_all(
            [
                matmul_kernel(stored.format, "float16", SHARED, "float16", residual=True),
                matmul_kernel(stored.format, "float32", SHARED, "float16"),
            ]
        )
        for m in (2, 40):
            x, bias = normal((m, 96), "float16"), normal((40,), "float16")
            residual = normal((m, 40), "float16")
            product = x.astype(np.float64) @ stored.values.T + bias.astype(np.float64)
            out = np.full((m, 40), np.nan, np.float16)
            both(x, *stored.arrays, bias, residual, out)
            expected = product + residual.astype(np.float64)
            np.testing.assert_allclose(out, expected, rtol=2**-10, atol=2e-5)
            wide = np.full((m, 40), np.nan, np.float32)
            logits(x, *stored.arrays, bias, wide)
            assert reference.relative_error(wide, product) < ERROR["float32"]


@needs_compiler
@pytest.mark.parametrize(
    ("preset", "inner", "k", "activation"),
    [
        ("q4f16_1", 80, 320, "silu"),  # more tiles than one, and part of one
        ("q4bf16_0", 48, 64, "gelu_tanh"),
        ("q0f16", 16, 75, "relu"),  # rows that are not multiples of 16 bytes
    ],
)
def test_gated_product(preset: str, inner: int, k: int, activation: str) -> None:
    scheme = SCHEMES[preset]
    stored = Stored(scheme, (2 * inner, k))
    with CudaEmulation("random") as cuda:
        kernel = cuda.build(gated_matmul_kernel(stored.format, activation, SHARED))
        for m in (1, 12, 30, 70):
            x = normal((m, k), scheme.dtype)
            out = np.full((m, inner), np.nan, x.dtype)
            kernel(x, *stored.arrays, out)
            gate, up = np.split(x.astype(np.float64) @ stored.values.T, 2, axis=1)
            expected = EXACT[activation](gate) * up
            assert reference.relative_error(out, expected) < 2 * ERROR[scheme.dtype], m


def test_tiles_fit_into_shared_memory() -> None:
    for scheme in SCHEMES.values():
        format = CudaFormat.of((64, 64), scheme.linear, scheme.dtype)
        for limit in (64 << 10, 99 << 10, 227 << 10):
            assert all(way.shared <= limit for _, way in ways(format, scheme.dtype, limit))


def with_ways(format: CudaFormat, choices: list, monkeypatch: pytest.MonkeyPatch):
    """A kernel with other ways to multiply than usual."""
    monkeypatch.setattr(cuda_matmul, "ways", lambda *_: choices)
    return matmul_kernel.__wrapped__(format, format.dtype, SHARED)


@needs_nvcc
def test_every_format_becomes_machine_code_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    target = resolve_device("cuda", "sm_80")
    functions = {}
    for name in ("q4bf16_1", "q3f16_1", "q8f16_1", "q0f16", "q4f16_0", "q3f16_0"):
        scheme = SCHEMES[name]
        format = CudaFormat.of((64, 64 if name != "q3f16_1" else 63), scheme.linear, scheme.dtype)
        choices = [(16, skinny(format, 2, 2, 8)), (0, tiled(format, 4, 2, 8))]
        functions[name] = with_ways(format, choices, monkeypatch).with_attr("global_symbol", name)
    with cuda_compilation(target.arch) as build:
        tvm.compile(tvm.IRModule(functions), target=target.tvm_target())
    assert len(build.reports) == 2 * len(functions)
    assert [str(report) for report in build.reports if report.stack or report.spill_stores] == []


@needs_nvcc
def test_weights_are_read_16_bytes_at_a_time_and_multiplied_by_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = resolve_device("cuda", "sm_90")
    format = CudaFormat.of((64, 64), SCHEMES["q4f16_1"].linear, "float16")
    kernel = with_ways(format, [(0, skinny(format, 1, 1, 8))], monkeypatch)
    with cuda_compilation(target.arch, tmp_path) as build:
        module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
        tvm.compile(module, target=target.tvm_target())
    assert [report.spill_stores for report in build.reports] == [0]
    command = [find_nvcc(), "--ptx", "-std=c++17", "-arch=sm_90", "-o", "kernels.ptx", "kernels.cu"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    ptx = (tmp_path / "kernels.ptx").read_text()
    # Four times two rows before the loop and in it; of x, four units of each chunk.
    assert len(re.findall(r"ld\.global\.nc\.L1::no_allocate\.L2::128B\.v4\.u32", ptx)) == 16
    assert len(re.findall(r"mma\.sync\.aligned\.m16n8k16", ptx)) == 4 * 8
    # Beside them, only x and the scales come from global memory.
    others = re.findall(r"ld\.global\.nc\.(?!L1)(v4\.)?[bu](\d+)", ptx)
    assert set(others) == {("", "16"), ("v4.", "32")} and others.count(("v4.", "32")) == 4 * 4
    assert "ld.local" not in ptx
