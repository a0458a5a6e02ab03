"""Matmuls with int8 activations on CPUs without AVX-512, against NumPy; those of ARM emulated."""

from collections.abc import Callable

import numpy as np
import pytest
import tvm

from relaxlm.compiler.build import FOR_GPUS, UNUSED_ON_CPU
from relaxlm.compiler.kernels import cpu_narrow
from relaxlm.compiler.kernels.builder import emit, length, tensor
from relaxlm.compiler.kernels.isa import NEEDS, Isa, dot_products
from relaxlm.compiler.kernels.packed import pack_kernel, row_words
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import missing_features
from tests.compiler import aarch64_emulation
from tests.compiler.test_packed import rounded

Run = Callable[..., None]

X86: dict[Isa, tvm.target.Target] = {
    "avx2": tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"}),
    "avxvnni": tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+avxvnni"]}),
}
ARM: dict[Isa, tuple[str, ...]] = {"dotprod": ("dotprod",), "i8mm": ("dotprod", "i8mm")}
# Rows of W, and of x, that no tile divides; a step, a vector and a group of W left over; a second
# block of K; fewer rows or groups than lanes.
REST, LONG, NARROW, LEAST = (35, 330), (17, 1056), (5, 96), (1, 32)
# One, two, and tiles of eight, four, two and one.
ROWS = (1, 2, 3, 15)


def kernels(shapes: list[tuple[int, int]], scheme: str, isa: Isa) -> dict[str, tvm.tirx.PrimFunc]:
    """By name: "multiply<K>" and "pack<K>"."""
    quant = get_scheme(scheme).linear
    assert quant is not None
    found = {}
    for n, k in shapes:
        matrix = StoredMatrix(n, k, quant, quant.dtype)
        assert cpu_narrow.supports(matrix, isa)

        def body(matrix: StoredMatrix = matrix) -> None:
            m = length("m")
            x = tensor("x", (m, row_words(matrix.k)), "int32")
            weight = tensor("weight", matrix.word_shape, matrix.word_dtype)
            scale = tensor("scale", matrix.scale_shape, matrix.dtype)
            out = tensor("out", (m, matrix.n), "float32")
            cpu_narrow.emit_matmul(matrix, isa, m, x, weight, scale, out)

        found[f"multiply{k}"] = emit(body, cpu_narrow.imports(matrix, isa))
        found[f"pack{k}"] = pack_kernel(k, isa)
    return found


def native(functions: dict[str, tvm.tirx.PrimFunc], isa: Isa) -> tuple[Run, str]:
    """What calls a kernel by name with NumPy arrays, written in place, and the assembly."""
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in functions.items()}
    with tvm.transform.PassContext(disabled_pass=[*UNUSED_ON_CPU, *FOR_GPUS]):
        library = tvm.compile(tvm.IRModule(named), target=X86[isa])

    def run(name: str, *arrays: np.ndarray) -> None:
        copies = [tvm.runtime.tensor(array) for array in arrays]
        library[name](*copies)
        for array, copy in zip(arrays, copies, strict=True):
            array[...] = copy.numpy()

    return run, library.mod.inspect_source("asm")


def check_products(run: Run, shapes: list[tuple[int, int]], scheme: str) -> None:
    quant = get_scheme(scheme).linear
    assert quant is not None
    rng = np.random.default_rng(2)
    for n, k in shapes:
        arrays = quant.quantize(rng.standard_normal((n, k)).astype(np.float32))
        weight = quant.dequantize(arrays, (n, k)).astype(np.float64)
        for m in ROWS:
            x = rng.standard_normal((m, k)).astype(np.float32)
            packed = np.zeros((m, row_words(k)), np.int32)
            run(f"pack{k}", x, packed)
            actual = np.full((m, n), np.nan, np.float32)
            run(f"multiply{k}", packed, *arrays.values(), actual)
            codes, scales = rounded(x)
            kept = (codes * scales[..., None]).reshape(m, -1)[:, :k].astype(np.float64)
            # Exact but for the order of float32 sums, given the rounded activations ...
            terms = np.abs(kept) @ np.abs(weight).T
            assert (np.abs(actual - kept @ weight.T) <= 1e-6 * terms).all(), (n, k, m)
            # ... which are what the error comes from.
            expected = x.astype(np.float64) @ weight.T
            if actual.size > 99:
                error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
                assert error < 1e-2, (n, k, m)


@pytest.mark.parametrize(
    ("scheme", "shapes"),
    [("q4f16_1", [REST, LONG, LEAST]), ("q8f16_1", [REST, LEAST]), ("q4bf16_1", [REST])],
)
@pytest.mark.parametrize("isa", X86)
def test_products_on_x86(isa: Isa, scheme: str, shapes: list[tuple[int, int]]) -> None:
    if missing := missing_features(NEEDS[isa]):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    assert dot_products(X86[isa]) == isa
    run, _ = native(kernels(shapes, scheme, isa), isa)
    check_products(run, shapes, scheme)


@aarch64_emulation.needs_emulator
@pytest.mark.parametrize(
    ("scheme", "shapes"),
    [("q4f16_1", [LONG, NARROW]), ("q8f16_1", [REST])],
)
@pytest.mark.parametrize("isa", ARM)
def test_products_on_arm(isa: Isa, scheme: str, shapes: list[tuple[int, int]]) -> None:
    assert dot_products(aarch64_emulation.aarch64_target(ARM[isa])) == isa
    program = aarch64_emulation.build(kernels(shapes, scheme, isa), ARM[isa])
    check_products(program.run, shapes, scheme)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_do_not_overflow(bits: int) -> None:
    """Sums of 16 bits: codes at their largest against activations all of one sign."""
    if missing := missing_features(NEEDS["avx2"]):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    n, k, scheme = 8, 64, f"q{bits}f16_1"
    run, _ = native(kernels([(n, k)], scheme, "avx2"), "avx2")
    zero = 2 ** (bits - 1) - 1
    for byte in (0x00, 0xFF):
        weight = np.full((n, k * bits // 32), byte * 0x01010101, np.uint32)
        scale = np.ones((n, 2), np.float16)
        for m in (1, 5):
            x = np.full((m, k), -127, np.float32)
            packed, out = np.zeros((m, row_words(k)), np.int32), np.zeros((m, n), np.float32)
            run(f"pack{k}", x, packed)
            run(f"multiply{k}", packed, weight, scale, out)
            code = byte & (2**bits - 1)
            np.testing.assert_allclose(out, -127 * k * (code - zero), rtol=1e-6)


@pytest.mark.parametrize(
    ("isa", "has", "lacks"),
    [("avx2", "vpmaddubsw", "vpdpbusd"), ("avxvnni", "vpdpbusd", "vpmaddubsw")],
)
def test_instructions_of_x86(isa: Isa, has: str, lacks: str) -> None:
    multiply = {"multiply512": kernels([(64, 512)], "q4f16_1", isa)["multiply512"]}
    assembly = native(multiply, isa)[1]
    assert has in assembly and lacks not in assembly and "zmm" not in assembly


@pytest.mark.parametrize(("isa", "has"), [("dotprod", ["sdot"]), ("i8mm", ["sdot", "smmla"])])
def test_instructions_of_arm(isa: Isa, has: list[str]) -> None:
    multiply = kernels([(64, 512)], "q4f16_1", isa)["multiply512"]
    named = tvm.IRModule({"multiply": multiply.with_attr("global_symbol", "multiply")})
    target = aarch64_emulation.aarch64_target(ARM[isa])
    assembly = tvm.compile(named, target=target).mod.inspect_source("asm")
    assert all(name in assembly for name in has)
