"""Granite 4 gives the logits of transformers, in whatever steps its tokens come."""

import math

import pytest
import torch

from relaxlm import models
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.config import unknown_fields
from tests.models import parity, stateful
from tests.models.parity import tiny_config

GRANITE = tiny_config(
    "granitemoehybrid",
    num_local_experts=5,
    num_experts_per_tok=2,
    intermediate_size=40,
    shared_intermediate_size=56,
    embedding_multiplier=3.0,
    attention_multiplier=0.3,
    residual_multiplier=0.6,
    logits_scaling=1.7,
    mamba_n_heads=8,
    mamba_n_groups=2,
    mamba_d_state=24,
    mamba_d_conv=3,
    mamba_proj_bias=True,
    time_step_limit=[0.3, 0.9],
    layer_types=["mamba", "attention"],
)


@pytest.fixture(autouse=True)
def names_of_published_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers renames the experts' tensors when it reads them; this is the way back."""
    stored, dequantized = parity.stored_parameters, parity.dequantized_state
    renamed = {
        "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
        "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
    }

    def replaced(state: dict, names: dict[str, str]) -> dict[str, torch.Tensor]:
        result = {}
        for name, tensor in state.items():
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            result[name] = tensor
        return result

    def dequantized_state(raw: dict, state: dict, scheme: str) -> dict:
        kept = dequantized(raw, replaced(state, renamed), scheme)
        return replaced(kept, {ours: theirs for theirs, ours in renamed.items()})

    monkeypatch.setattr(
        parity, "stored_parameters", lambda raw, state, s: stored(raw, replaced(state, renamed), s)
    )
    monkeypatch.setattr(parity, "dequantized_state", dequantized_state)


def test_logits_match_transformers() -> None:
    stateful.check_transformers(GRANITE)


def test_dense_with_rotary_embeddings() -> None:
    raw = {
        **GRANITE,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
        "mamba_conv_bias": False,
        "time_step_limit": [0.0, math.inf],
        "tie_word_embeddings": True,
        "layer_types": ["full_attention", "linear_attention"],
    }
    stateful.check_transformers(raw, quantized=False)


def test_published_configurations_are_read() -> None:
    # granite-4.0-h-tiny's config.json, as far as it is not bookkeeping.
    raw = {
        "model_type": "granitemoehybrid",
        "attention_bias": False,
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "init_method": "mup",
        "intermediate_size": 512,
        "layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 34,
        "logits_scaling": 6,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 48,
        "mamba_proj_bias": False,
        "max_position_embeddings": 131072,
        "normalization_function": "rmsnorm",
        "num_attention_heads": 12,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 40,
        "num_key_value_heads": 4,
        "num_local_experts": 64,
        "output_router_logits": False,
        "position_embedding_type": "nope",
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000,
        "router_aux_loss_coef": 0.0,
        "shared_intermediate_size": 1024,
        "tie_word_embeddings": True,
        "vocab_size": 100352,
    }
    config = models.load_config(raw)
    assert unknown_fields(config, raw) == []
    assert [layer for layer in range(40) if config.has_pages(layer)] == [5]
    assert config.layer_rope(5) is None


REFUSED = {
    "positions": ({"position_embedding_type": "alibi"}, UnsupportedError, "position_embedding_ty"),
    "activation": ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act = 'gelu'"),
    "groups": ({"mamba_n_groups": 3}, ConfigError, "8 heads in 3 groups"),
    "heads": ({"mamba_d_head": 8}, ConfigError, "8 heads of 8 features: expected mamba_expand"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str) -> None:
    change, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        models.load_config({**GRANITE, **change})
