"""DeepSeek-V2 gives the logits of transformers, and its cache holds latents only."""

from pathlib import Path

import numpy as np
import pytest

from relaxlm import models
from relaxlm.compiler.build import describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.quantization.schemes import get_scheme
from tests.models import parity
from tests.models.parity import tiny_config
from tests.models.test_moe import convert

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
        "deepseek_v2",
        **{
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


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_match_transformers(name, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def stored(raw: dict, state: dict, scheme: str) -> dict[str, np.ndarray]:
        return convert(raw, state, scheme, tmp_path)

    monkeypatch.setattr(parity, "stored_parameters", stored)
    parity.check_parity(VARIANTS[name])


def test_quantized_logits_match_transformers(monkeypatch: pytest.MonkeyPatch):
    original = parity.reference_model

    def reference_model(raw: dict):
        # Two parameters are made of kv_b_proj; neither is quantized, so float16 keeps these values.
        model = original(raw)
        for name, parameter in model.named_parameters():
            if "kv_b_proj" in name:
                parameter.data = parameter.data.half().float()
        return model

    monkeypatch.setattr(parity, "reference_model", reference_model)
    parity.check_quantized(DENSE)


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
    ],
)
def test_configurations_are_refused_by_name(change, kind, message) -> None:
    with pytest.raises(kind, match=message):
        models.load_config(config(**change))
