"""More mixtures of experts give the logits of transformers."""

import pytest

from relaxlm import models
from relaxlm.errors import UnsupportedError
from tests.models import parity
from tests.models.parity import tiny_config

BIASED = {
    "n_routed_experts": 9,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_group": 3,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
# The compiled model is for texts of up to 256 tokens, which is more than 32.
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i / 8 for i in range(8)],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 32,
}
PHI = {"intermediate_size": 40, "num_local_experts": 5, "attention_bias": True}
VARIANTS = {
    "glm4_moe": tiny_config(
        "glm4_moe", **BIASED, n_shared_experts=2, use_qk_norm=True, attention_bias=True
    ),
    # One group, and a window in the second layer.
    "dots1": tiny_config(
        "dots1",
        **{**BIASED, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        n_shared_experts=1,
        attention_bias=True,
        sliding_window=19,
        max_window_layers=1,
    ),
    "minimax_m2": tiny_config(
        "minimax_m2",
        intermediate_size=40,
        num_local_experts=6,
        num_experts_per_tok=3,
        rotary_dim=8,
    ),
    "ernie4_5_moe": tiny_config(
        "ernie4_5_moe",
        moe_num_experts=6,
        moe_k=3,
        moe_num_shared_experts=2,
        moe_intermediate_size=40,
        tie_word_embeddings=True,
    ),
    "olmoe": tiny_config(
        "olmoe", intermediate_size=40, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True
    ),
    "granitemoe": tiny_config(
        "granitemoe",
        intermediate_size=40,
        num_local_experts=5,
        embedding_multiplier=3.0,
        logits_scaling=0.7,
        residual_multiplier=0.6,
        attention_multiplier=0.3,
        attention_bias=True,
    ),
    "phimoe": tiny_config("phimoe", **PHI, lm_head_bias=True, sliding_window=21),
    # So much jitter that some experts are near enough to count and some are not.
    "phimoe-long": tiny_config("phimoe", **PHI, router_jitter_noise=0.4, rope_scaling=LONGROPE),
}


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias = True"),
        ("minimax_m2", {"attn_type_list": [1, 0]}, r"attn_type_list.1 = 0"),
        ("minimax_m2", {"shared_intermediate_size": 64}, "shared_intermediate_size = 64"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok = 3"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ],
)
def test_what_is_not_there_is_refused_by_name(variant: str, change: dict, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        models.load_config({**VARIANTS[variant], **change})


@pytest.mark.parametrize("model_type", ["mixtral", "minimax_m2", "olmoe", "granitemoe"])
def test_shared_experts_are_refused_where_a_family_has_none(model_type: str) -> None:
    raw = VARIANTS.get(model_type) or tiny_config(model_type)
    assert models.load_config({**raw, "n_shared_experts": 0}).num_experts
    with pytest.raises(UnsupportedError) as error:
        models.load_config({**raw, "n_shared_experts": 2})
    assert str(error.value) == (
        "config.json: n_shared_experts = 2 is not supported: Input should be 0"
    )
