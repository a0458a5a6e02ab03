"""GLM and what transformers does not have: ChatGLM, Baichuan, MiniCPM and MiMo.

The reference of the last four is float64 NumPy (`numpy_decoders.py`), transcribed from the code
that is published with their weights; MiMo's is transformers' Qwen2, which its code subclasses.
"""

import numpy as np
import pytest
import torch

from relaxlm import models
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.models.config import unknown_fields
from tests.models import numpy_decoders, parity
from tests.models.parity import VOCAB, tiny_config

VARIANTS = {
    "glm": tiny_config("glm", pad_token_id=0, head_dim=24, partial_rotary_factor=0.5),
    "glm4": tiny_config("glm4", pad_token_id=0, partial_rotary_factor=0.5, attention_bias=False),
    "glm4-tied": tiny_config("glm4", pad_token_id=0, tie_word_embeddings=True, attention_bias=True),
    "mimo": tiny_config("mimo", head_dim=24, attention_bias=True, num_nextn_predict_layers=1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = parity.reference_model

    def with_known_type(raw: dict):
        known = {"mimo": "qwen2"}.get(raw["model_type"], raw["model_type"])
        return reference({**raw, "model_type": known})

    monkeypatch.setattr(parity, "reference_model", with_known_type)
    parity.check_parity(VARIANTS[variant])


def test_quantized() -> None:
    parity.check_quantized(VARIANTS["glm4"])


def chatglm_config(**change) -> dict:
    return {
        "model_type": "chatglm",
        "hidden_size": 64,
        "kv_channels": 24,
        "num_layers": 2,
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "ffn_hidden_size": 112,
        "padded_vocab_size": VOCAB,
        "layernorm_epsilon": 1e-3,
        "seq_length": 256,
        "add_qkv_bias": True,
        "rope_ratio": 5,
        **change,
    }


def chatglm_shapes(raw: dict) -> dict[str, tuple[int, ...]]:
    hidden, inner = raw["hidden_size"], raw["ffn_hidden_size"]
    width = raw["num_attention_heads"] * raw["kv_channels"]
    mixed = width + 2 * raw["multi_query_group_num"] * raw["kv_channels"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (VOCAB, hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (VOCAB, hidden),
    }
    for layer in range(raw["num_layers"]):
        at = f"transformer.encoder.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "self_attention.query_key_value.weight": (mixed, hidden),
            at + "self_attention.query_key_value.bias": (mixed,),
            at + "self_attention.dense.weight": (hidden, width),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "mlp.dense_h_to_4h.weight": (2 * inner, hidden),
            at + "mlp.dense_4h_to_h.weight": (hidden, inner),
        }
        if raw.get("add_bias_linear"):
            shapes |= {
                at + "self_attention.dense.bias": (hidden,),
                at + "mlp.dense_h_to_4h.bias": (2 * inner,),
                at + "mlp.dense_4h_to_h.bias": (hidden,),
            }
    return shapes


def llama_shapes(raw: dict) -> dict[str, tuple[int, ...]]:
    """Of Baichuan and MiniCPM."""
    hidden, inner = raw["hidden_size"], raw["intermediate_size"]
    dim = hidden // raw["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (raw["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (raw["vocab_size"], hidden)
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        if raw["model_type"] == "baichuan":
            shapes[at + "self_attn.W_pack.weight"] = (3 * hidden, hidden)
        else:
            shapes[at + "self_attn.q_proj.weight"] = (hidden, hidden)
            for part in "kv":
                rows = raw["num_key_value_heads"] * dim
                shapes[at + f"self_attn.{part}_proj.weight"] = (rows, hidden)
        shapes |= {
            at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }
    return shapes


def own_config(model_type: str, **change) -> dict:
    """Without head_dim, which these families do not have."""
    raw = tiny_config(model_type, **change)
    del raw["head_dim"]
    return raw


SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
BAICHUAN = own_config("baichuan", num_key_value_heads=4, rope_theta=10000.0)
# 13B: ALiBi, of a number of heads that is no power of 2.
BAICHUAN_13B = own_config(
    "baichuan", hidden_size=96, num_attention_heads=6, num_key_value_heads=6, model_max_length=256
)
del BAICHUAN_13B["max_position_embeddings"], BAICHUAN_13B["rope_theta"]
OWN_REFERENCE = {
    "chatglm": chatglm_config(),
    "chatglm-all-biases": chatglm_config(
        add_bias_linear=True, multi_query_group_num=1, kv_channels=16, rope_ratio=1
    ),
    "baichuan": BAICHUAN,
    "baichuan-13b": BAICHUAN_13B,
    "minicpm": own_config("minicpm", **SCALES, tie_word_embeddings=True),
    "minicpm-untied": own_config("minicpm", **SCALES, num_key_value_heads=4),
}


def random_state(raw: dict) -> dict[str, torch.Tensor]:
    shapes = (chatglm_shapes if raw["model_type"] == "chatglm" else llama_shapes)(raw)
    rng = np.random.default_rng(3)
    state = {}
    for name, shape in shapes.items():
        value = rng.uniform(0.5, 1.5, shape) if "norm" in name else rng.normal(0, 0.1, shape)
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


@pytest.mark.parametrize("variant", OWN_REFERENCE)
def test_logits_match_the_transcription(variant: str) -> None:
    raw = OWN_REFERENCE[variant]
    state = random_state(raw)
    parity.check_transcription(raw, state, getattr(numpy_decoders, raw["model_type"]))


@pytest.mark.parametrize("model_type", ["baichuan", "chatglm", "minicpm"])
def test_quantized_matches_the_transcription(model_type: str) -> None:
    raw = OWN_REFERENCE[model_type]
    reference = getattr(numpy_decoders, model_type)
    parity.check_transcription(raw, random_state(raw), reference, "q4f16_1")


def test_the_head_of_baichuan_2_has_rows_of_length_1() -> None:
    raw = {**BAICHUAN, "vocab_size": 125696, "num_hidden_layers": 1}
    specs = {spec.name: spec for spec in models.parameter_specs(models.load_config(raw))}
    (source,) = specs["lm_head.weight"].sources
    rows = np.random.default_rng(1).normal(0, 3, (5, 64)).astype(np.float32)
    kept = source.values(rows.ravel())  # as the converter reads them: a block of rows
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(kept / rows, (kept / rows)[:, :1].repeat(64, 1), rtol=1e-5)
    (first,) = models.parameter_specs(models.load_config(BAICHUAN))[-1].sources
    assert first.name == "lm_head.weight" and not first.is_changed
    state = random_state(raw)
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    stored = parity.stored_parameters(raw, state, "q0f32")["lm_head.weight"]
    rescaled = {**tensors, "lm_head.weight": stored}
    ids = np.arange(4)
    np.testing.assert_allclose(
        numpy_decoders.baichuan(raw, tensors, ids),
        numpy_decoders.baichuan({**raw, "vocab_size": 0}, rescaled, ids),
        rtol=1e-5,
        atol=1e-6,
    )


REFUSED = {
    "baichuan-tied": ({**BAICHUAN, "tie_word_embeddings": True}, "tie_word_embeddings = True"),
    "chatglm-6b": (chatglm_config(position_encoding_2d=True), "position_encoding_2d"),
    "chatglm2-32k": (
        chatglm_config(_name_or_path="THUDM/chatglm2-6b-32k", rope_ratio=50),
        "rope_ratio = 50",
    ),
    "chatglm-layernorm": (chatglm_config(rmsnorm=False), "rmsnorm = False"),
    "minicpm-moe": (own_config("minicpm", **SCALES, num_experts=8), "num_experts = 8"),
    "mimo-mrope": (tiny_config("mimo", use_mrope=True), "use_mrope = True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str) -> None:
    raw, text = REFUSED[case]
    with pytest.raises(UnsupportedError, match=text):
        models.load_config(raw)


def test_sparse_attention_of_minicpm_4_is_refused() -> None:
    raw = own_config("minicpm", **SCALES, sparse_config={"kernel_size": 32})
    with pytest.raises(ConfigError, match="sparse_config"):
        models.load_config(raw)


def test_a_published_chatglm_configuration() -> None:
    """config.json of ChatGLM3-6B."""
    raw = {
        "_name_or_path": "THUDM/chatglm3-6b",
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": 13696,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": 4096,
        "kv_channels": 128,
        "layernorm_epsilon": 1e-05,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": 32,
        "num_layers": 28,
        "original_rope": True,
        "padded_vocab_size": 65024,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": 8192,
        "use_cache": True,
        "tie_word_embeddings": False,
    }
    config = models.load_config(raw)
    assert unknown_fields(config, raw) == []
    assert (config.vocab_size, config.head_dim, config.max_position_embeddings) == (
        65024,
        128,
        8192,
    )
    assert config.rope.rotary_dim(config.head_dim) == 64
