"""Products of AMX's tiles against float64 NumPy, with both sides rounded to bfloat16."""

import ml_dtypes
import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels import cpu_amx
from relaxlm.compiler.kernels.builder import emit, length, tensor
from relaxlm.compiler.kernels.isa import NEEDS
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import missing_features
from tests.compiler.test_cpu_matmul import build

if MISSING := missing_features(NEEDS["amx"]):
    pytest.skip(f"this CPU lacks {', '.join(MISSING)}", allow_module_level=True)

# (outputs, inputs): less than a tile; rests of a panel, of a group, of a block of K; three panels.
SHAPES = [(16, 24), (35, 330), (96, 1056)]
# Less than a tile, the smallest number that comes here, a rest of a tile, two tasks.
ROWS = (3, 17, 50, 300)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


def matmul_kernel(matrix: StoredMatrix, gated: bool = False) -> tvm.tirx.PrimFunc:
    """(packed, *stored weight, out)."""

    def body() -> None:
        m = length("m")
        packed = tensor("packed", (m, cpu_amx.row_words(matrix.k)), "int32")
        weight = tensor("weight", matrix.word_shape, matrix.word_dtype)
        scale = tensor("scale", matrix.scale_shape, matrix.dtype)
        width = cpu_amx.row_words(matrix.n // 2) if gated else matrix.n
        out = tensor("out", (m, width), "int32" if gated else "float32")
        cpu_amx.emit_matmul(matrix, "amx", m, packed, weight, scale, out, "silu" if gated else None)

    return emit(body, cpu_amx.imports(matrix, "amx"))


def pack(kernel, x: np.ndarray) -> tvm.runtime.Tensor:
    # What the kernel leaves out must show: as bfloat16, these words are large.
    words = (len(x), cpu_amx.row_words(x.shape[1]))
    packed = tvm.runtime.tensor(np.full(words, 0x55555555, np.int32))
    kernel(tvm.runtime.tensor(x), packed)
    return packed


@pytest.mark.parametrize("k", [5, 64, 330])
def test_rows_are_packed(k: int) -> None:
    kernel = build({"p": cpu_amx.pack_kernel(k)})["p"]
    for m in (3, 40):
        x = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
        x[1, 0] = np.float32(1 + 2.0**-8)  # between two values; the even one is below
        packed = pack(kernel, x).numpy().view(ml_dtypes.bfloat16)
        padded = np.pad(x, ((0, 0), (0, -k % 32))).astype(ml_dtypes.bfloat16)
        for first in range(0, m, 16):
            rows = padded[first : first + 16]
            expected = rows.reshape(len(rows), -1, 32).swapaxes(0, 1)
            actual = packed[first : first + 16].reshape(-1)
            np.testing.assert_array_equal(actual[: expected.size], expected.reshape(-1))


@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f32_1", "q4bf16_1"])
def test_products(scheme: str) -> None:
    quant = get_scheme(scheme).linear
    assert quant is not None
    rng = np.random.default_rng(2)
    kernels = {}
    for n, k in SHAPES:
        kernels[f"m{n}"] = matmul_kernel(StoredMatrix(n, k, quant, quant.dtype))
        kernels[f"p{n}"] = cpu_amx.pack_kernel(k)
    library = build(kernels)
    for n, k in SHAPES:
        arrays = quant.quantize(rng.standard_normal((n, k)).astype(np.float32))
        weight = quant.dequantize(arrays, (n, k)).astype(np.float32)
        stored = [tvm.runtime.tensor(array) for array in arrays.values()]
        for m in ROWS:
            x = rng.standard_normal((m, k)).astype(np.float32)
            out = tvm.runtime.tensor(np.full((m, n), np.nan, np.float32))
            library[f"m{n}"](pack(library[f"p{n}"], x), *stored, out)
            check(out.numpy(), x, weight)


def check(actual: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """Exact but for the order of float32 sums, given what is rounded; which costs a little."""
    kept_x, kept_weight = bfloat16(x), bfloat16(weight)
    terms = np.abs(kept_x) @ np.abs(kept_weight).T
    assert (np.abs(actual - kept_x @ kept_weight.T) <= 1e-6 * terms).all()
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 7e-3


def test_matrices_that_are_multiplied() -> None:
    quant = get_scheme("q4f16_1").linear
    assert cpu_amx.supports(StoredMatrix(16, 5, quant, "float16"), "amx")
    assert not cpu_amx.supports(StoredMatrix(15, 64, quant, "float16"), "amx")
    assert not cpu_amx.supports(StoredMatrix(64, 64, quant, "float16"), "avx512")


def test_a_step_calls_nothing() -> None:
    """A named value, or a buffer of 1024 bytes, would be a call of the allocator at every pass."""
    matrix = StoredMatrix(96, 1056, get_scheme("q4f16_1").linear, "float16")
    assembly = build({"m": matmul_kernel(matrix)}).mod.inspect_source("asm")
    steps = assembly[assembly.index("tilezero") : assembly.index("tilerelease")]
    assert "tdpbf16ps" in steps
    assert "call" not in steps


def test_gated_products_are_written_for_the_next_matmul() -> None:
    n, k = 192, 1056  # three panels, of which a task takes all; two blocks of K
    quant = get_scheme("q4f16_1").linear
    matrix = StoredMatrix(n, k, quant, "float16")
    library = build(
        {
            "m": matmul_kernel(matrix, gated=True),
            "p": cpu_amx.pack_kernel(k),
            "q": cpu_amx.pack_kernel(n // 2),
        }
    )
    rng = np.random.default_rng(3)
    arrays = quant.quantize(rng.standard_normal((n, k)).astype(np.float32))
    weight = quant.dequantize(arrays, (n, k)).astype(np.float32)
    stored = [tvm.runtime.tensor(array) for array in arrays.values()]
    for m in ROWS:
        x = rng.standard_normal((m, k)).astype(np.float32) * 0.1
        out = tvm.runtime.tensor(np.full((m, cpu_amx.row_words(n // 2)), 0x55555555, np.int32))
        library["m"](pack(library["p"], x), *stored, out)
        gate, up = np.split(bfloat16(x) @ bfloat16(weight).T, 2, axis=1)
        expected = pack(library["q"], (gate / (1 + np.exp(-gate)) * up).astype(np.float32))
        found, wanted = (t.numpy().view(ml_dtypes.bfloat16) for t in (out, expected))
        np.testing.assert_allclose(
            found.astype(np.float64), wanted.astype(np.float64), rtol=2**-7, atol=1e-5
        )
    assert not cpu_amx.supports_gated(StoredMatrix(96 + 32, k, quant, "float16"), "avx512")
    assert not cpu_amx.supports_gated(StoredMatrix(96, k, quant, "float16"), "amx")
