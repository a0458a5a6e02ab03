"""The exact kernels on 64-bit ARM, emulated: their own tests, with another way to build them."""

from collections.abc import Iterator

import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.vector import VectorUnit, vector_unit
from relaxlm.quantization.kv_cache import KV_FORMATS
from tests.compiler import (
    aarch64_emulation,
    test_cpu_attention,
    test_cpu_elementwise,
    test_cpu_matmul,
)

pytestmark = aarch64_emulation.needs_emulator

TARGET = aarch64_emulation.aarch64_target()


class Library:
    """Kernels by name, called with TVM's tensors, which are written in place."""

    def __init__(self, kernels: dict[str, tvm.tirx.PrimFunc], arch: str = "") -> None:
        self.program = aarch64_emulation.build(kernels)

    def __getitem__(self, name: str):
        def run(*tensors: tvm.runtime.Tensor) -> None:
            arrays = [np.array(tensor.numpy()) for tensor in tensors]
            self.program.run(name, *arrays)
            for tensor, array in zip(tensors, arrays, strict=True):
                tensor.copyfrom(array)

        return run


def build(kernel: tvm.tirx.PrimFunc, target: tvm.target.Target | None = None):
    return Library({"kernel": kernel})["kernel"]


@pytest.fixture(autouse=True)
def on_arm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(test_cpu_matmul, "build", Library)
    monkeypatch.setattr(test_cpu_matmul, "native_unit", lambda: vector_unit(TARGET))
    monkeypatch.setattr(test_cpu_elementwise, "build", build)
    monkeypatch.setattr(test_cpu_attention, "build", build)
    cached = (test_cpu_attention.build_append, test_cpu_attention.build_attend)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_vectors() -> None:
    assert vector_unit(TARGET) == VectorUnit(4, 32)


@pytest.mark.parametrize("name", ["4-bit-NK-float16", "3-bit-KN-float16"])
def test_products_with_quantized_weights(name: str) -> None:
    test_cpu_matmul.test_products_with_quantized_weights(test_cpu_matmul.FORMATS[name])


def test_products_with_plain_weights() -> None:
    test_cpu_matmul.test_products_with_plain_weights("bfloat16")


def test_norm() -> None:
    test_cpu_elementwise.test_norm(20, "float32", 3)


def test_silu_mul() -> None:
    test_cpu_elementwise.test_silu_mul(48, 3)


@pytest.mark.parametrize("format", ["float16", "float8_e4m3"])
def test_attention_over_pages(format: str) -> None:
    shape = AttentionShape(6, 2, head_dim=24, window=0, sinks=0, scale=0.21)
    batch = test_cpu_attention.PagedBatch(shape, KV_FORMATS[format], [1, 17, 40], [1, 1, 20])
    actual = batch.attend(target=TARGET)
    np.testing.assert_allclose(actual, batch.expected(), rtol=2e-5, atol=2e-6)
