"""What stands between the matrices of a layer on GPUs: few kernels, and none that TVM schedules.

Kernels against NumPy: test_cuda_rows.py, test_cuda_rope.py, and test_gpu_... of the same names;
models: test_cuda_model_logits.py and test_gpu_models.py.
"""

import pytest
import tvm
from tvm import relax, tirx
from tvm_ffi import structural_equal

from relaxlm.compiler.kernels import gpu_rope, gpu_rows
from relaxlm.compiler.kernels.cuda_rope import rope_append_kernel
from relaxlm.compiler.kernels.cuda_rows import row_kernel
from relaxlm.compiler.passes.fuse_elementwise_gpu import FuseElementwiseGPU
from relaxlm.compiler.passes.fuse_rope import FuseRope
from relaxlm.compiler.target import resolve_device
from tests.compiler.cuda_emulation import TARGET
from tests.compiler.test_fuse_elementwise_cpu import kernels
from tests.compiler.test_passes import lowered, lowering
from tests.compiler.test_take_rows_early import KINDS
from tests.expression import bindings, written_out
from tests.models.parity import tiny_config

LLAMA = ["norm", "matmul", "rope_append", "paged_attention", "matmul", "norm", "gated_matmul"]
LLAMA += ["matmul"]
LAYERS = {
    "llama": LLAMA,
    "qwen3": LLAMA,  # a norm on every head of q and k
    "gemma2": [
        *("matmul", "rope_append", "paged_attention", "matmul", "norm_add_norm", "gated_matmul"),
        *("matmul", "norm_add_norm"),
    ],
    "olmo2": [
        *("matmul", "norm", "norm", "rope_append", "paged_attention", "matmul", "norm_add"),
        *("gated_matmul", "matmul", "norm_add"),
    ],
    "cohere": [
        *("matmul", "rope_append", "paged_attention", "matmul", "matmul", "silu_mul", "matmul"),
        *("matmul", "add_norm"),
    ],
}

# Per kind of kernels: the target, and what gives kernels of rows and of rotations.
FUSED_BY = {
    "cuda": (lambda: tvm.target.Target(TARGET), row_kernel, rope_append_kernel),
    "gpu": (
        lambda: resolve_device("webgpu").tvm_target(),
        gpu_rows.row_kernel,
        gpu_rope.rope_append_kernel,
    ),
}
CASES = [(model_type, kind) for kind in FUSED_BY for model_type in LAYERS]


@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_a_layer(model_type: str, kind: str) -> None:
    raw = tiny_config(model_type, num_hidden_layers=3, **KINDS.get(model_type, {}))
    plan = lowering(raw, "q4f16_1", "float16" if kind == "gpu" else "fp8", kind)
    target, rows, rope = FUSED_BY[kind]
    module = lowered(plan, "FuseElementwiseGPU", target())
    tables = ("rope_cos", "rope_sin", "view_of_queries")
    called = [name for name in kernels(module["hidden_states"]) if name not in tables]
    expected = LAYERS[model_type]
    attention = [i for i, name in enumerate(called) if name == "paged_attention"]
    first = attention[1] - expected.index("paged_attention")
    assert called[first : first + attention[2] - attention[1]] == expected
    again = FuseRope(plan.kv_format, rope, "float16", joins_tables=kind == "gpu")
    for fuse in (again, FuseElementwiseGPU(rows, "float16")):
        assert structural_equal(fuse(module), module)


def test_sines_and_cosines_are_brought_together_once_for_all_layers() -> None:
    plan = lowering(tiny_config("llama", num_hidden_layers=3), "q4f16_1", "float16", "gpu")
    text = written_out(lowered(plan, "FuseRope", FUSED_BY["gpu"][0]())["hidden_states"])
    assert "concat((@rope_cos(" in text
    step = lowered(plan, "FuseElementwiseGPU", FUSED_BY["gpu"][0]())["hidden_states"]
    assert sum("R.concat" in str(value) for value in bindings(step).values()) == 1


def test_rows_with_too_many_inputs_for_a_kernel_are_left_to_tvm() -> None:
    module = sum_of_eight()
    fused = FuseElementwiseGPU(gpu_rows.row_kernel, "float16")(module)
    assert structural_equal(fused, module)
    assert "add_mul" in written_out(FuseElementwiseGPU(row_kernel, "float16")(module)["forward"])


def sum_of_eight() -> tvm.IRModule:
    builder = relax.BlockBuilder()
    ty = relax.TensorType((tirx.Var("n", "int64"), 6), "float16")
    given = [relax.Var(f"x{i}", ty) for i in range(8)]
    with builder.function("forward", given):
        with builder.dataflow():
            total = given[0]
            for one in given[1:]:
                total = builder.emit(relax.op.add(total, one))
            out = builder.emit_output(relax.op.multiply(total, given[0]))
        builder.emit_func_output(out)
    return builder.finalize()
