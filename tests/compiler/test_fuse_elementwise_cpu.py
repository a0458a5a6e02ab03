"""FuseElementwiseCPU: what becomes one kernel, and what does not.

That a fused model computes the same is shown by tests/models/test_parity.py and
test_quantized_parity.py; each kernel against NumPy by test_cpu_elementwise.py.
"""

import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec
from tvm_ffi import structural_equal

from relaxlm.compiler.passes.fuse_elementwise_cpu import FuseElementwiseCPU
from tests.compiler.test_passes import lowered, lowering, operators
from tests.expression import bindings, written_out
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
    rest = {"relax.nn.rms_norm", "relax.nn.silu", "relax.multiply", "relax.split"}
    assert not rest & operators(module)
    again = FuseElementwiseCPU(plan.config, plan.kv_format)(module)
    assert structural_equal(again, module)


class Gelu(nn.Module):
    def __init__(self) -> None:
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return op.gelu(self.up(x)) + op.gelu(x)


def test_gelu_is_one_kernel_with_or_without_a_bias() -> None:
    model = Gelu()
    model.to("float32")
    method = {"x": spec.Tensor(["n", 8], "float32")}
    method["$"] = {"param_mode": "plain", "effect_mode": "none"}
    module, _ = model.export_tvm(spec={"forward": method})
    plan = lowering()
    with tvm.target.Target({"kind": "llvm"}):
        after = FuseElementwiseCPU(plan.config, plan.kv_format)(module)
    product = "matmul(x, permute_dims(up.weight))"
    assert written_out(after["forward"]) == f"add(@gelu({product}, up.bias), @gelu(x))"


class Others(nn.Module):
    """Near misses."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        first, second = op.split(x, 2, axis=-1)
        swapped = op.multiply(op.silu(second), first)
        unrelated = op.multiply(op.silu(first), first)
        wide = op.rms_norm(op.reshape(x, (1, x.shape[0], 8)), weight, axes=[-1])
        return op.concat([swapped, unrelated, op.reshape(wide, (x.shape[0], 8))], dim=1)


def test_other_operators_stay_as_they_are() -> None:
    method = {"x": spec.Tensor(["n", 8], "float32"), "weight": spec.Tensor([8], "float32")}
    method["$"] = {"param_mode": "plain", "effect_mode": "none"}
    module, _ = Others().export_tvm(spec={"forward": method})
    plan = lowering()
    with tvm.target.Target({"kind": "llvm"}):
        after = FuseElementwiseCPU(plan.config, plan.kv_format)(module)
    assert structural_equal(after, module)
