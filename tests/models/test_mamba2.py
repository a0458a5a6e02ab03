"""Mamba 2 gives the logits of transformers, in whatever steps its tokens come."""

import json
import math

import pytest

from relaxlm import models
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.config import unknown_fields
from tests.models import stateful
from tests.models.parity import VOCAB

MAMBA = {
    "model_type": "mamba2",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 24,
    "n_groups": 2,
    "expand": 2,
    "conv_kernel": 3,
    "layer_norm_epsilon": 1e-3,
    "chunk_size": 16,
    "use_bias": True,
    "time_step_limit": [0.3, 0.9],
    "residual_in_fp32": True,
}


def test_logits_match_transformers() -> None:
    stateful.check_transformers(MAMBA)


def test_without_biases_and_limits_with_one_group_and_tied() -> None:
    raw = {
        **MAMBA,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": False,
        "time_step_limit": [0.0, math.inf],
        "tie_word_embeddings": True,
    }
    stateful.check_transformers(raw, quantized=False)


def test_published_configurations_are_read() -> None:
    # Fields of Mamba-Codestral-7B-v0.1, as far as they are not bookkeeping.
    raw = {
        "model_type": "mamba2",
        "chunk_size": 256,
        "conv_kernel": 4,
        "expand": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "layer_norm_epsilon": 1e-05,
        "n_groups": 8,
        "norm_before_gate": True,
        "num_heads": 128,
        "num_hidden_layers": 64,
        "rescale_prenorm_residual": False,
        "residual_in_fp32": True,
        "rms_norm": True,
        "state_size": 128,
        "tie_word_embeddings": False,
        "time_step_floor": 0.0001,
        "time_step_init_scheme": "random",
        "time_step_limit": [0.0, math.inf],
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "time_step_rank": 256,
        "time_step_scale": 1.0,
        "use_bias": False,
        "use_conv_bias": True,
        "vocab_size": 32768,
    }
    config = models.load_config(raw)
    assert unknown_fields(config, raw) == []
    conv, scan = config.layer_states(5)
    assert (conv.shape, scan.shape) == ((3, 10240), (128, 128, 64))


@pytest.mark.parametrize("spelled", [None, {"__float__": "Infinity"}, math.inf])
def test_infinity_is_read_in_every_spelling(spelled: object) -> None:
    raw = json.loads(json.dumps({**MAMBA, "time_step_limit": [0.0, spelled]}))
    assert models.load_config(raw).time_step_limit == (0.0, math.inf)


def test_what_decides_how_states_fade_stays_float32_and_filters_are_not_quantized() -> None:
    dtypes = stateful.stored_dtypes(MAMBA)
    layer = {
        name.removeprefix("model.layers.0.mixer."): dtype
        for name, dtype in dtypes.items()
        if name.startswith("model.layers.0.mixer.")
    }
    assert {name for name, dtype in layer.items() if dtype == "float32"} == {
        *("A_log", "D", "dt_bias"),
    }
    assert layer["conv1d_weight"] == layer["conv1d_bias"] == "float16"
    assert {name for name, dtype in layer.items() if dtype == "uint32"} == {
        "in_proj.q_weight",
        "out_proj.q_weight",
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act = 'gelu' is not supported"),
        ({"rms_norm": False}, UnsupportedError, "rms_norm = False is not supported"),
        ({"n_groups": 3}, ConfigError, "8 heads in 3 groups: expected groups of one size"),
        ({"num_heads": 4}, ConfigError, "4 heads of 16 features: expected expand = 2 times"),
        ({"time_step_limit": [0.9, 0.1]}, ConfigError, "time_step_limit = "),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    change: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        models.load_config({**MAMBA, **change})
