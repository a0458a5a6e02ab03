"""Products of many rows in int8 against float64 NumPy."""

import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels import cpu_int8_gemm
from relaxlm.compiler.kernels.builder import emit, length, tensor
from relaxlm.compiler.kernels.isa import NEEDS
from relaxlm.compiler.kernels.packed import FEW, pack_kernel, row_words
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import missing_features
from tests.compiler.test_cpu_matmul import build
from tests.compiler.test_packed import pack, rounded

if MISSING := missing_features(NEEDS["avx512"]):
    pytest.skip(f"this CPU lacks {', '.join(MISSING)}", allow_module_level=True)

# (outputs, inputs): one vector of outputs; rests of a panel, of a square of words, and of a group.
SHAPES = [(16, 224), (35, 330), (96, 1120)]
# The smallest number that comes here, and rests of a tile.
ROWS = (FEW + 1, 42)


def matmul_kernel(matrix: StoredMatrix) -> tvm.tirx.PrimFunc:
    """(packed, *stored weight, out)."""

    def body() -> None:
        m = length("m")
        packed = tensor("packed", (m, row_words(matrix.k)), "int32")
        weight = tensor("weight", matrix.word_shape, matrix.word_dtype)
        scale = tensor("scale", matrix.scale_shape, matrix.dtype)
        out = tensor("out", (m, matrix.n), "float32")
        cpu_int8_gemm.emit_matmul(matrix, "avx512", m, packed, weight, scale, out)

    return emit(body, cpu_int8_gemm.imports(matrix, "avx512"))


@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f32_1", "q4bf16_1", "q8f16_1"])
def test_products(scheme: str) -> None:
    quant = get_scheme(scheme).linear
    assert quant is not None
    rng = np.random.default_rng(2)
    kernels = {}
    for n, k in SHAPES:
        kernels[f"m{n}"] = matmul_kernel(StoredMatrix(n, k, quant, quant.dtype))
        kernels[f"p{n}"] = pack_kernel(k, "avx512")
    library = build(kernels)
    for n, k in SHAPES:
        arrays = quant.quantize(rng.standard_normal((n, k)).astype(np.float32))
        weight = np.pad(quant.dequantize(arrays, (n, k)), ((0, 0), (0, -k % 32)))
        stored = [tvm.runtime.tensor(array) for array in arrays.values()]
        for m in ROWS:
            x = rng.standard_normal((m, k)).astype(np.float32)
            packed = tvm.runtime.tensor(pack(library[f"p{n}"], x))
            out = tvm.runtime.tensor(np.full((m, n), np.nan, np.float32))
            library[f"m{n}"](packed, *stored, out)
            codes, scales = rounded(x)
            kept = (codes * scales[..., None]).reshape(m, -1).astype(np.float64)
            # Exact but for the order of float32 sums, given the rounded activations ...
            terms = np.abs(kept) @ np.abs(weight).T
            assert (np.abs(out.numpy() - kept @ weight.T) <= 1e-6 * terms).all()
            # ... which are what the error comes from.
            expected = np.pad(x, ((0, 0), (0, -k % 32))).astype(np.float64) @ weight.T
            error = np.linalg.norm(out.numpy() - expected) / np.linalg.norm(expected)
            assert 1e-3 < error < 7e-3


def test_matrices_that_are_multiplied() -> None:
    quant, three = get_scheme("q4f16_1").linear, get_scheme("q3f16_1").linear
    assert cpu_int8_gemm.supports(StoredMatrix(16, 128, quant, "float16"), "avx512")
    assert not cpu_int8_gemm.supports(StoredMatrix(16, 96, quant, "float16"), "avx512")
    assert not cpu_int8_gemm.supports(StoredMatrix(15, 128, quant, "float16"), "avx512")
    assert not cpu_int8_gemm.supports(StoredMatrix(64, 640, three, "float16"), "avx512")
    assert not cpu_int8_gemm.supports(StoredMatrix(64, 128, quant, "float16"), "avx2")
