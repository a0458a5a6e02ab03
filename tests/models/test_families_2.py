"""The GPT line and GLM give the logits of transformers, however the tokens arrive."""

import numpy as np
import pytest
import torch
import transformers

from relaxlm import models
from relaxlm.compiler.build import compile_model
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.config import unknown_fields
from relaxlm.quantization.schemes import get_scheme
from tests.models import parity
from tests.models.parity import VOCAB, Compiled


def gpt_config(model_type: str, **change) -> dict:
    """Two small layers in the spelling of GPT-2's relatives."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_inner": None,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 96,
        "layer_norm_epsilon": 1e-3,
        **change,
    }


def neox_config(**change) -> dict:
    return {
        "model_type": "gpt_neox",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "layer_norm_eps": 1e-3,
        "hidden_act": "gelu",
        "max_position_embeddings": 256,
        "rotary_emb_base": 5000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        **change,
    }


VARIANTS = {
    "gpt_neox": neox_config(),
    "gpt_neox-in-turn": neox_config(
        use_parallel_residual=False, rotary_pct=1.0, hidden_act="gelu_fast", attention_bias=False
    ),
    "gpt2": gpt_config("gpt2"),
    "gpt2-scales": gpt_config(
        "gpt2",
        n_inner=112,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
        activation_function="gelu",
    ),
    "gpt2-unscaled": gpt_config("gpt2", scale_attn_weights=False, activation_function="relu"),
    "gpt_bigcode": gpt_config("gpt_bigcode"),
    "gpt_bigcode-many-heads": gpt_config(
        "gpt_bigcode", multi_query=False, tie_word_embeddings=False, n_inner=112
    ),
    "gptj": gpt_config("gptj", rotary_dim=8),
    "gptj-wide-heads": gpt_config("gptj", n_embd=88, n_head=2, rotary_dim=30, n_inner=112),
}


@pytest.fixture(autouse=True)
def names_of_published_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers renames some tensors when it reads a checkpoint; this is the way back."""
    stored, dequantized = parity.stored_parameters, parity.dequantized_state
    published = {"lm_head.weight": "embed_out.weight"}
    ours = {name: own for own, name in published.items()}

    def named(raw: dict, state: dict, names: dict[str, str]) -> dict:
        if raw["model_type"] != "gpt_neox":
            return state
        return {names.get(name, name): tensor for name, tensor in state.items()}

    def stored_as_published(raw: dict, state: dict, scheme: str) -> dict:
        return stored(raw, named(raw, state, published), scheme)

    def dequantized_as_published(raw: dict, state: dict, scheme: str) -> dict:
        return named(raw, dequantized(raw, named(raw, state, published), scheme), ours)

    monkeypatch.setattr(parity, "stored_parameters", stored_as_published)
    monkeypatch.setattr(parity, "dequantized_state", dequantized_as_published)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


@pytest.mark.parametrize("variant", ["gpt_neox", "gpt2", "gptj"])
def test_quantized(variant: str) -> None:
    parity.check_quantized(VARIANTS[variant])


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode"])
def test_texts_longer_than_the_table_of_positions_are_refused(model_type: str) -> None:
    raw = gpt_config(model_type)
    config, scheme = models.load_config(raw), get_scheme("q0f32")

    def message(overrides: str) -> str:
        options = CompileOptions.resolve(config, scheme, None, overrides)
        with pytest.raises(ConfigError) as error:
            compile_model(config, raw, scheme, resolve_device("cpu"), options)
        return str(error.value)

    assert message("context_window_size=97") == (
        "context_window_size = 97: this model has learned positions for 96 tokens and no others. "
        "Set it to at most that"
    )
    assert message("sliding_window_size=32").startswith(
        "sliding_window_size = 32: this model has learned positions for 96 tokens"
    )
    assert CompileOptions.resolve(config, scheme).context_window_size == 96


def test_the_first_hidden_state_has_the_positions_in_it() -> None:
    raw = gpt_config("gpt2")
    model = parity.reference_model(raw)
    compiled = Compiled(raw, parity.stored_parameters(raw, model.state_dict(), "q0f32"), "q0f32")
    ids = np.random.default_rng(4).integers(0, VOCAB, 20).astype(np.int32)
    tables = compiled.sequences.batch([(compiled.sequences.add(), len(ids))])
    first, *_ = compiled.executor.hidden_states(tables, ids)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[None].astype(np.int64)), output_hidden_states=True)
    np.testing.assert_allclose(first, expected.hidden_states[0][0], rtol=1e-6, atol=1e-6)


REFUSED = {
    "cross-attention": (gpt_config("gpt2", add_cross_attention=True), "add_cross_attention"),
    "activation": (gpt_config("gpt2", activation_function="swish"), "activation_function"),
    "tied-head-with-bias": (gpt_config("gptj", tie_word_embeddings=True), "tie_word_embeddings"),
    "by-depth": (
        gpt_config("gpt_bigcode", scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str) -> None:
    raw, field = REFUSED[case]
    with pytest.raises(UnsupportedError, match=f"{field} = .* is not supported"):
        models.load_config(raw)


# Fields of a published config.json each, as far as they decide what is computed; values that
# transformers fills in are left out where the published file leaves them out.
PUBLISHED = {
    "pythia-160m": {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "vocab_size": 50257,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_as_transformers_reads_them(name: str) -> None:
    raw = PUBLISHED[name]
    config = models.load_config(raw)
    assert unknown_fields(config, raw) == []
    theirs = transformers.AutoConfig.for_model(**raw)
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(config, field) == getattr(theirs, field)
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.max_position_embeddings == theirs.max_position_embeddings
    if config.rope is not None:
        share = theirs.rope_parameters["partial_rotary_factor"]
        assert config.rope.rotary_dim(config.head_dim) == int(share * config.head_dim)
    assert config.intermediate_size == 4 * config.hidden_size


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "gpt_bigcode", "gptj"])
def test_absent_fields_read_as_transformers_fills_them_in(model_type: str) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 768, "num_hidden_layers": 2}
    raw = {"model_type": model_type, **sizes, "num_attention_heads": 12, "intermediate_size": 80}
    raw["max_position_embeddings"] = 64
    config = models.load_config(raw)
    theirs = transformers.AutoConfig.for_model(**raw)
    for name, found in config.absent.items():
        expected = getattr(theirs, name, None)
        if name in ("rotary_pct", "rotary_emb_base"):
            key = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}[name]
            expected = theirs.rope_parameters[key]
        assert found == expected or (found is False and expected is None), name


def test_parameters_are_called_as_in_published_folders() -> None:
    def names(raw: dict) -> list[str]:
        found = [spec.name for spec in models.parameter_specs(models.load_config(raw))]
        return [name for name in found if ".1." not in name and not name.endswith("bias")]

    assert names(VARIANTS["gpt2"]) == [
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.0.ln_1.weight",
        "transformer.h.0.ln_2.weight",
        "transformer.ln_f.weight",
        "transformer.wpe.weight",
        "lm_head.weight",
    ]
    assert names(VARIANTS["gpt_neox"]) == [
        "gpt_neox.embed_in.weight",
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "gpt_neox.layers.0.attention.dense.weight",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight",
        "gpt_neox.layers.0.input_layernorm.weight",
        "gpt_neox.layers.0.post_attention_layernorm.weight",
        "gpt_neox.final_layer_norm.weight",
        "embed_out.weight",
    ]
    assert names(VARIANTS["gptj"])[1:6] == [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.out_proj.weight",
        "transformer.h.0.mlp.fc_in.weight",
        "transformer.h.0.mlp.fc_out.weight",
        "transformer.h.0.ln_1.weight",
    ]
