"""Sums of matrix products that TVM's kernels compute are float32."""

from tvm_ffi import structural_equal

from relaxlm.compiler.passes.sum_in_float32 import SumInFloat32
from tests.expression import written_out
from tests.quantization.test_transform import quantized


def test_sums_of_float16_are_float32_and_rounded_once() -> None:
    once = SumInFloat32()(quantized("q4f16_1", "float16"))
    text = written_out(once["forward"])
    assert text.count("astype(matmul(") == text.count("matmul(") == 2
    assert structural_equal(SumInFloat32()(once), once)
    mod = quantized("q4f16_1", "float32")
    assert structural_equal(SumInFloat32()(mod), mod)
