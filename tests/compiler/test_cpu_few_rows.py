"""Matmuls with few rows of int8 activations against float64 NumPy."""

import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels import cpu_few_rows
from relaxlm.compiler.kernels.builder import emit, length, tensor
from relaxlm.compiler.kernels.isa import NEEDS, Isa
from relaxlm.compiler.kernels.packed import pack_kernel, row_words
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import missing_features
from tests.compiler.test_cpu_matmul import build, inner_loops
from tests.compiler.test_packed import rounded

# (outputs, inputs): whole lines of 128, with rests of 16 rows and of 64; a rest of one group of
# four, and of elements; of three groups, and one row; a row shorter than a line; one tile.
SHAPES = [(72, 256), (7, 128 + 31), (1, 224), (13, 40), (16, 128)]
ROWS = (1, 2, 3, 5, 11, 16)


def require(isa: Isa) -> None:
    if missing := missing_features(NEEDS[isa]):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")


def matmul_kernel(matrix: StoredMatrix, isa: Isa) -> tvm.tirx.PrimFunc:
    """(packed, weight, scale, out)"""

    def body() -> None:
        m = length("m")
        packed = tensor("packed", (m, row_words(matrix.k)), "int32")
        weight = tensor("weight", matrix.word_shape, "uint32")
        scale = tensor("scale", matrix.scale_shape, matrix.dtype)
        out = tensor("out", (m, matrix.n), "float32")
        cpu_few_rows.emit_matmul(matrix, isa, m, packed, weight, scale, out)

    return emit(body, cpu_few_rows.imports(matrix, isa))


def at_the_end(array: np.ndarray) -> tvm.runtime.Tensor:
    """A copy at an address that is a multiple of 64, followed by what would spoil any sum."""
    room = np.full(array.nbytes + 4096, 0xFF, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(f"u{array.itemsize}").reshape(array.shape)
    copy[...] = array.view(copy.dtype)
    return tvm.runtime.from_dlpack(copy)._create_view(array.shape, str(array.dtype))


@pytest.mark.parametrize(
    ("isa", "scheme"),
    [("avx512", "q4f16_1"), ("avx512", "q4f32_1"), ("avx512", "q4bf16_1"), ("amx", "q4f16_1")],
)
def test_products_with_rounded_activations(isa: Isa, scheme: str) -> None:
    require(isa)
    quant = get_scheme(scheme).linear
    assert quant is not None
    rng = np.random.default_rng(2)
    kernels = {}
    for n, k in SHAPES:
        matrix = StoredMatrix(n, k, quant, quant.dtype)
        assert cpu_few_rows.supports(matrix, isa)
        kernels[f"m{n}"], kernels[f"p{n}"] = matmul_kernel(matrix, isa), pack_kernel(k, isa)
    library = build(kernels)
    for n, k in SHAPES:
        arrays = quant.quantize(rng.standard_normal((n, k)).astype(np.float32))
        weight = quant.dequantize(arrays, (n, k))
        stored = [at_the_end(array) for array in arrays.values()]
        for m in ROWS:
            x = rng.standard_normal((m, k)).astype(np.float32)
            packed = tvm.runtime.tensor(np.full((m, row_words(k)), 0x55555555, np.int32))
            library[f"p{n}"](tvm.runtime.tensor(x), packed)
            out = tvm.runtime.tensor(np.full((m, n), np.nan, np.float32))
            library[f"m{n}"](packed, *stored, out)
            actual = out.numpy()
            codes, scales = rounded(x)
            kept = (codes * scales[..., None]).reshape(m, -1)[:, :k]
            # Exact but for the order of float32 sums, given the rounded activations ...
            terms = np.abs(kept) @ np.abs(weight).T
            assert (np.abs(actual - kept.astype(np.float64) @ weight.T) <= 1e-6 * terms).all()
            # ... which are what the error comes from.
            expected = x.astype(np.float64) @ weight.T
            error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
            assert m * n < 20 or error < 1e-2


@pytest.mark.parametrize("isa", ["avx512", "amx"])
def test_inner_loops_call_nothing(isa: Isa) -> None:
    """A named value, or a buffer of 1024 bytes, would be a call of the allocator at every pass."""
    require(isa)
    matrix = StoredMatrix(96, 512, get_scheme("q4f16_1").linear, "float16")
    assembly = build({"m": matmul_kernel(matrix, isa)}).mod.inspect_source("asm")
    loops = inner_loops(assembly)
    assert len(loops) >= 4  # 1, 2, 4 and 8 rows of x
    assert not [body for body in loops if "call" in body]
    # Only AMX's sums are too large for the stack, and those of a task, 64 rows of W, share room.
    assert ("AllocWorkspace@GOT" in assembly) == (isa == "amx")


@pytest.mark.parametrize("scheme", ["q4f16_0", "q3f16_1", "q8f16_1"])
def test_other_formats_are_left_to_other_kernels(scheme: str) -> None:
    quant = get_scheme(scheme).linear
    assert quant is not None
    for isa in ("amx", "avx512"):
        assert not cpu_few_rows.supports(StoredMatrix(8, 256, quant, "float16"), isa)
    quant = get_scheme("q4f16_1").linear
    assert not cpu_few_rows.supports(StoredMatrix(8, 256, quant, "float16"), "amx")  # no tile
    assert not cpu_few_rows.supports(StoredMatrix(8, 256, quant, "float16"), "avx2")
