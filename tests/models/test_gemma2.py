"""Gemma 2 gives the logits of transformers, with and without its caps."""

import numpy as np
import pytest

from relaxlm import models
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.config import unknown_fields
from relaxlm.quantization.schemes import get_scheme
from tests.models import parity
from tests.models.parity import tiny_config

GEMMA = tiny_config(
    "gemma2",
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    head_dim=24,
    query_pre_attn_scalar=20,
    # Low, so that nothing is right without them.
    attn_logit_softcapping=0.7,
    final_logit_softcapping=1.5,
    sliding_window=21,
    pad_token_id=0,
    tie_word_embeddings=True,
)
VARIANTS = {
    "capped": GEMMA,
    "uncapped": {
        **GEMMA,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention"],
        "attention_bias": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


def test_quantized() -> None:
    parity.check_quantized(GEMMA)


def test_batch_invariant() -> None:
    model = parity.reference_model(GEMMA)
    params = parity.stored_parameters(GEMMA, dict(model.state_dict()), "q0f32")
    compiled = parity.Compiled(GEMMA, params, "q0f32", opt="batch_invariant=1")
    ids = np.random.default_rng(5).integers(0, parity.VOCAB, 50)
    (logits,) = compiled.run([ids], [30, 1, 19])
    np.testing.assert_allclose(logits, parity.reference_logits(model, ids), rtol=1e-4, atol=1e-5)


def test_every_other_layer_has_a_window() -> None:
    config = models.load_config({**GEMMA, "num_hidden_layers": 5})
    assert config.windows == (21, 0, 21, 0, 21)
    assert config.attention_scale == 20**-0.5
    assert unknown_fields(config, GEMMA) == []


def test_parameters_have_their_published_names() -> None:
    specs = models.parameter_specs(models.load_config(GEMMA))
    layer = [spec.name.removeprefix("model.layers.0.") for spec in specs if ".0." in spec.name]
    assert sorted(layer) == [
        "input_layernorm.weight",
        "mlp.down_proj.weight",
        "mlp.gate_up_proj.weight",
        "post_attention_layernorm.weight",
        "post_feedforward_layernorm.weight",
        "pre_feedforward_layernorm.weight",
        "self_attn.o_proj.weight",
        "self_attn.qkv_proj.weight",
    ]
    shifted = {spec.name for spec in specs if spec.sources[0].shift == 1}
    assert shifted == {spec.name for spec in specs if "norm" in spec.name}
    assert all(get_scheme("q4f16_1").for_role(spec.role) for spec in specs if spec.role != "vector")


@pytest.mark.parametrize(
    ("change", "field", "error"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention", UnsupportedError),
        ({"hidden_activation": "silu"}, "hidden_activation", UnsupportedError),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping", ConfigError),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict, field: str, error: type) -> None:
    with pytest.raises(error, match=field):
        models.load_config({**GEMMA, **change})
