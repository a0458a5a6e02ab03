"""Configurations: old and new spellings, what transformers fills in, and what is refused."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from relaxlm import models
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.config import DecoderConfig, text_fields, unknown_fields
from tests.models.parity import tiny_config
from tests.shared_data import SHARED, needs_shared_data

# With these, every family's own number of key-value heads fits.
SIZES = {"hidden_size": 2048, "num_attention_heads": 128}
# Fields that transformers leaves open, too.
OPEN = {"dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}}


@pytest.mark.parametrize("model_type", sorted(set(models.MODELS) & set(CONFIG_MAPPING_NAMES)))
def test_absent_fields_read_as_transformers_fills_them_in(model_type: str) -> None:
    """Every default of ours is the one transformers' configuration class has."""
    raw = tiny_config(model_type, **SIZES, **OPEN.get(model_type, {}))
    module = import_module(f"relaxlm.models.{models.MODELS[model_type]}")
    absent = module.Config.absent
    for field in {"rope_theta", "tie_word_embeddings", "num_key_value_heads", "head_dim", *absent}:
        raw.pop(field, None)
    ours = models.load_config(raw)
    theirs: Any = transformers.AutoConfig.for_model(**raw)
    if hasattr(theirs, "text_config"):
        kind = theirs.text_config.model_type
        theirs = transformers.AutoConfig.for_model(**{**raw, "model_type": kind})
    ropes = getattr(theirs, "rope_parameters", None) or {}
    ropes = ropes.get("full_attention", ropes)
    for field, value in absent.items():
        if field in ropes:
            assert value == ropes[field]
        elif hasattr(theirs, field):
            # None stands for what is not there.
            assert value == getattr(theirs, field) or (not value and not getattr(theirs, field))
    if ropes:
        assert ours.rope.rope_type == ropes["rope_type"]
        assert ours.rope.partial_rotary_factor == ropes.get("partial_rotary_factor", 1.0)
        for field, value in ours.rope.model_dump().items():
            assert value == ropes.get(field, value)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    if hasattr(theirs, "num_key_value_heads"):
        heads = theirs.num_key_value_heads or theirs.num_attention_heads
        assert ours.num_key_value_heads == heads
    kinds = getattr(theirs, "layer_types", None)
    if kinds is not None:
        _check_layers(ours, kinds)


def _check_layers(config: DecoderConfig, kinds: list[str]) -> None:
    """Layers attend, and have a window, as `layer_types` says; others do neither."""
    others = ("linear_attention", "conv", "mlp", "moe")
    attends = [config.has_pages(layer) for layer in range(config.num_hidden_layers)]
    assert attends == [kind not in others for kind in kinds]
    plain = (*others, "full_attention")
    assert [window > 0 for window in config.windows] == [kind not in plain for kind in kinds]


def test_number_of_kv_heads_defaults_to_that_of_heads() -> None:
    raw = tiny_config("llama")
    del raw["num_key_value_heads"]
    assert models.load_config(raw).num_key_value_heads == raw["num_attention_heads"]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "default", "partial_rotary_factor": 0.25},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
        {"rope_type": "proportional", "partial_rotary_factor": 0.25},
        {"rope_type": "proportional", "partial_rotary_factor": 0.75, "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 4096,
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "attention_factor": 1.25,
            "original_max_position_embeddings": 4096,
        },
        {
            "rope_type": "longrope",
            "short_factor": [1.0 + i / 64 for i in range(64)],
            "long_factor": [1.0 + i / 4 for i in range(64)],
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: "-".join(str(value)[:8] for value in rope.values()),
)
@pytest.mark.parametrize("context", [60, 256, 700])
def test_inverse_frequencies_are_those_of_transformers(rope: dict, context: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = tiny_config("llama", head_dim=128, rope_parameters={**rope, "rope_theta": 500000.0})
    config = transformers.AutoConfig.for_model(**raw)
    kind = rope["rope_type"]
    if kind == "default":
        raw_dim = int(128 * rope.get("partial_rotary_factor", 1.0))
        config.head_dim = raw_dim
        theirs, factor = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=context)
    ours = models.load_config(raw).for_context(context).rope
    frequencies = ours.inverse_frequencies(128)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, theirs.numpy(), rtol=1e-6, atol=0)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)
    assert 2 * len(frequencies) == ours.rotary_dim(128)


def test_old_and_new_spelling_of_rope_are_one() -> None:
    old = tiny_config("llama", rope_scaling={"type": "linear", "factor": 2.0})
    new = tiny_config("llama")
    del new["rope_theta"]
    new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    assert models.load_config(old).rope == models.load_config(new).rope


BAD = {
    "model_type": (
        {"model_type": "mamba"},
        "config.json: model_type 'mamba' is not supported. Supported: " + ", ".join(models.MODELS),
    ),
    "feature": (
        {"model_type": "deepseek_v32"},
        "config.json: model_type 'deepseek_v32' is not supported: it has sparse attention, whose "
        "indexer chooses the tokens to attend to (index_topk). Supported: "
        + ", ".join(models.MODELS),
    ),
    "no-model_type": (
        {"model_type": None},
        "config.json: model_type is missing. Is this the config.json of a Hugging Face model?",
    ),
    "activation": (
        {"hidden_act": "quick_gelu"},
        "config.json: hidden_act = 'quick_gelu' is not supported: Input should be 'silu', 'gelu', "
        "'gelu_new', 'gelu_fast', 'gelu_tanh', 'gelu_pytorch_tanh', 'relu' or 'relu2'",
    ),
    "rope": (
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        "config.json: rope_parameters.rope_type = 'mrope' is not supported: "
        "Input should be 'default', 'linear', 'proportional', 'dynamic', 'llama3', 'yarn', "
        "'longrope'",
    ),
    "rope-field": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}},
        "config.json: rope.mscale = 1.0: Extra inputs are not permitted",
    ),
    "missing": (
        {"vocab_size": None},
        "config.json: vocab_size is missing. Is this the config.json of the model itself?",
    ),
    "heads": (
        {"num_key_value_heads": 3},
        "config.json: Value error, num_attention_heads = 4 is not a multiple of "
        "num_key_value_heads = 3",
    ),
    "odd-heads": (
        {"head_dim": 15},
        "config.json: Value error, head_dim = 15 is odd, rotary embeddings need pairs",
    ),
    "negative": (
        {"hidden_size": -4},
        "config.json: hidden_size = -4: Input should be greater than 0",
    ),
    "layer_types": (
        {"layer_types": ["full_attention", "linear_attention"]},
        "config.json: layer_types has 2 entries, among them 'linear_attention'; expected 2, each "
        "'full_attention' or 'sliding_attention'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_supported_is_refused_by_name(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(ConfigError) as error:
        models.load_config({**tiny_config("llama"), **change})
    assert str(error.value) == message


def test_mistral_with_biases_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="attention_bias = True is not supported"):
        models.load_config(tiny_config("mistral", attention_bias=True))


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ConfigError) as error:
            models.load_config(path)
        return str(error.value)

    file = tmp_path / "config.json"
    assert message(tmp_path) == (
        f"{file}: no such file, expected a model folder with config.json in it"
    )
    file.write_text("{")
    assert message(tmp_path).startswith(f"{file}: not valid JSON")
    file.write_text("[]")
    assert message(tmp_path) == f"{file}: expected a JSON object, found a list"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer" in message(tmp_path)


def test_mlc_chat_config_is_read_like_config_json(tmp_path: Path) -> None:
    raw = tiny_config("qwen2")
    chat = {"model_type": "qwen2", "quantization": "q4f16_1", "model_config": raw}
    (tmp_path / "mlc-chat-config.json").write_text(json.dumps(chat))
    assert models.load_config(tmp_path) == models.load_config(raw)


def test_model_config_of_published_mlc_folders() -> None:
    raw = tiny_config("llama")
    published = {k: v for k, v in raw.items() if k not in ("model_type", "hidden_act")}
    published["position_embedding_base"] = published.pop("rope_theta")
    published["context_window_size"] = published.pop("max_position_embeddings")
    chat = {"model_type": "llama", "model_config": published}
    assert models.load_config(chat) == models.load_config(raw)


def test_unknown_fields_are_listed() -> None:
    raw = tiny_config("llama", use_cache=True, logit_softcap=30.0, new_switch=False)
    assert unknown_fields(models.load_config(raw), raw) == ["logit_softcap"]


@needs_shared_data
def test_real_configurations() -> None:
    """Every real configuration is read, or refused for its architecture."""
    supported = 0
    for path in sorted((SHARED / "configs").glob("*.json")):
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict) or "model_type" not in raw:
            continue
        if raw["model_type"] not in models.MODELS:
            with pytest.raises(UnsupportedError, match=r"is not supported.*\. Supported:"):
                models.load_config(path)
            continue
        config = models.load_config(path)
        assert unknown_fields(config, raw) == [], path.name
        layers = range(len(config.windows))
        kinds = text_fields(raw).get("layer_types")
        if kinds is None and raw["model_type"] == "gemma2":  # in turns, without a field for it
            kinds = ["full_attention" if i % 2 else "sliding_attention" for i in layers]
        if kinds is None and raw["model_type"] == "llama4":  # every fourth reads everything
            kinds = ["full_attention" if i % 4 == 3 else "chunked_attention" for i in layers]
        if kinds is None and raw["model_type"] == "phimoe":  # all, if there is a window
            kinds = ["sliding_attention" for _ in layers]
        if raw["model_type"] == "nemotron_h":
            pattern = raw["hybrid_override_pattern"]
            kinds = ["full_attention" if letter == "*" else "mlp" for letter in pattern]
        _check_layers(config, kinds or ["full_attention" for _ in layers])
        supported += 1
    assert supported >= 15
