"""Families that differ from Llama in norms, MLPs and constants give the logits of transformers."""

import pytest

from tests.models import parity
from tests.models.parity import tiny_config

LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(6)],
    "long_factor": [1.0 + i for i in range(6)],
}


def family(model_type: str, **change) -> dict:
    # Some families' special tokens are past a tiny vocabulary.
    return tiny_config(model_type, pad_token_id=0, bos_token_id=1, eos_token_id=2, **change)


VARIANTS = {
    "phi3": family("phi3", num_key_value_heads=4, sliding_window=21),
    # Phi-4-mini: a share of each head turned, tied, factors for texts longer than 64 tokens.
    "phi3-longrope": family(
        "phi3",
        partial_rotary_factor=0.75,
        rope_scaling=LONGROPE,
        original_max_position_embeddings=64,
        tie_word_embeddings=True,
        sliding_window=262144,
    ),
    "phi": family("phi", layer_norm_eps=1e-5, hidden_act="gelu_new", num_key_value_heads=4),
    "phi-norms": family("phi", layer_norm_eps=1e-4, qk_layernorm=True, partial_rotary_factor=0.25),
    "gemma": family(
        "gemma", hidden_act="gelu", tie_word_embeddings=True, head_dim=24, num_key_value_heads=1
    ),
    "stablelm": family("stablelm", layer_norm_eps=1e-4, num_key_value_heads=4),
    "stablelm-bias": family("stablelm", layer_norm_eps=1e-5, use_qkv_bias=True),
    "stablelm-12b": family(
        "stablelm", layer_norm_eps=1e-5, qk_layernorm=True, use_parallel_residual=True
    ),
    "starcoder2": family(
        "starcoder2", norm_epsilon=1e-4, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"
    ),
    "starcoder2-window": family(
        "starcoder2", norm_epsilon=1e-5, hidden_act="gelu", use_bias=False, sliding_window=19
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])
