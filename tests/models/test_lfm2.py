"""LFM2 gives the logits of transformers, in whatever steps its tokens come."""

import pytest
import transformers

from relaxlm import models
from relaxlm.errors import UnsupportedError
from relaxlm.models.config import unknown_fields
from tests.models import stateful
from tests.models.parity import VOCAB

LFM2 = {
    "model_type": "lfm2",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 100,
    "block_multiple_of": 48,
    "block_ffn_dim_multiplier": 1.3,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "norm_eps": 1e-4,
    "rope_theta": 5000.0,
    "conv_bias": True,
    "conv_L_cache": 4,
    "full_attn_idxs": [1],
}


def test_logits_match_transformers() -> None:
    stateful.check_transformers(LFM2)


def test_a_width_as_it_is_given_and_a_head_of_its_own() -> None:
    raw = {
        **LFM2,
        "block_auto_adjust_ff_dim": False,
        "conv_bias": False,
        "tie_embedding": False,
        "layer_types": ["conv", "full_attention"],
        "num_hidden_layers": 2,
    }
    stateful.check_transformers(raw, quantized=False)


def test_sizes_and_layers_follow_as_in_transformers() -> None:
    config = models.load_config(LFM2)
    assert config.intermediate_size == 96  # 1.3 times two thirds of 100, in multiples of 48
    assert [config.has_pages(layer) for layer in range(3)] == [False, True, False]
    assert [tensor.shape for tensor in config.layer_states(0)] == [(3, 64)]
    assert models.load_config({**LFM2, "block_ff_dim": 150}).intermediate_size == 144


def test_published_configurations_are_read() -> None:
    # LFM2-350M's config.json, as far as it is not bookkeeping.
    raw = {
        "model_type": "lfm2",
        "block_auto_adjust_ff_dim": True,
        "block_dim": 1024,
        "block_ff_dim": 6656,
        "block_ffn_dim_multiplier": 1.0,
        "block_mlp_init_scale": 1.0,
        "block_multiple_of": 256,
        "block_norm_eps": 1e-05,
        "block_out_init_scale": 1.0,
        "block_use_swiglu": True,
        "block_use_xavier_init": True,
        "conv_L_cache": 3,
        "conv_bias": False,
        "conv_dim": 1024,
        "conv_dim_out": 1024,
        "conv_use_xavier_init": True,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "hidden_size": 1024,
        "max_position_embeddings": 128000,
        "norm_eps": 1e-05,
        "num_attention_heads": 16,
        "num_heads": 16,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "use_pos_enc": True,
        "vocab_size": 65536,
    }
    config = models.load_config(raw)
    assert unknown_fields(config, raw) == []
    assert config.intermediate_size == 4608
    assert config.tie_word_embeddings
    theirs = transformers.AutoConfig.for_model(**raw)
    assert list(config.layer_types) == theirs.layer_types


def test_parameters_come_from_the_tensors_of_published_checkpoints() -> None:
    names = {
        source.name.removeprefix("model.layers.")
        for spec in models.parameter_specs(models.load_config(LFM2))
        for source in spec.sources
    }
    assert {name for name in names if name.startswith("0.")} == {
        *(
            f"0.conv.{part}.{kind}"
            for part in ("conv", "in_proj", "out_proj")
            for kind in ("weight", "bias")
        ),
        *(f"0.feed_forward.w{i}.weight" for i in (1, 2, 3)),
        *("0.operator_norm.weight", "0.ffn_norm.weight"),
    }
    assert {name for name in names if "self_attn" in name} == {
        f"1.self_attn.{part}.weight"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj", "q_layernorm", "k_layernorm")
    }
    assert "model.embedding_norm.weight" in names
    roles = stateful.roles(LFM2)
    assert roles["model.layers.0.conv.conv_weight"] == "vector"
    assert roles["model.layers.0.conv.in_proj.weight"] == "linear"


@pytest.mark.parametrize("field", ["block_use_swiglu", "use_pos_enc"])
def test_what_is_not_implemented_is_refused_by_name(field: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{field} = False is not supported"):
        models.load_config({**LFM2, field: False})
