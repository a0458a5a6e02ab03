"""Mixtures of experts give the logits of transformers, and read no expert that nobody chose."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn

from relaxlm import models
from relaxlm.compiler.build import FOR_GPUS, UNUSED_ON_CPU, describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import UnsupportedError
from relaxlm.models.moe import FLOAT_GATE_OUTPUTS
from relaxlm.models.routing import choose
from relaxlm.quantization.schemes import get_scheme
from tests.models import parity
from tests.models.parity import tiny_config

QWEN = {"moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 3}
VARIANTS = {
    "mixtral": tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "mixtral-window": tiny_config(
        "mixtral", num_local_experts=5, num_experts_per_tok=1, sliding_window=21
    ),
    "qwen2_moe": tiny_config("qwen2_moe", **QWEN, shared_expert_intermediate_size=24),
    # A first layer without experts, and windows.
    "qwen2_moe-normed": tiny_config(
        "qwen2_moe",
        **QWEN,
        shared_expert_intermediate_size=24,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        use_sliding_window=True,
        sliding_window=19,
    ),
    "qwen3_moe": tiny_config("qwen3_moe", **QWEN, norm_topk_prob=True, attention_bias=True),
    "qwen3_moe-dense-layer": tiny_config("qwen3_moe", **QWEN, mlp_only_layers=[1]),
}


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("variant", "scheme"),
    [("mixtral", "q4f16_1"), ("qwen2_moe", "q4f16_1"), ("qwen3_moe", "q3f16_1")],
)
def test_presets_compute_with_the_values_they_keep(variant: str, scheme: str) -> None:
    parity.check_quantized(VARIANTS[variant], scheme)


def test_parameters_are_called_as_in_published_folders() -> None:
    def of(variant: str) -> dict[str, tuple[tuple[int, ...], str]]:
        specs = models.parameter_specs(models.load_config(VARIANTS[variant]))
        return {
            spec.name.removeprefix("model.layers.0."): (spec.shape, spec.role) for spec in specs
        }

    mixtral, qwen = of("mixtral"), of("qwen2_moe")
    assert mixtral["moe.e1_e3.weight"] == ((4, 224, 64), "expert")
    assert mixtral["moe.e2.weight"] == ((4, 64, 112), "expert")
    assert mixtral["moe.gate.weight"] == ((4, 64), "vector")
    assert qwen["mlp.moe_gate_up_proj.weight"] == ((6, 80, 64), "expert")
    assert qwen["mlp.moe_down_proj.weight"] == ((6, 64, 40), "expert")
    assert qwen["mlp.gate.weight"] == ((6, 64), "vector")
    assert qwen["mlp.shared_expert.gate_up_proj.weight"] == ((48, 64), "linear")
    assert qwen["mlp.shared_expert_gate.weight"] == ((1, 64), "vector")


def test_large_routers_are_stored_like_other_matrices() -> None:
    for experts, role in ((FLOAT_GATE_OUTPUTS, "vector"), (FLOAT_GATE_OUTPUTS + 1, "linear")):
        raw = tiny_config("qwen3_moe", **{**QWEN, "num_experts": experts})
        specs = models.parameter_specs(models.load_config(raw))
        gates = {spec.role for spec in specs if spec.name.endswith(".gate.weight")}
        assert gates == {role}


def test_transposed_presets_are_refused() -> None:
    config = models.load_config(VARIANTS["mixtral"])
    specs = models.parameter_specs(config)
    [spec, *_] = [spec for spec in specs if spec.role == "expert"]
    with pytest.raises(UnsupportedError, match=r"use a preset that ends in _1, such as q4f16_1"):
        get_scheme("q4f16_0").storage(spec)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("variant", ["mixtral", "qwen2_moe"])
def test_lowers_for_every_target(variant: str, device: str) -> None:
    raw, scheme = VARIANTS[variant], get_scheme("q4f16_1")
    config = models.load_config(raw)
    target = resolve_device(device, "sm_90") if device == "cuda" else resolve_device(device)
    options = CompileOptions.resolve(config, scheme)
    info = describe_model(config, raw, scheme, target, options)
    shapes = [param.shape for param in info.params if param.name.endswith("q_weight")]
    assert sum(len(shape) == 3 for shape in shapes) == 2 * config.num_hidden_layers


def test_the_largest_are_chosen_the_first_among_equals() -> None:
    values = np.float32(
        [[0.1, 0.4, 0.2, 0.3], [0.3, 0.2, 0.3, 0.2], [np.nan, 0.5, 0.2, 0.1], [np.nan] * 4]
    )
    chosen, places = run_choose(values, 2)
    np.testing.assert_array_equal(places[:2], [[1, 3], [0, 2]])
    np.testing.assert_array_equal(chosen[:2], np.float32([[0.4, 0.3], [0.3, 0.3]]))
    assert ((places >= 0) & (places < 4)).all()  # NaN must not become an address


def run_choose(values: np.ndarray, each: int) -> tuple[np.ndarray, np.ndarray]:
    class Chooser(nn.Module):
        def forward(self, p: nn.Tensor):
            return choose(p, each)

    spec = {"forward": {"p": nn.spec.Tensor(values.shape, "float32")}}
    module, _ = Chooser().export_tvm(spec)
    target = resolve_device("cpu").tvm_target()
    # As `relaxlm compile` does.
    with tvm.transform.PassContext(disabled_pass=[*UNUSED_ON_CPU, *FOR_GPUS]):
        executable = tvm.compile(module, target=target)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    found = machine["forward"](tvm.runtime.tensor(values))
    return found[0].numpy(), found[1].numpy()
