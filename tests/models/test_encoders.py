"""Encoders give the states of transformers, whatever texts share a step."""

import numpy as np
import pytest

from relaxlm import models
from relaxlm.compiler.build import describe_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.step_tables import text_tables
from tests.models import parity
from tests.models.parity import VOCAB, Compiled


def bert(**change) -> dict:
    """A config.json of two small layers."""
    return {
        "model_type": "bert",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 160,
        "type_vocab_size": 2,
        **change,
    }


VARIANTS = {
    "bert": bert(),
    # As in older checkpoints; heads of a size that is no multiple of a vector.
    "xlm-roberta": bert(model_type="xlm-roberta", type_vocab_size=1, pad_token_id=1),
    "roberta": bert(model_type="roberta", pad_token_id=3),
    "bert-narrow-heads": bert(hidden_act="gelu_new", num_attention_heads=8, type_vocab_size=1),
}


def texts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    # Without the ids that mean padding, which RoBERTa's positions pass over.
    return [rng.integers(4, VOCAB, length) for length in lengths]


def exact(raw: dict) -> tuple[Compiled, object]:
    model = parity.reference_model(raw)
    params = parity.stored_parameters(raw, dict(model.state_dict()), "q0f32")
    return Compiled(raw, params, "q0f32"), model


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_match_transformers(variant: str) -> None:
    compiled, model = exact(VARIANTS[variant])
    # One token, less and more than 16, exactly so many, and blocks of rows.
    batch = texts(1, 5, 16, 17, 150)
    for states, ids in zip(compiled.run(batch, []), batch, strict=True):
        expected = parity.reference_logits(model, ids)
        np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-5)
    if variant == "bert":
        check_that_texts_do_not_touch_each_other(compiled, batch)
        check_rows_and_layers(compiled, model, batch)


def check_that_texts_do_not_touch_each_other(compiled: Compiled, batch: list[np.ndarray]) -> None:
    together = compiled.run(batch, [])
    backwards = compiled.run(batch[::-1], [])[::-1]
    for ids, one, other in zip(batch, together, backwards, strict=True):
        (alone,) = compiled.run([ids], [])
        np.testing.assert_allclose(one, alone, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def check_rows_and_layers(compiled: Compiled, model, batch: list[np.ndarray]) -> None:
    """Rows that are wanted are those of all rows; states begin and end as transformers' do."""
    tables, ids = text_tables(list(map(len, batch))), np.concatenate(batch).astype(np.int32)
    every = np.concatenate(compiled.run(batch, []))
    rows = np.array([188, 0, 5, 5], np.int32)
    found = compiled.executor.embeddings(tables, ids, rows)
    np.testing.assert_allclose(found, every[rows], rtol=1e-5, atol=1e-5)
    *layers, last = compiled.executor.hidden_states(tables, ids)
    np.testing.assert_allclose(last, every, rtol=1e-5, atol=1e-5)
    import torch

    with torch.no_grad():
        theirs = model(torch.from_numpy(batch[1][None]), output_hidden_states=True).hidden_states
    assert len(layers) == len(theirs) == 3
    for ours, expected in zip(layers, theirs, strict=True):
        np.testing.assert_allclose(ours[1:6], expected[0].numpy(), rtol=1e-4, atol=1e-5)


def test_a_quantized_encoder_computes_with_the_values_it_keeps() -> None:
    parity.check_quantized(bert(), "q4f16_1")


def test_positions_behind_padding_are_what_a_text_may_have() -> None:
    config = models.load_config(bert(model_type="xlm-roberta"))
    assert config.longest_text == 160 - 2
    with pytest.raises(ConfigError, match="has positions for 158 tokens"):
        config.for_context(159)
    sources = models.parameter_specs(config)[0].sources
    assert sources[0].other_names == ("roberta.embeddings.word_embeddings.weight",)


def test_small_tables_are_not_quantized() -> None:
    roles = {spec.name: spec.role for spec in models.parameter_specs(models.load_config(bert()))}
    assert roles["embeddings.word_embeddings.weight"] == "embedding"
    assert roles["embeddings.position_embeddings.weight"] == "vector"
    assert roles["encoder.layer.0.attention.self.qkv.weight"] == "linear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
    ],
)
def test_what_is_not_an_encoder_of_this_kind_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        models.load_config(bert(**change))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("prefill_chunk_size=100", "prefill_chunk_size = 100 is less than context_window_size"),
        ("kv_cache_dtype=fp8", "kv_cache_dtype = fp8: an encoder has no KV cache"),
    ],
)
def test_a_text_fits_into_a_step_and_there_is_no_cache(overrides: str, message: str) -> None:
    config = models.load_config(bert())
    with pytest.raises(ConfigError, match=message):
        CompileOptions.resolve(config, get_scheme("q0f32"), None, overrides)
    options = CompileOptions.resolve(config, get_scheme("q0f32"))
    assert (options.context_window_size, options.prefill_chunk_size) == (160, 2048)
    with pytest.raises(ConfigError, match="has positions for 160 tokens"):
        config.for_context(161)
    with pytest.raises(ConfigError, match="an encoder reads a text at once"):
        config.with_window(32, 0)


def test_an_encoder_is_planned_for_cuda_without_a_cache() -> None:
    config, scheme = models.load_config(bert()), get_scheme("q4f16_1")
    options = CompileOptions.resolve(config, scheme)
    info = describe_model(config, bert(), scheme, resolve_device("cuda", "sm_90"), options)
    assert info.is_encoder and info.kv_cache.tensors == [] and info.kv_cache.bytes_per_token == 0
    # Of a step of 2048 tokens: the feed-forward network's inner states, at least.
    assert info.step_bytes >= 2048 * 112 * 2
