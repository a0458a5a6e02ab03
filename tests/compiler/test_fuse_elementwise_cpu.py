"""FuseRope and FuseElementwiseCPU: what becomes one kernel, and what does not.

That a fused model computes the same is shown by tests/models; each kernel against NumPy by
test_cpu_elementwise.py and test_cpu_rope.py.
"""

import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec
from tvm_ffi import structural_equal

from relaxlm.compiler.kernels.cpu_rope import rope_append_kernel
from relaxlm.compiler.passes.fuse_elementwise_cpu import FuseElementwiseCPU
from relaxlm.compiler.passes.fuse_rope import FuseRope
from tests.compiler.test_passes import lowered, lowering, operators
from tests.compiler.test_take_rows_early import KINDS
from tests.expression import bindings
from tests.models.parity import tiny_config


def kernels(function: relax.Function) -> list[str]:
    """The kernels that a function calls, in order, without the numbers behind their names."""
    calls = [value for value in bindings(function).values() if isinstance(value, relax.Call)]
    found = [call.args[0] for call in calls if call.op.name.startswith("relax.call_tir")]
    return [name.name_hint.rstrip("0123456789") for name in found]


LAYER = ["matmul", "rope_append", "paged_attention", "matmul", "add_norm"]
MLP = ["matmul", "silu_mul", "matmul"]


@pytest.mark.parametrize(
    "raw",
    [
        tiny_config("llama", num_hidden_layers=2),
        tiny_config("qwen2", num_hidden_layers=2),  # a bias on q, k and v
        tiny_config("qwen3", num_hidden_layers=2),  # a norm on every head of q and k
    ],
    ids=lambda raw: raw["model_type"],
)
@pytest.mark.parametrize(("scheme", "kv_format"), [("q4f16_1", "fp8"), ("q0f32", "f32")])
def test_a_layer_is_eight_kernels(raw: dict, scheme: str, kv_format: str) -> None:
    plan = lowering(raw, scheme, kv_format)
    module = lowered(plan, until="FuseElementwiseCPU")
    start = ["embedding_lookup", "norm"]
    first = [LAYER[0], "rope_cos", "rope_sin", *LAYER[1:]]  # tables for all layers
    expected = [*start, *first, *MLP, "add_norm", *LAYER, *MLP]
    # The residual stream is what `hidden_states` returns: the sums stay available.
    assert kernels(module["hidden_states"]) == [*expected, "add_norm"]
    # In the last layer, rows are chosen of the stream and of what attention adds to it.
    attention, output, norm = LAYER[:3], LAYER[3], LAYER[4]
    last = [*attention, "take_rows", "take_rows", output, norm, *MLP, "add_norm", "matmul"]
    assert kernels(module["forward"]) == [*expected[: -len(LAYER + MLP)], *last]
    assert operators(module) == {"relax.call_tir", "relax.call_tir_inplace", "relax.reshape"}
    rope = FuseRope(plan.kv_format, rope_append_kernel, "float32", True)
    for fuse in (rope, FuseElementwiseCPU()):
        assert structural_equal(fuse(module), module)


# What stands between the matrices of a layer of each kind; the last layer has take_rows besides.
ROPE = ["rope_append", "paged_attention"]
BETWEEN = {
    "gpt2": [*ROPE, "add_norm", "add_silu", "add_norm"],
    "gpt_neox": [*ROPE, "add_norm", "add_silu", "add_norm"],
    "phi": [*ROPE, "add_silu", "add_norm"],
    "starcoder2": [*ROPE, "add_norm", "add_silu", "add_norm"],
    "nemotron": [*ROPE, "add_norm", "relu_square", "add_norm"],
    "gemma2": [*ROPE, "norm_add_norm", "gelu_tanh_mul", "norm_add_norm"],
    "gemma3_text": [*ROPE, "norm_add_norm", "gelu_tanh_mul", "norm_add_norm"],
    "glm4": [*ROPE, "norm_add_norm", "silu_mul", "norm_add_norm"],
    "olmo2": ["norm", "norm", *ROPE, "norm_add", "silu_mul", "norm_add"],
    "granite": [*ROPE, "mul_add_norm", "silu_mul", "mul_add_norm"],
    "cohere": [*ROPE, "silu_mul", "add_norm"],
}
ONCE = {"embedding_lookup", "rope_cos", "rope_sin", "take_rows", "matmul"}


@pytest.mark.parametrize("model_type", BETWEEN)
def test_every_kind_of_block_has_few_kernels_between_its_matrices(model_type: str) -> None:
    raw = tiny_config(model_type, num_hidden_layers=3, **KINDS[model_type])
    module = lowered(lowering(raw, "q4f16_1", "fp8"), until="FuseElementwiseCPU")
    called = [name for name in kernels(module["hidden_states"]) if name not in ONCE]
    attention = [i for i, name in enumerate(called) if name == "paged_attention"]
    period = attention[1] - attention[0]
    first = attention[0] - BETWEEN[model_type].index("paged_attention")
    assert called[first : first + period] == BETWEEN[model_type]
    assert operators(module) <= {"relax.call_tir", "relax.call_tir_inplace", "relax.reshape"}
    assert structural_equal(FuseElementwiseCPU()(module), module)


class Rows(nn.Module):
    """Sums, products and activations that one kernel computes."""

    def __init__(self) -> None:
        self.weight, self.bias = nn.Parameter((4,)), nn.Parameter((8,))

    def swapped(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = op.split(x, 2, axis=-1)
        return op.multiply(op.silu(second), first)

    def biased(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = op.split(op.add(x, op.astype(self.bias, "float32")), 2, axis=-1)
        return op.multiply(op.gelu(first), second)

    def read_twice(self, x: Tensor, y: Tensor) -> Tensor:
        total = op.add(x, y)
        return op.add(op.relu(total), op.tanh(total))

    # Near misses.

    def other_rows(self, x: Tensor, y: Tensor) -> Tensor:
        return op.add(x, op.reshape(self.bias, (1, 8)))

    def wide_norm(self, x: Tensor, y: Tensor) -> Tensor:
        return op.rms_norm(op.reshape(x, (1, x.shape[0], 8)), self.bias, axes=[-1])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("swapped", ["silu_mul"]),
        ("biased", ["add_gelu_add_mul"]),
        ("read_twice", ["add", "relu_tanh_add"]),
        ("other_rows", []),
        ("wide_norm", []),
    ],
)
def test_rows(method: str, expected: list[str]) -> None:
    x = spec.Tensor(["n", 8], "float32")
    signature = {"x": x, "y": x, "$": {"param_mode": "plain", "effect_mode": "none"}}
    model = Rows()
    model.to("float32")
    module, _ = model.export_tvm(spec={method: signature})
    with tvm.target.Target({"kind": "llvm"}):
        after = FuseElementwiseCPU()(module)
    assert kernels(after[method]) == expected
    if not expected:
        assert structural_equal(after, module)
