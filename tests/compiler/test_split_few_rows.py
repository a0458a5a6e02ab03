"""A step of few tokens runs kernels of its own, and nothing else is different."""

import pytest
import tvm
from tvm import relax
from tvm_ffi import structural_equal

from relaxlm.compiler.passes import split_few_rows
from relaxlm.compiler.passes.split_few_rows import UPPER_BOUND, SplitFewRows
from relaxlm.compiler.target import resolve_device


def module(rows: int | None) -> tvm.IRModule:
    """y = silu(x @ w), fused as the pipeline leaves it."""
    builder = relax.BlockBuilder()
    n = rows or tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n, 64), "float32"))
    w = relax.Var("w", relax.TensorType((96, 64), "float32"))
    with builder.function("forward", [x, w], {"num_input": 1}):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, relax.op.permute_dims(w)))
            out = builder.emit_output(builder.emit(relax.op.nn.silu(product)))
        builder.emit_func_output(out)
    passes = [
        relax.transform.FuseTransposeMatmul(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    with resolve_device("webgpu").tvm_target():
        return tvm.transform.Sequential(passes)(builder.finalize())


def split(mod: tvm.IRModule) -> tvm.IRModule:
    with resolve_device("webgpu").tvm_target():
        return SplitFewRows("forward")(mod)


def test_a_step_becomes_two_and_a_choice() -> None:
    result = split(module(None))
    names = {name.name_hint for name, _ in result.functions_items()}
    few, many = (f"forward{part}" for part in split_few_rows.PARTS)
    assert {"forward", few, many} <= names
    assert [name for name in names if name.endswith("_few") and name != few]
    assert dict(result[few].attrs[UPPER_BOUND]) == {"n": split_few_rows.FEW}
    assert int(result["forward"].attrs["num_input"]) == 1
    text = result["forward"].script()
    assert f"if n <= {split_few_rows.FEW}:" in text or f"if n == {split_few_rows.FEW}:" in text


@pytest.mark.parametrize("rows", [3, None])
def test_both_parts_are_functions_that_can_be_checked(rows: int | None) -> None:
    relax.analysis.well_formed(split(module(rows)))  # raises if not


def test_without_matrices_nothing_is_split() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((tvm.tirx.Var("n", "int64"), 64), "float32"))
    with builder.function("forward", [x]):
        builder.emit_func_output(builder.emit(relax.op.nn.silu(x)))
    mod = relax.transform.LegalizeOps()(builder.finalize())
    before = tvm.IRModule(dict(mod.functions_items()))
    assert structural_equal(split(mod), before)
