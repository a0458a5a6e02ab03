"""Models with layers of the gated delta rule give the logits of transformers."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from relaxlm import models
from relaxlm.compiler.build import describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.config import unknown_fields
from relaxlm.quantization.schemes import get_scheme
from tests.models import parity, stateful
from tests.models.parity import tiny_config
from tests.shared_data import SHARED, needs_shared_data

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}
MROPE = {
    "rope_type": "default",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}


def without_rope(raw: dict) -> dict:
    return {name: value for name, value in raw.items() if name != "rope_theta"}


VARIANTS = {
    # A first layer without experts.
    "qwen3_next": tiny_config("qwen3_next", **LINEAR, **EXPERTS, decoder_sparse_step=2),
    "qwen3_5_text": {
        **without_rope(tiny_config("qwen3_5_text", **LINEAR, rope_parameters=MROPE)),
        "linear_num_value_heads": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen3_5_moe_text": {
        **without_rope(tiny_config("qwen3_5_moe_text", **LINEAR, **EXPERTS, rope_parameters=MROPE))
    },
}


@pytest.fixture(autouse=True)
def experts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published checkpoints of Qwen3-Next have a tensor for each expert, transformers has one."""
    stored, dequantized = parity.stored_parameters, parity.dequantized_state

    def stored_parameters(raw: dict, state: dict, scheme: str) -> dict:
        return stored(raw, apart(raw, state), scheme)

    def dequantized_state(raw: dict, state: dict, scheme: str) -> dict:
        return together(dequantized(raw, apart(raw, state), scheme))

    monkeypatch.setattr(parity, "stored_parameters", stored_parameters)
    monkeypatch.setattr(parity, "dequantized_state", dequantized_state)


@pytest.fixture
def token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes prompts in chunks, which rounds thrice as much as its other way."""
    for name in ("qwen3_next", "qwen3_5", "qwen3_5_moe"):
        module = import_module(f"transformers.models.{name}.modeling_{name}")
        rule = module.torch_recurrent_gated_delta_rule
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", rule)


def apart(raw: dict, state: dict) -> dict[str, torch.Tensor]:
    if raw["model_type"] != "qwen3_next":
        return state
    result = {}
    for name, tensor in state.items():
        stem, _, part = name.rpartition(".experts.")
        pieces = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        if not stem:
            result[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = matrix.chunk(len(pieces[part]))
            for piece, value in zip(pieces[part], parts, strict=True):
                result[f"{stem}.experts.{expert}.{piece}.weight"] = value.clone()
    return result


def together(state: dict) -> dict[str, torch.Tensor]:
    result, experts = {}, {}
    for name, tensor in state.items():
        stem, _, rest = name.rpartition(".experts.")
        if stem and rest.endswith(".weight"):
            expert, part, _ = rest.split(".")
            experts.setdefault((stem, part), {})[int(expert)] = tensor
        else:
            result[name] = tensor
    for (stem, part), found in experts.items():
        matrices = torch.stack([found[expert] for expert in sorted(found)])
        if part == "down_proj":
            result[f"{stem}.experts.down_proj"] = matrices
        elif part == "gate_proj":
            ups = torch.stack([experts[stem, "up_proj"][expert] for expert in sorted(found)])
            result[f"{stem}.experts.gate_up_proj"] = torch.cat([matrices, ups], dim=1)
    return result


@pytest.mark.usefixtures("token_by_token")
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_match_transformers(name: str) -> None:
    # The norm behind the rule magnifies rounding: transformers is 8e-6 off what float64 gives.
    stateful.check_transformers(VARIANTS[name], atol=2e-5)


def test_parameters_are_called_as_in_folders_for_mlc() -> None:
    dtypes = stateful.stored_dtypes(VARIANTS["qwen3_5_text"])
    recurrent = "model.layers.0.linear_attn."
    layer = {
        name.removeprefix(recurrent): dtype
        for name, dtype in dtypes.items()
        if name.startswith(recurrent)
    }
    quantized = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
    assert layer == {
        **{f"{part}.q_weight": "uint32" for part in quantized},
        **{f"{part}.q_scale": "float16" for part in quantized},
        "conv1d_weight": "float16",
        "A_log": "float32",
        "dt_bias": "float32",
        "norm.weight": "float16",
    }
    assert {"model.layers.1.self_attn.c_attn.q_weight", "model.norm.weight"} <= dtypes.keys()
    # A head's query and its gate come in turn.
    specs = {s.name: s for s in models.parameter_specs(models.load_config(VARIANTS["qwen3_next"]))}
    assert specs["model.layers.1.self_attn.c_attn.weight"].shape == (2 * 64 + 2 * 32, 64)
    assert specs["model.layers.0.linear_attn.conv1d_weight"].shape == (160, 1, 3)


def test_norms_are_stored_as_what_they_differ_from_one_by_except_gated_ones() -> None:
    specs = models.parameter_specs(models.load_config(VARIANTS["qwen3_next"]))
    norms = {spec.name: spec.sources[0].shift for spec in specs if "norm.weight" in spec.name}
    plain = {name for name, shift in norms.items() if shift == 0}
    assert plain == {"model.layers.0.linear_attn.norm.weight"}
    assert len(norms) == 8


def test_experts_are_found_apart_and_together_and_within_a_model_that_reads_pictures() -> None:
    specs = models.parameter_specs(models.load_config(VARIANTS["qwen3_5_moe_text"]))
    [spec] = [s for s in specs if s.name == "model.layers.0.mlp.moe_gate_up_proj.weight"]
    joined = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    [source] = spec.found_in({joined}).sources
    assert (source.name, source.shape) == (joined, (6, 80, 64))
    each = {
        f"model.layers.0.mlp.experts.{expert}.{part}.weight"
        for expert in range(6)
        for part in ("gate_proj", "up_proj")
    }
    assert {source.name for source in spec.found_in(each).sources} == each


@needs_shared_data
@pytest.mark.parametrize("name", ["Qwen3.5-27B", "Qwen3.5-35B-A3B"])
def test_published_configurations_are_read_and_lowered(name: str) -> None:
    raw = json.loads((SHARED / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    config = models.load_config(raw)
    assert unknown_fields(config, raw) == []
    assert [config.has_pages(layer) for layer in range(4)] == [False, False, False, True]
    assert config.rope.rotary_dim(config.head_dim) == 64
    scheme = get_scheme("q4f16_1")
    options = CompileOptions.resolve(config, scheme, None, "context_window_size=4096")
    info = describe_model(config, raw, scheme, resolve_device("cpu"), options)
    layers = config.num_hidden_layers
    assert len(info.state.tensors) == 2 * layers * 3 // 4
    assert {tensor.name.partition(".")[0] for tensor in info.kv_cache.tensors} == {
        str(layer) for layer in range(3, layers, 4)
    }


def test_the_outer_configuration_says_whether_the_head_is_tied() -> None:
    inner = {k: v for k, v in VARIANTS["qwen3_5_text"].items() if k != "model_type"}
    raw = {"model_type": "qwen3_5", "text_config": inner, "vision_config": {"depth": 2}}
    assert inner["tie_word_embeddings"]
    assert not models.load_config(raw).tie_word_embeddings
    assert models.load_config({**raw, "tie_word_embeddings": True}).tie_word_embeddings


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_part_of_a_model_that_reads_pictures(name: str) -> None:
    inner = VARIANTS[f"{name}_text"]
    tied = inner["tie_word_embeddings"]
    parity.check_text_part({"model_type": name, "text_config": inner, "tie_word_embeddings": tied})


REFUSED = {
    "activation": ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act = 'gelu'"),
    "gate": ({"attn_output_gate": False}, UnsupportedError, "attn_output_gate = False"),
    "heads": (
        {"linear_num_value_heads": 3},
        ConfigError,
        "linear_num_value_heads = 3 is not a multiple of linear_num_key_heads = 2",
    ),
    "kind": ({"layer_types": ["linear_attention", "conv"]}, UnsupportedError, "'conv'"),
    "rope": (
        {"rope_parameters": {**MROPE, "beta": 1}},
        ConfigError,
        "rope_parameters.beta|rope.*beta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str) -> None:
    change, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        models.load_config({**VARIANTS["qwen3_5_text"], **change})


def test_converted_rows_of_qwen3_next_are_those_of_each_key_head(tmp_path: Path) -> None:
    """Each part of the joint matrices goes where the other models have it."""
    specs = models.parameter_specs(models.load_config(VARIANTS["qwen3_next"]))
    found = {s.name.rpartition("linear_attn.")[2]: s for s in specs if "in_proj" in s.name}
    groups, key_dim, values = 2, 16, 2 * 24
    matrix = np.arange(groups * 2 * (key_dim + values) * 64, dtype=np.float32).reshape(-1, 64)
    heads = matrix.reshape(groups, -1, 64)
    expected = {
        "in_proj_qkv.weight": [
            heads[:, :key_dim],
            heads[:, key_dim : 2 * key_dim],
            heads[:, 2 * key_dim : 2 * key_dim + values],
        ],
        "in_proj_z.weight": [heads[:, 2 * key_dim + values :]],
    }
    for name, parts in expected.items():
        sources = found[name].sources
        assert {source.name for source in sources} == {
            "model.layers.0.linear_attn.in_proj_qkvz.weight"
        }
        rows = [source.values(matrix).reshape(-1, 64) for source in sources]
        np.testing.assert_array_equal(
            np.concatenate(rows), np.concatenate([part.reshape(-1, 64) for part in parts])
        )
