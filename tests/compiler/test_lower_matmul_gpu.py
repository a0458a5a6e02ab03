"""Products on GPUs: what LowerMatmulGPU and LowerExpertMatmul make of the IR."""

from functools import partial

import pytest
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec
from tvm_ffi import structural_equal

from relaxlm.compiler.kernels import cuda_matmul
from relaxlm.compiler.passes.lower_embedding import LowerEmbedding
from relaxlm.compiler.passes.lower_expert_matmul import LowerExpertMatmul
from relaxlm.compiler.passes.lower_matmul_gpu import LowerMatmulGPU
from relaxlm.models.moe import Experts
from tests.expression import written_out
from tests.quantization.test_transform import quantized

SHARED = 99 << 10
LOWER = LowerMatmulGPU(partial(cuda_matmul.product_kernel, shared_limit=SHARED))


def export(model: nn.Module, **inputs: object):
    model.to("float16")
    method = {**inputs, "$": {"param_mode": "plain", "effect_mode": "none"}}
    return model.export_tvm(spec={"forward": method})[0]


@pytest.mark.parametrize("scheme", ["q4f16_0", "q4f16_1", "q0f16"])
def test_a_matrix_is_multiplied_in_its_stored_form_and_a_bias_is_added_at_once(scheme: str) -> None:
    module = LOWER(LowerEmbedding()(quantized(scheme, "float16")))
    weight = "{0}.weight" if scheme == "q0f16" else "{0}.q_weight, {0}.q_scale"
    table, up = weight.format("table"), weight.format("up")
    x = f"@embedding_lookup(ids, {table})"
    assert written_out(module["forward"]) == (
        f"concat((@matmul({x}, {up}, up.bias), @matmul({x}, {table})))"
    )
    assert structural_equal(LOWER(module), module)


class Residual(nn.Module):
    def __init__(self) -> None:
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = op.add(self.up(x), x)
        twice = self.down(y)
        # Sums with what somebody else reads, too, with a number, and of two products.
        return op.concat(
            [x, twice + y, twice, self.down(x) + 1.0, self.down(x + y) + self.down(y - x)], dim=1
        )


def test_a_residual_is_added_at_once_where_only_it_reads_the_product() -> None:
    row = spec.Tensor(["n", 6], "float16")
    module = LOWER(export(Residual(), x=row, y=row))
    x, twice = "@matmul(x, up.weight, up.bias, x)", "@matmul(y, down.weight)"
    both = f"@matmul(add({x}, y), down.weight, @matmul(subtract(y, {x}), down.weight))"
    assert written_out(module["forward"]) == (
        f"concat(({x}, add({twice}, y), {twice}, add(@matmul({x}, down.weight)), {both}))"
    )


class Routed(nn.Module):
    def __init__(self) -> None:
        self.up, self.down = Experts(4, 8, 16), Experts(4, 16, 8)

    def forward(self, x: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
        hidden = self.up(x, chosen, 2)
        return op.concat([self.down(hidden, chosen, 1), self.down(hidden, other, 1)], dim=1)


def test_rows_are_sorted_once_for_all_products_of_a_choice() -> None:
    chosen = spec.Tensor(["n", 2], "int32")
    module = export(Routed(), x=spec.Tensor(["n", 8], "float16"), chosen=chosen, other=chosen)
    module = LowerExpertMatmul("cuda", SHARED)(module)
    plan = "@plan_experts(chosen)"
    hidden = f"@expert_matmul(x, chosen, {plan}, up.weight)"
    assert written_out(module["forward"]) == (
        f"concat((@expert_matmul({hidden}, chosen, {plan}, down.weight), "
        f"@expert_matmul({hidden}, other, @plan_experts(other), down.weight)))"
    )
    calls = [str(b.value) for b in module["forward"].body.blocks[0].bindings]
    assert sum("plan_experts" in call for call in calls) == 2
    assert structural_equal(LowerExpertMatmul("cuda", SHARED)(module), module)
