"""What stands between the matrices of a layer on GPUs: few kernels, and none that TVM schedules.

Kernels against NumPy: test_cuda_rows.py and test_cuda_rope.py; models: test_cuda_model_logits.py.
"""

import pytest
import tvm
from tvm_ffi import structural_equal

from relaxlm.compiler.kernels.cuda_rope import rope_append_kernel
from relaxlm.compiler.passes.fuse_elementwise_cuda import FuseElementwiseCUDA
from relaxlm.compiler.passes.fuse_rope import FuseRope
from tests.compiler.cuda_emulation import TARGET
from tests.compiler.test_fuse_elementwise_cpu import kernels
from tests.compiler.test_passes import lowered, lowering
from tests.compiler.test_take_rows_early import KINDS
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


@pytest.mark.parametrize("model_type", LAYERS)
def test_a_layer(model_type: str) -> None:
    raw = tiny_config(model_type, num_hidden_layers=3, **KINDS.get(model_type, {}))
    plan = lowering(raw, "q4f16_1", "fp8", "cuda")
    target = tvm.target.Target(TARGET)
    module = lowered(plan, "FuseElementwiseCUDA", target)
    tables = ("rope_cos", "rope_sin")
    called = [name for name in kernels(module["hidden_states"]) if name not in tables]
    expected = LAYERS[model_type]
    attention = [i for i, name in enumerate(called) if name == "paged_attention"]
    first = attention[1] - expected.index("paged_attention")
    assert called[first : first + attention[2] - attention[1]] == expected
    rope = FuseRope(plan.kv_format, rope_append_kernel, "float16", False)
    for fuse in (rope, FuseElementwiseCUDA("float16")):
        assert structural_equal(fuse(module), module)
