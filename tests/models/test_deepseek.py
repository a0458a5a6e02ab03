"""DeepSeek-V2, DeepSeek-V3 and Kimi K2 give the logits of transformers, with latents as cache."""

import pytest

from relaxlm import models
from relaxlm.compiler.build import describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.quantization.schemes import get_scheme
from tests.models import parity
from tests.models.parity import tiny_config

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}


def config(**change) -> dict:
    """Every size differs from the others."""
    return tiny_config(
        **{
            "model_type": "deepseek_v2",
            "num_key_value_heads": 4,
            "head_dim": None,
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 16,
            "v_head_dim": 20,
            "first_k_dense_replace": 1,
            "n_routed_experts": 6,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            **change,
        },
    )


DENSE = config(first_k_dense_replace=2, q_lora_rank=28, attention_bias=True, mlp_bias=True)
VARIANTS = {
    "dense": DENSE,
    "lite": config(rope_scaling=YARN),
    "groups": config(
        q_lora_rank=28,
        n_routed_experts=8,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
        first_k_dense_replace=0,
    ),
}
V3 = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 12,
    "n_group": 3,
    "topk_group": 2,
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 2.3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "norm_topk_prob": True,
}
VARIANTS |= {
    "v3": config(**V3, q_lora_rank=28, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "v3-unnormed": config(**{**V3, "norm_topk_prob": False, "n_shared_experts": 1}),
    # One group of experts, and mscales that differ.
    "kimi": config(
        **{
            **V3,
            "model_type": "kimi_k2",
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
        },
        attention_bias=True,
        rope_scaling={**YARN, "beta_fast": 1},
    ),
}


def reference_config(raw: dict) -> dict:
    """transformers knows Kimi K2 by the name of the model that it is one of."""
    named = {**raw, "model_type": raw["model_type"].replace("kimi_k2", "deepseek_v3")}
    return {key: value for key, value in named.items() if key != "head_dim"}


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    original = parity.reference_model
    monkeypatch.setattr(parity, "reference_model", lambda raw: original(reference_config(raw)))


@pytest.mark.usefixtures("references", "published")
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_match_transformers(name: str) -> None:
    parity.check_parity(VARIANTS[name])


@pytest.mark.usefixtures("references", "published")
@pytest.mark.parametrize("name", ["lite", "v3"])
def test_quantized_logits_match_transformers(name: str) -> None:
    parity.check_quantized(VARIANTS[name])


def describe(raw: dict, overrides: str = "", device: str = "cpu"):
    read, scheme = models.load_config(raw), get_scheme("q0f32")
    options = CompileOptions.resolve(read, scheme, None, overrides, "O2")
    return describe_model(read, raw, scheme, resolve_device(device), options)


def test_the_cache_holds_latents() -> None:
    cache = describe(DENSE, "kv_cache_dtype=float16").kv_cache
    assert [tuple(tensor.shape) for tensor in cache.tensors] == [(16, 32 + 16)] * 2
    assert cache.bytes_per_token == 2 * (32 + 16) * 2


@pytest.mark.parametrize("overrides", ["kv_cache_dtype=fp8", "sliding_window_size=32"])
def test_what_has_no_kernels_is_refused(overrides: str) -> None:
    with pytest.raises(UnsupportedError, match=overrides.split("=")[0]):
        describe(DENSE, overrides)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"topk_method": "noaux_tc"}, UnsupportedError, "topk_method = 'noaux_tc'"),
        ({"norm_topk_prob": True}, UnsupportedError, "norm_topk_prob = True"),
        ({"num_key_value_heads": 2}, ConfigError, "num_key_value_heads = 2"),
        ({"qk_head_dim": 41}, ConfigError, "qk_head_dim = 41, expected .* 40"),
        ({**V3, "scoring_func": "softmax"}, UnsupportedError, "scoring_func = 'softmax'"),
        ({**V3, "rope_interleave": False}, UnsupportedError, "rope_interleave = False"),
        ({**V3, "n_group": 5}, ConfigError, "12 experts in n_group = 5 groups"),
        ({**V3, "num_experts_per_tok": 9}, ConfigError, "num_experts_per_tok = 9 of the 4"),
    ],
)
def test_configurations_are_refused_by_name(change, kind, message) -> None:
    with pytest.raises(kind, match=message):
        models.load_config(config(**change))


def test_layers_that_predict_further_tokens_may_stay_unused() -> None:
    ignored = models.ignored_sources(models.load_config(VARIANTS["v3"]))
    assert "model.layers.2.*" in ignored
    assert "model.layers.2.*" not in models.ignored_sources(models.load_config(DENSE))


def test_routers_keep_their_precision() -> None:
    """Choices hang on small differences: the bias is float32, the router at least float16."""
    raw = config(**{**V3, "model_type": "kimi_k2", "n_routed_experts": 384})
    scheme = get_scheme("q4f16_1")
    specs = {spec.name: spec for spec in models.parameter_specs(models.load_config(raw))}
    stored = {
        name.rpartition("mlp.")[2]: scheme.storage(specs[name])
        for name in specs
        if name.startswith("model.layers.1.mlp.") and "proj" not in name
    }
    assert {part: list(found.values()) for part, found in stored.items()} == {
        "gate.weight": [((384, 64), "float16")],
        "e_score_correction_bias": [((384,), "float32")],
    }
