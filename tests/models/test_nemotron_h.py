"""Nemotron-H gives the logits of transformers, in whatever steps its tokens come."""

import json
import math

import pytest

from relaxlm import models
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.config import unknown_fields
from tests.models import stateful
from tests.models.parity import VOCAB
from tests.shared_data import SHARED, needs_shared_data

NEMOTRON = {
    "model_type": "nemotron_h",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "hybrid_override_pattern": "M*E-",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 88,
    "mlp_bias": True,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 3,
    "use_bias": True,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
    "routed_scaling_factor": 1.7,
    "layer_norm_epsilon": 1e-4,
    "norm_eps": 1e-2,  # which transformers does not read
    "time_step_min": 0.3,
    "max_position_embeddings": 256,
}


def test_logits_match_transformers() -> None:
    stateful.check_transformers(NEMOTRON)


def test_parameters_come_from_the_tensors_of_published_checkpoints() -> None:
    specs = models.parameter_specs(models.load_config(NEMOTRON))
    names = {source.name for spec in specs for source in spec.sources}
    assert {name for name in names if not name.startswith("backbone.layers.")} == {
        *("backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight")
    }
    moe = {name.removeprefix("backbone.layers.2.") for name in names if ".layers.2." in name}
    assert moe == {
        *("norm.weight", "mixer.gate.weight", "mixer.gate.e_score_correction_bias"),
        *(
            f"mixer.experts.{i}.{part}.weight"
            for i in range(6)
            for part in ("up_proj", "down_proj")
        ),
        *(
            f"mixer.shared_experts.{part}.{kind}"
            for part in ("up_proj", "down_proj")
            for kind in ("weight", "bias")
        ),
    }
    roles = stateful.roles(NEMOTRON)
    assert roles["model.layers.2.mixer.e_score_correction_bias"] == "float32"
    assert roles["model.layers.2.mixer.moe_up_proj.weight"] == "expert"
    assert roles["model.layers.0.mixer.conv1d_weight"] == "vector"


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "attending", "limit"),
    [
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 6, (0.001, math.inf)),
        ("Nemotron-H-56B-Base-8K", 10, (0.0, math.inf)),
    ],
)
def test_published_configurations_are_read(name: str, attending: int, limit: tuple) -> None:
    raw = json.loads((SHARED / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    config = models.load_config(raw)
    assert unknown_fields(config, raw) == []
    assert config.num_hidden_layers == raw["num_hidden_layers"]
    assert sum(map(config.has_pages, range(config.num_hidden_layers))) == attending
    assert config.head_dim == 128 and config.time_step_limit == limit
    recurrent = [layer for layer in range(8) if config.layer_states(layer)]
    assert recurrent == [i for i in range(8) if raw["hybrid_override_pattern"][i] == "M"]


REFUSED = {
    "residual": ({"residual_in_fp32": True}, UnsupportedError, "residual_in_fp32 = True"),
    "latent": ({"moe_latent_size": 16}, UnsupportedError, "moe_latent_size = 16"),
    "bias": ({"attention_bias": True}, UnsupportedError, "attention_bias = True"),
    "groups": ({"n_groups": 3}, ConfigError, "8 heads in 3 groups"),
    "kind": ({"hybrid_override_pattern": "MX"}, UnsupportedError, "'X'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str) -> None:
    change, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        models.load_config({**NEMOTRON, **change})
