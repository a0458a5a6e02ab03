"""Weights are read as they are stored by the matmul itself, whose sums are float32."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm_ffi import structural_equal

from relaxlm.compiler.passes.fuse_dequantize_matmul import FuseDequantizeMatmul
from relaxlm.compiler.passes.sum_in_float32 import SumInFloat32
from relaxlm.quantization.schemes import get_scheme
from tests.expression import written_out
from tests.quantization.test_transform import SPECS, quantized, run

RUN = tvm.transform.Sequential


def fused(dtype: str) -> tvm.IRModule:
    """Matrices of q4f16_1, as the pipeline has them before the pass."""
    passes = [
        relax.transform.FuseTransposeMatmul(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    with tvm.target.Target({"kind": "llvm"}):
        return RUN(passes)(quantized("q4f16_1", dtype))


def finished(mod: tvm.IRModule) -> tvm.IRModule:
    return RUN([relax.transform.FuseTIR(), relax.transform.DeadCodeElimination()])(mod)


def test_the_kernel_of_a_matmul_takes_what_is_stored() -> None:
    before = fused("float32")
    assert "@fused_NT_matmul_cast_add(@take(" in written_out(before["forward"])
    assert "@dequantize(up.q_weight, up.q_scale)" in written_out(before["forward"])
    after = finished(FuseDequantizeMatmul()(before))
    text = written_out(after["forward"])
    assert "up.q_weight, up.q_scale" in text
    # What is no matmul still has its table whole.
    assert text.count("@dequantize(") == text.count("@take(@dequantize(table.q_weight, table.q_sc")
    assert "@dequantize_fused_NT_matmul_cast_add(" in text and "@dequantize_NT_matmul(" in text


def test_it_computes_the_same() -> None:
    rng = np.random.default_rng(0)
    params: list[np.ndarray] = []
    for spec in SPECS:
        quant = get_scheme("q4f16_1").for_role(spec.role)
        value = rng.standard_normal(spec.shape).astype("float32")
        params += quant.quantize(value).values() if quant else [value.astype("float16")]
    before = fused("float32")
    ids = np.array([3, 0, 10, 3], "int32")
    expected = run(before, ids, params)
    found = run(finished(FuseDequantizeMatmul()(before)), ids, params)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize(
    "step", [FuseDequantizeMatmul(), SumInFloat32()], ids=lambda p: p.info.name
)
def test_a_second_run_changes_nothing(step: tvm.transform.Pass) -> None:
    mod = quantized("q4f16_1", "float16") if step.info.name == "SumInFloat32" else fused("float16")
    once = step(mod)
    if step.info.name == "FuseDequantizeMatmul":
        once = finished(once)
    assert not structural_equal(once, mod)
    assert structural_equal(step(once), once)


def test_sums_of_float16_are_float32_and_rounded_once() -> None:
    text = written_out(SumInFloat32()(quantized("q4f16_1", "float16"))["forward"])
    assert text.count("astype(matmul(") == text.count("matmul(") == 2
    mod = quantized("q4f16_1", "float32")
    assert structural_equal(SumInFloat32()(mod), mod)
