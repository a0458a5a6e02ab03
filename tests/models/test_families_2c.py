"""Gemma 3 gives the logits of transformers, alone and as the text part of a larger model."""

import numpy as np
import pytest
import torch

from relaxlm import models
from relaxlm.errors import UnsupportedError
from relaxlm.models.config import unknown_fields
from tests.models import parity
from tests.models.parity import VOCAB, Compiled, tiny_config
from tests.shared_data import SHARED, needs_shared_data

GEMMA = tiny_config(
    "gemma3_text",
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=24,
    num_hidden_layers=3,
    rope_local_base_freq=300.0,
    sliding_window=21,
    pad_token_id=0,
)
VARIANTS = {
    "pattern": {**GEMMA, "sliding_window_pattern": 2, "tie_word_embeddings": True},
    "scaled": {
        **GEMMA,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "attention_bias": True,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


def test_quantized() -> None:
    parity.check_quantized(VARIANTS["pattern"])


def test_the_text_part_of_the_larger_model() -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    text = {k: v for k, v in VARIANTS["pattern"].items() if k != "model_type"}
    raw = {
        "model_type": "gemma3",
        "text_config": {**text, "model_type": "gemma3_text"},
        "vision_config": {**vision, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 1,
        "boi_token_index": 2,
        "eoi_token_index": 3,
    }
    model = parity.reference_model(raw)
    # As published; transformers renames tensors when it reads them.
    state = {
        name.replace("model.language_model.", "language_model.model."): tensor
        for name, tensor in model.state_dict().items()
    }
    compiled = Compiled(raw, parity.stored_parameters(raw, state, "q0f32"), "q0f32")
    ids = np.random.default_rng(5).integers(4, VOCAB, 40)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[None])).logits[0].numpy()
    (logits,) = compiled.run([ids], [23, 1, 16])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_window_for_every_layer_leaves_the_rotary_embeddings_alone() -> None:
    config = models.load_config({**GEMMA, "sliding_window_pattern": 2})
    assert config.windows == (21, 0, 21)
    thetas = [300.0, 5000.0, 300.0]
    limited = config.with_window(32, 0)
    assert limited.windows == (32, 32, 32)
    assert [limited.layer_rope(layer).rope_theta for layer in range(3)] == thetas
    longer = limited.for_context(1024)
    assert [longer.layer_rope(layer).rope_theta for layer in range(3)] == thetas


def test_new_spelling_of_rotary_embeddings() -> None:
    old = models.load_config({**VARIANTS["scaled"]})
    raw = {k: v for k, v in VARIANTS["scaled"].items() if not k.startswith("rope")}
    parts = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
    new = models.load_config({**raw, "rope_parameters": parts})
    assert new == old


@pytest.mark.parametrize(
    "change",
    [
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"use_bidirectional_attention": True},
        {"hidden_activation": "gelu"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_implemented_is_refused_by_name(change: dict) -> None:
    (name,) = change
    with pytest.raises(UnsupportedError, match=f"{name} = .* is not supported"):
        models.load_config({**GEMMA, **change})


@needs_shared_data
def test_a_published_configuration() -> None:
    path = SHARED / "configs" / "gemma-3-27b-it.json"
    config = models.load_config(path)
    assert unknown_fields(config, models.raw_config(path)[0]) == []
    assert config.windows[:7] == (1024, 1024, 1024, 1024, 1024, 0, 1024)
    assert config.rope.factor == 8.0 and config.local_rope.rope_theta == 10000.0
    assert config.attention_scale == 168**-0.5
    names = [spec.name for spec in models.parameter_specs(config)]
    assert names[1] == "language_model.model.layers.0.self_attn.q_proj.weight"
