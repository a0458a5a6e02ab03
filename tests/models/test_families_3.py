"""Dense families near to others give transformers' logits, from checkpoints as it writes them."""

import numpy as np
import pytest

from relaxlm import models
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.config import unknown_fields
from tests.models import parity
from tests.models.test_families_1 import family

pytestmark = pytest.mark.usefixtures("published")


def with_window(model_type: str, **change) -> dict:
    """Every second of two layers reads everything."""
    layer_types = ["sliding_attention", "full_attention"]
    raw = family(model_type, **{"layer_types": layer_types, "sliding_window": 19, **change})
    return without(raw, *(["rms_norm_eps"] if model_type == "cohere2" else []))


def without(raw: dict, *names: str) -> dict:
    return {name: value for name, value in raw.items() if name not in names}


def opt(**change) -> dict:
    raw = family("opt", ffn_dim=112, num_key_value_heads=4, tie_word_embeddings=True, **change)
    return without(raw, "intermediate_size", "hidden_act", "rms_norm_eps", "rope_theta")


THETA = {"rope_type": "default", "rope_theta": 5000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
ALPHA = {
    "type": "dynamic",
    "alpha": 30.0,
    "factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
OLMO3 = without(
    with_window("olmo3", rope_parameters={"full_attention": YARN, "sliding_attention": THETA}),
    "rope_theta",
)
XIELU = family("apertus", hidden_act="xielu")
VARIANTS = {
    "olmo3": OLMO3,
    "cohere2": with_window("cohere2", layer_norm_eps=1e-4, logit_scale=0.3),
    "cohere2-bias": with_window("cohere2", attention_bias=True, tie_word_embeddings=True),
    "exaone4": with_window("exaone4"),
    "exaone4-whole": with_window(
        "exaone4", layer_types=["full_attention"] * 2, sliding_window=None, tie_word_embeddings=True
    ),
    "seed_oss": family("seed_oss"),
    "seed_oss-biases": family(
        "seed_oss", attention_bias=False, attention_out_bias=True, mlp_bias=True
    ),
    "ernie4_5": family("ernie4_5", tie_word_embeddings=True),
    "ernie4_5-bias": family("ernie4_5", use_bias=True, num_key_value_heads=4),
    "hunyuan_v1_dense": family(
        "hunyuan_v1_dense", rope_scaling=ALPHA, tie_word_embeddings=True, attention_bias=True
    ),
    "hunyuan_v1_dense-plain": family("hunyuan_v1_dense"),
    "opt": opt(),
    "opt-plain": opt(enable_bias=False, activation_function="gelu"),
    "opt-350m": opt(do_layer_norm_before=False, word_embed_proj_dim=32),
    "opt-no-norm": opt(
        _remove_final_layer_norm=True, layer_norm_elementwise_affine=False, word_embed_proj_dim=32
    )
    | {"tie_word_embeddings": False},
    "apertus": without(XIELU, "rope_theta"),
    "apertus-bias": {**XIELU, "attention_bias": True, "rope_parameters": YARN},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


QUANTIZED = ["olmo3", "cohere2", "exaone4", "seed_oss-biases", "ernie4_5", "hunyuan_v1_dense"]


@pytest.mark.parametrize("variant", [*QUANTIZED, "opt", "opt-350m", "apertus-bias"])
def test_quantized(variant: str) -> None:
    parity.check_quantized(VARIANTS[variant])


EVERY_FOURTH = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(6)]


@pytest.mark.parametrize("model_type", ["olmo3", "cohere2", "exaone4"])
def test_every_fourth_layer_reads_everything(model_type: str) -> None:
    config = models.load_config(family(model_type, num_hidden_layers=6))
    assert list(config.windows) == [0 if "full" in kind else 4096 for kind in EVERY_FOURTH]
    ropes = [config.layer_rope(layer) is not None for layer in range(6)]
    assert ropes == ([True] * 6 if model_type == "olmo3" else [w > 0 for w in config.windows])


def test_only_layers_that_read_everything_scale_their_positions() -> None:
    raw = without(OLMO3, "rope_parameters")
    config = models.load_config({**raw, "rope_scaling": YARN, "rope_theta": 7e4})
    assert [config.layer_rope(layer).rope_type for layer in range(2)] == ["default", "yarn"]
    assert config.layer_rope(0).rope_theta == 7e4
    assert config.for_context(100).local_rope == config.local_rope


def test_published_fields_are_known() -> None:
    """What config.json of Command A and of Hunyuan have beside what transformers reads."""
    published = {
        "cohere2": {
            "layer_switch": 4,
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "rotary_pct": 1.0,
            "sliding_window_pattern": 4,
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
            "use_parallel_embedding": True,
            "use_qk_norm": False,
        },
        "hunyuan_v1_dense": {
            "attention_head_dim": 16,
            "cla_share_factor": 2,
            "dense_list": [64, 0],
            "mlp_bias": False,
            "norm_type": "rms",
            "org_vocab_size": 131,
            "pool_type": "last",
            "rope_scaling": ALPHA,
            "use_cla": False,
            "use_qk_norm": True,
            "use_rotary_pos_emb": True,
        },
    }
    for model_type, fields in published.items():
        raw = with_window(model_type, **fields)
        assert unknown_fields(models.load_config(raw), raw) == []


def test_the_base_of_hunyuan_grows_once() -> None:
    """gen_config keeps rope_scaling and writes the base beside it."""
    config = models.load_config(family("hunyuan_v1_dense", rope_scaling=ALPHA))
    assert config.rope.rope_theta == 5000.0
    base = 5000.0 * 30.0 ** (16 / 14)
    expected = base ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(config.rope.inverse_frequencies(16), expected, rtol=1e-6)


REFUSED = {
    "cohere2-pattern": (
        without(with_window("cohere2", sliding_window_pattern="LLLG"), "layer_types"),
        "config.json: _sliding_window_pattern = 'LLLG': Input should be a valid integer, unable to "
        "parse string as an integer",
    ),
    "cohere2-norms": (
        with_window("cohere2", use_qk_norm=True),
        "config.json: use_qk_norm = True is not supported: Input should be False",
    ),
    "cohere2-one-after-the-other": (
        with_window("cohere2", use_parallel_block=False),
        "config.json: use_parallel_block = False is not supported: Input should be True",
    ),
    "exaone4-pattern": (
        family("exaone4", sliding_window=19, sliding_window_pattern="LLLG"),
        "config.json: sliding_window_pattern = 'LLLG' is not supported without layer_types: "
        "expected a number of layers",
    ),
    "hunyuan-shared-cache": (
        family("hunyuan_v1_dense", use_cla=True),
        "config.json: use_cla = True is not supported: Input should be False",
    ),
    "hunyuan-rope": (
        family("hunyuan_v1_dense", rope_scaling={"type": "linear", "factor": 2.0}),
        "config.json: rope_parameters.rope_type = 'linear' is not supported: "
        "Input should be 'ntk_alpha', 'default'",
    ),
    "apertus-activation": (
        family("apertus", hidden_act="silu"),
        "config.json: hidden_act = 'silu' is not supported: Input should be 'xielu'",
    ),
}


def test_projected_embeddings_are_no_vectors_of_texts() -> None:
    config = models.load_config(opt(word_embed_proj_dim=32), "embedding")
    with pytest.raises(UnsupportedError, match="word_embed_proj_dim = 32 is not supported for emb"):
        models.parameter_specs(config)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str) -> None:
    raw, text = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        models.load_config(raw)
    assert str(error.value) == text
