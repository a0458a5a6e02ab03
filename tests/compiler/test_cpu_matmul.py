"""The CPU matmul kernels against float64 NumPy, for every format, on shapes that fit nothing."""

import re

import ml_dtypes
import numpy as np
import pytest
import tvm

from relaxlm.compiler.build import FOR_GPUS, UNUSED_ON_CPU
from relaxlm.compiler.kernels.cpu_matmul import matmul_kernel
from relaxlm.compiler.kernels.vector import VectorUnit, vector_unit
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.groupwise import GroupQuant
from relaxlm.quantization.schemes import SCHEMES
from relaxlm.runtime.cpu import missing_features

FORMATS = {
    f"{quant.bits}-bit-{quant.layout}-{quant.dtype}": quant
    for scheme in SCHEMES.values()
    for quant in (scheme.linear, scheme.embedding)
    if quant is not None
}
# Fewer outputs than a vector of lanes, and one more than two vectors; rows shorter than a group or
# a vector, with a rest of either, and longer than a panel.
SHAPES = [(1, 24), (7, 50), (35, 330)]
# One kernel each for a row of x, for some, and for a few; the last for several tiles, and a rest.
ROWS = (1, 3, 7, 17)
NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


# What the widest vectors of the CPU are: of this one, and of older ones.
UNITS = {
    "x86-64-v2": VectorUnit(4, 16),
    "x86-64-v3": VectorUnit(8, 16),
    "x86-64-v4": VectorUnit(16, 32),
}


def native_unit() -> VectorUnit:
    return vector_unit(resolve_device("cpu").tvm_target())


def build(kernels: dict[str, tvm.tirx.PrimFunc], arch: str = "native") -> tvm.runtime.Executable:
    """Compile kernels as `relaxlm compile` does."""
    functions = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    with tvm.transform.PassContext(disabled_pass=[*UNUSED_ON_CPU, *FOR_GPUS]):
        return tvm.compile(tvm.IRModule(functions), target=resolve_device("cpu", arch).tvm_target())


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
    unit = native_unit()
    kernels = {
        f"m{n}_{k}": matmul_kernel((n, k), quant, quant.dtype, "float32", unit) for n, k in SHAPES
    }
    library = build(kernels)
    for n, k in SHAPES:
        weight = rng.standard_normal((n, k)).astype(np.float32)
        arrays = quant.quantize(weight)
        for m in ROWS:
            x = rng.standard_normal((m, k)).astype(np.float32)
            actual = multiply(library[f"m{n}_{k}"], x, list(arrays.values()), n, "float32")
            check(actual, x, quant.dequantize(arrays, (n, k)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_with_plain_weights(dtype: str) -> None:
    rng = np.random.default_rng(5)
    unit = native_unit()
    kernels = {f"m{n}_{k}": matmul_kernel((n, k), None, dtype, "float32", unit) for n, k in SHAPES}
    library = build(kernels)
    for n, k in SHAPES:
        weight = rng.standard_normal((n, k)).astype(NUMPY.get(dtype, dtype))
        for m in ROWS:
            x = rng.standard_normal((m, k)).astype(np.float32)
            actual = multiply(library[f"m{n}_{k}"], x, [weight], n, "float32")
            check(actual, x, weight.astype(np.float64))


@pytest.mark.parametrize("quant", [FORMATS["4-bit-NK-float16"], FORMATS["4-bit-KN-float16"], None])
def test_results_in_a_narrow_dtype_are_summed_in_float32(quant: GroupQuant | None) -> None:
    rng = np.random.default_rng(6)
    n, k = 9, 320
    library = build({"m": matmul_kernel((n, k), quant, "float16", "float16", native_unit())})
    weight = rng.standard_normal((n, k)).astype(np.float16)
    arrays = quant.quantize(weight) if quant else {"weight": weight}
    kept = quant.dequantize(arrays, (n, k)) if quant else weight
    for m in ROWS:
        x = rng.standard_normal((m, k)).astype(np.float32)
        check(multiply(library["m"], x, list(arrays.values()), n, "float16"), x, kept, 2**-11)


@pytest.mark.parametrize("arch", UNITS)
@pytest.mark.parametrize("quant", [FORMATS["4-bit-NK-float16"], FORMATS["4-bit-KN-float16"], None])
def test_kernels_for_narrower_vectors(arch: str, quant: GroupQuant | None) -> None:
    device = resolve_device("cpu", arch)
    if missing := missing_features(device.cpu_features):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    assert vector_unit(device.tvm_target()) == UNITS[arch]
    rng = np.random.default_rng(7)
    n, k = 35, 330
    library = build({"m": matmul_kernel((n, k), quant, "float16", "float32", UNITS[arch])}, arch)
    weight = rng.standard_normal((n, k)).astype(np.float16)
    arrays = quant.quantize(weight) if quant else {"weight": weight}
    kept = quant.dequantize(arrays, (n, k)) if quant else weight
    for m in ROWS:
        x = rng.standard_normal((m, k)).astype(np.float32)
        check(multiply(library["m"], x, list(arrays.values()), n, "float32"), x, kept)


def inner_loops(assembly: str) -> list[str]:
    """The loops of x86 assembly that hold no label but their own, and multiply and add."""
    loops = re.findall(r"^(\.LBB\w+):\n((?:(?!\.LBB).*\n)*?)\s+j\w+\s+\1\n", assembly, re.MULTILINE)
    return [body for _, body in loops if "fmadd" in body]


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_inner_loops_call_nothing(dtype: str | None) -> None:
    """A named value, or a buffer of 1024 bytes, would be a call of the allocator at every pass."""
    device = resolve_device("cpu")
    if "fma" not in device.cpu_features:
        pytest.skip("this CPU does not multiply and add in one instruction")
    quant = FORMATS["4-bit-NK-float16"] if dtype is None else None
    kernel = matmul_kernel((96, 512), quant, dtype or "float16", "float32", native_unit())
    loops = inner_loops(build({"m": kernel}).mod.inspect_source("asm"))
    assert len(loops) >= 4  # gemv for 1, 4 and 8 rows of x; gemm
    assert not [body for body in loops if "call" in body]
