"""Families whose attention or residual stream differs from Llama's give transformers' logits."""

import pytest

from tests.models import parity
from tests.models.test_families_1 import family

YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.3,
}
VARIANTS = {
    "olmo": family("olmo", num_key_value_heads=4, tie_word_embeddings=True),
    "olmo-clip": family("olmo", clip_qkv=0.4, attention_bias=True),
    "olmo2": family("olmo2"),
    "granite": family(
        "granite",
        embedding_multiplier=12.0,
        attention_multiplier=0.13,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    ),
    "smollm3": family("smollm3", num_hidden_layers=2, no_rope_layers=[1, 0]),
    "smollm3-window": family(
        "smollm3", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=19
    ),
    "ministral3": family("ministral3", rope_parameters=YARN),
    "ministral3-window": family(
        "ministral3",
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        sliding_window=30,
    ),
    "nemotron": family("nemotron", norm_eps=1e-4, hidden_act="relu2"),
    "nemotron-bias": family(
        "nemotron", partial_rotary_factor=0.25, attention_bias=True, mlp_bias=True
    ),
    "cohere": family("cohere", layer_norm_eps=1e-4, tie_word_embeddings=True),
    "cohere-norms": family(
        "cohere", use_qk_norm=True, logit_scale=0.3, attention_bias=True, num_key_value_heads=4
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


# Squared activations, norms of a row per head, and constants of the residual stream.
@pytest.mark.parametrize("variant", ["nemotron-bias", "cohere-norms", "granite", "ministral3"])
def test_quantized(variant: str) -> None:
    parity.check_quantized(VARIANTS[variant])
