"""The CPU matmul kernels against float64 NumPy, for every format, on shapes that fit nothing."""

import ml_dtypes
import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels.cpu_matmul import matmul_kernel
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.groupwise import GroupQuant
from relaxlm.quantization.schemes import SCHEMES

FORMATS = {
    f"{quant.bits}-bit-{quant.layout}-{quant.dtype}": quant
    for scheme in SCHEMES.values()
    for quant in (scheme.linear, scheme.embedding)
    if quant is not None
}
# Fewer outputs than a block of rows or a vector of lanes, one more than a block, and several
# blocks; rows shorter than a vector, shorter than a group, and with a rest of either.
SHAPES = [(1, 24), (5, 50), (7, 8), (8, 160), (9, 33), (33, 72)]
NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


def build(kernels: dict[str, tvm.tirx.PrimFunc]) -> tvm.runtime.Executable:
    """Compile kernels for the machine at hand, as `relaxlm compile` does."""
    functions = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    return tvm.compile(tvm.IRModule(functions), target=resolve_device("cpu").tvm_target())


def multiply(kernel, x: np.ndarray, stored: list[np.ndarray], n: int, out_dtype: str) -> np.ndarray:
    # An output that the kernel leaves out must show.
    out = tvm.runtime.tensor(np.full((len(x), n), np.nan, NUMPY.get(out_dtype, out_dtype)))
    kernel(*(tvm.runtime.tensor(array) for array in (x, *stored)), out)
    return out.numpy()


def check(actual: np.ndarray, x: np.ndarray, weight: np.ndarray, rounding: float = 0.0) -> None:
    """Compare with the product in float64.

    Args:
        weight: [N, K], what the stored weight stands for.
        rounding: relative error of the dtype of `actual`.
    """
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    expected, terms = x @ weight.T, np.abs(x) @ np.abs(weight).T
    # A sum in float32 is as exact as its terms are large, however small it is itself.
    bound = 4e-7 * terms + rounding * np.abs(expected) + 1e-30
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= bound).all(), f"{(error / bound).max()} times what float32 allows"


@pytest.mark.parametrize("quant", FORMATS.values(), ids=FORMATS)
def test_products_with_quantized_weights(quant: GroupQuant) -> None:
    rng = np.random.default_rng(4)
    kernels = {f"m{n}_{k}": matmul_kernel((n, k), quant, quant.dtype, "float32") for n, k in SHAPES}
    library = build(kernels)
    for n, k in SHAPES:
        weight = rng.standard_normal((n, k)).astype(np.float32)
        arrays = quant.quantize(weight)
        for m in (1, 3, 17):
            x = rng.standard_normal((m, k)).astype(np.float32)
            actual = multiply(library[f"m{n}_{k}"], x, list(arrays.values()), n, "float32")
            check(actual, x, quant.dequantize(arrays, (n, k)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_with_plain_weights(dtype: str) -> None:
    rng = np.random.default_rng(5)
    kernels = {f"m{n}_{k}": matmul_kernel((n, k), None, dtype, "float32") for n, k in SHAPES}
    library = build(kernels)
    for n, k in SHAPES:
        weight = rng.standard_normal((n, k)).astype(NUMPY.get(dtype, dtype))
        for m in (1, 3, 17):
            x = rng.standard_normal((m, k)).astype(np.float32)
            actual = multiply(library[f"m{n}_{k}"], x, [weight], n, "float32")
            check(actual, x, weight.astype(np.float64))


@pytest.mark.parametrize("quant", [FORMATS["4-bit-NK-float16"], FORMATS["4-bit-KN-float16"], None])
def test_results_in_a_narrow_dtype_are_summed_in_float32(quant: GroupQuant | None) -> None:
    rng = np.random.default_rng(6)
    n, k = 9, 320
    library = build({"m": matmul_kernel((n, k), quant, "float16", "float16")})
    weight = rng.standard_normal((n, k)).astype(np.float16)
    x = rng.standard_normal((3, k)).astype(np.float32)
    arrays = quant.quantize(weight) if quant else {"weight": weight}
    kept = quant.dequantize(arrays, (n, k)) if quant else weight
    check(multiply(library["m"], x, list(arrays.values()), n, "float16"), x, kept, 2**-11)
