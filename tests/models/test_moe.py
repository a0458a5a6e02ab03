"""Mixtures of experts give the logits of transformers, and read no expert that nobody chose."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from safetensors.torch import save_file
from tvm import relax
from tvm.relax.frontend import nn

from relaxlm import models
from relaxlm.compiler.build import describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import UnsupportedError
from relaxlm.models.moe import FLOAT_GATE_OUTPUTS, choose
from relaxlm.quantization.convert import convert_weights
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.params import WeightFolder
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


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parameters come from a checkpoint on disk, by way of the converter.

    transformers 5 keeps all experts in one tensor; published checkpoints, and the files that it
    writes itself, have one for each.
    """

    def stored_parameters(raw: dict, state: dict, scheme: str) -> dict[str, np.ndarray]:
        return convert(raw, state, scheme, tmp_path)

    def dequantized_state(raw: dict, state: dict, scheme_name: str) -> dict[str, torch.Tensor]:
        scheme, kept = get_scheme(scheme_name), {}
        stored = stored_parameters(raw, state, scheme_name)
        for spec in models.parameter_specs(models.load_config(raw)):
            arrays = {name.rpartition(".")[2]: stored[name] for name in scheme.storage(spec)}
            quant = scheme.for_role(spec.role)
            flat = quant.dequantize(arrays, spec.shape) if quant else next(iter(arrays.values()))
            flat = flat.astype(np.float32).reshape(-1)
            for source in spec.sources:
                size = math.prod(source.shape)
                kept[source.name] = torch.from_numpy(flat[:size].reshape(source.shape))
                flat = flat[size:]
        return joined(raw, kept)

    monkeypatch.setattr(parity, "stored_parameters", stored_parameters)
    monkeypatch.setattr(parity, "dequantized_state", dequantized_state)


def convert(raw: dict, state: dict, scheme: str, folder: Path) -> dict[str, np.ndarray]:
    """What the converter makes of transformers' tensors: stored name -> array."""
    checkpoint, output = folder / "checkpoint", folder / "converted"
    checkpoint.mkdir(exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in split(raw, state).items()}
    save_file(tensors, checkpoint / "model.safetensors")
    config = models.load_config(raw)
    specs, ignored = models.parameter_specs(config), models.ignored_sources(config)
    convert_weights(checkpoint, get_scheme(scheme), output, specs, ignored)
    weights = WeightFolder(output)
    return {name: weights.load(name).copy() for name in weights.records}


def names_of(raw: dict) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The module with the experts, and transformers' tensor of them all -> those of one expert."""
    if raw["model_type"] == "mixtral":
        return "block_sparse_moe", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
    return "mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def split(raw: dict, state: dict) -> dict[str, torch.Tensor]:
    """transformers' tensors as published checkpoints have them."""
    module, parts = names_of(raw)
    result = {}
    for name, tensor in state.items():
        stem, _, part = name.replace(".mlp.", f".{module}.").rpartition(".experts.")
        if not stem:
            result[part] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            pieces = matrix.chunk(len(parts[part]))
            for piece, value in zip(parts[part], pieces, strict=True):
                result[f"{stem}.experts.{expert}.{piece}.weight"] = value
    return result


def joined(raw: dict, tensors: dict) -> dict[str, torch.Tensor]:
    """The other way round."""
    module, parts = names_of(raw)
    result, experts = {}, {}
    for name, tensor in tensors.items():
        stem, _, rest = name.replace(f".{module}.", ".mlp.").rpartition(".experts.")
        if stem:
            experts.setdefault(stem, {})[rest.removesuffix(".weight")] = tensor
        else:
            result[rest] = tensor
    for stem, found in experts.items():
        for part, pieces in parts.items():
            count = len(found) // sum(map(len, parts.values()))
            matrices = [
                torch.cat([found[f"{e}.{piece}"] for piece in pieces]) for e in range(count)
            ]
            result[f"{stem}.experts.{part}"] = torch.stack(matrices)
    return result


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


@pytest.mark.usefixtures("converted")
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


@pytest.mark.parametrize("device", ["cpu"])
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
    machine = relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())
    found = machine["forward"](tvm.runtime.tensor(values))
    return found[0].numpy(), found[1].numpy()
