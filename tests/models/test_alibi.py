"""Families that know distances by ALiBi, and Falcon, give the logits of transformers.

Checkpoints and their config.json are as transformers writes them.
"""

import numpy as np
import pytest
import torch
import transformers

from relaxlm import models
from relaxlm.errors import ConfigError
from relaxlm.models.alibi import slopes
from tests.models import numpy_decoders, parity
from tests.models.parity import VOCAB

pytestmark = pytest.mark.usefixtures("published")
SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bloom(**change) -> dict:
    return {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, **SMALL, **change}


def mpt(attn_config: dict | None = None, **change) -> dict:
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}
    attention = {"attn_config": attn_config} if attn_config else {}
    return {"model_type": "mpt", **sizes, **attention, **SMALL, **change}


def falcon(**change) -> dict:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {"model_type": "falcon", **sizes, **SMALL, **change}


VARIANTS = {
    "bloom": bloom(),
    "bloom-6-heads": bloom(n_head=6, hidden_size=96, layer_norm_epsilon=1e-3),
    "mpt": mpt(),
    "mpt-clip": mpt({"clip_qkv": 0.4, "softmax_scale": 0.3}, n_heads=3, d_model=48),
    "falcon-7b": falcon(),
    "falcon-40b": falcon(new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False),
    "falcon-11b": falcon(
        new_decoder_architecture=True,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
        ffn_hidden_size=112,
        rope_theta=5000.0,
    ),
    "falcon-mha": falcon(bias=True, multi_query=False, layer_norm_epsilon=1e-3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


# Heads that come one by one, in one matrix, by groups.
@pytest.mark.parametrize("variant", ["bloom-6-heads", "mpt-clip", "falcon-40b"])
def test_quantized(variant: str) -> None:
    parity.check_quantized(VARIANTS[variant])


def test_falcon_with_biases_by_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon RW. "eager", with which references are made, has transformers add the biases twice."""
    build = parity.reference_model
    monkeypatch.setattr(parity, "reference_model", lambda raw: with_sdpa(build(raw)))
    # 8 heads: bfloat16, which transformers rounds biases to, holds all of them here.
    one_after_the_other = {"multi_query": False, "parallel_attn": False, "num_attention_heads": 8}
    parity.check_parity(falcon(alibi=True, bias=True, **one_after_the_other))


def with_sdpa(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    model.config._attn_implementation = "sdpa"
    return model


def test_steeper_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """`alibi_bias_max` of MPT StoryWriter, which transformers' own model forgets to pass on."""
    from transformers.models.mpt import modeling_mpt

    build = modeling_mpt.build_mpt_alibi_tensor

    def steeper(heads: int, length: int, alibi_bias_max: int, device: str) -> torch.Tensor:
        assert alibi_bias_max == 8
        return build(heads, length, 16, device)

    monkeypatch.setattr(modeling_mpt, "build_mpt_alibi_tensor", steeper)
    parity.check_parity(mpt({"alibi_bias_max": 16}))


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12, 16, 32, 40, 71, 112])
def test_slopes(heads: int) -> None:
    from transformers.models.bloom import modeling_bloom

    theirs = modeling_bloom._get_alibi_slopes(heads, torch.device("cpu"))
    np.testing.assert_allclose(slopes(heads), theirs.numpy(), rtol=1e-6)
    np.testing.assert_allclose(slopes(heads), numpy_decoders.interleaved_slopes(heads), rtol=1e-12)


REFUSED = {
    "bloom-residual": (
        bloom(apply_residual_connection_post_layernorm=True),
        "config.json: apply_residual_connection_post_layernorm = True is not supported: "
        "Input should be False",
    ),
    "mpt-prefix": (
        mpt({"prefix_lm": True}),
        "config.json: attn_config.prefix_lm = True is not supported: Input should be False",
    ),
    "mpt-mqa": (
        mpt({"attn_type": "multiquery_attention"}),
        "config.json: attn_config.attn_type = 'multiquery_attention' is not supported: "
        "Input should be 'multihead_attention'",
    ),
    "mpt-norms": (
        mpt({"qk_ln": True}),
        "config.json: attn_config.qk_ln = True is not supported: Input should be False",
    ),
    "mpt-positions": (
        mpt({"alibi": False}),
        "config.json: attn_config.alibi = False is not supported: Input should be True",
    ),
    "mpt-rope": (
        mpt({"rope": True}),
        "config.json: attn_config.rope = True: Extra inputs are not permitted",
    ),
    "mpt-logits": (
        mpt(logit_scale="inv_sqrt_d_model"),
        "config.json: logit_scale = 'inv_sqrt_d_model': Input should be None",
    ),
    "mpt-bias": (
        mpt(no_bias=False),
        "config.json: no_bias = False is not supported: Input should be True",
    ),
    "mpt-inner": (
        mpt(expansion_ratio=2),
        "config.json: expansion_ratio = 2 is not supported: Input should be 4",
    ),
    "falcon-norms": (
        falcon(num_ln_in_parallel_attn=2),
        "config.json: Value error, num_ln_in_parallel_attn = 2 needs new_decoder_architecture",
    ),
    "falcon-one-after-the-other": (
        falcon(new_decoder_architecture=True, parallel_attn=False),
        "config.json: Value error, new_decoder_architecture needs parallel_attn",
    ),
    "falcon-heads": (
        falcon(multi_query=False, num_kv_heads=2),
        "config.json: Value error, num_kv_heads = 2, expected num_attention_heads = 4 without "
        "multi_query and new_decoder_architecture",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str) -> None:
    raw, text = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        models.load_config(raw)
    assert str(error.value) == text


def test_texts_may_be_longer_than_the_trained_ones() -> None:
    config = models.load_config(bloom())
    assert config.for_context(100_000) is config
