"""Every architecture gives the logits of transformers, however the tokens arrive."""

import numpy as np
import pytest

from tests.models import parity
from tests.models.parity import Compiled, tiny_config

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5000.0,
}
VARIANTS = {
    "llama-gqa": tiny_config("llama"),
    "llama-mha": tiny_config("llama", num_key_value_heads=4),
    "llama-mqa": tiny_config("llama", num_key_value_heads=1),
    "llama-tied": tiny_config("llama", tie_word_embeddings=True),
    "llama-biases": tiny_config("llama", attention_bias=True, mlp_bias=True),
    "llama-llama3-rope": tiny_config("llama", rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": tiny_config(
        "llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    ),
    "llama-yarn": tiny_config(
        "llama",
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 5000.0,
        },
    ),
    # Where transformers has the long table already at the first token, and keeps it.
    "llama-longrope": tiny_config(
        "llama",
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [1.0 + i for i in range(8)],
            "original_max_position_embeddings": 64,
            "rope_theta": 5000.0,
        },
    ),
    "llama-wide-heads": tiny_config("llama", head_dim=24, hidden_size=80),
    "mistral": tiny_config("mistral", sliding_window=None),
    "mistral-window": tiny_config("mistral", sliding_window=21),
    "qwen2": tiny_config("qwen2"),
    "qwen2-tied": tiny_config("qwen2", tie_word_embeddings=True),
    "qwen2-window": tiny_config(
        "qwen2", use_sliding_window=True, sliding_window=19, max_window_layers=1
    ),
    "qwen3": tiny_config("qwen3"),
    "qwen3-bias": tiny_config("qwen3", attention_bias=True, tie_word_embeddings=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


def test_sequences_in_one_step_do_not_touch_each_other() -> None:
    raw = VARIANTS["qwen3"]
    model = parity.reference_model(raw)
    params = parity.stored_parameters(raw, dict(model.state_dict()), "q0f32")
    compiled = Compiled(raw, params, "q0f32")
    rng = np.random.default_rng(6)
    prompts = [rng.integers(0, parity.VOCAB, 35) for _ in range(3)]
    for ids, logits in zip(prompts, compiled.run(prompts, [20, 1, 14]), strict=True):
        expected = parity.reference_logits(model, ids)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
