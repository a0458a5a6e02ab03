"""Families that differ from Llama in norms, MLPs and constants give the logits of transformers."""

import pytest

from relaxlm import models
from relaxlm.errors import UnsupportedError
from tests.models import parity
from tests.models.parity import tiny_config

LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(6)],
    "long_factor": [1.0 + i for i in range(6)],
}


def family(model_type: str, **change) -> dict:
    # Some families' special tokens are past a tiny vocabulary.
    return tiny_config(model_type, pad_token_id=0, bos_token_id=1, eos_token_id=2, **change)


VARIANTS = {
    "phi3": family("phi3", num_key_value_heads=4, sliding_window=21),
    # Phi-4-mini: a share of each head turned, tied, factors for texts longer than 64 tokens.
    "phi3-longrope": family(
        "phi3",
        partial_rotary_factor=0.75,
        rope_scaling=LONGROPE,
        original_max_position_embeddings=64,
        tie_word_embeddings=True,
        sliding_window=262144,
    ),
    "phi": family("phi", layer_norm_eps=1e-5, hidden_act="gelu_new", num_key_value_heads=4),
    "phi-norms": family("phi", layer_norm_eps=1e-4, qk_layernorm=True, partial_rotary_factor=0.25),
    "gemma": family(
        "gemma", hidden_act="gelu", tie_word_embeddings=True, head_dim=24, num_key_value_heads=1
    ),
    "stablelm": family("stablelm", layer_norm_eps=1e-4, num_key_value_heads=4),
    "stablelm-bias": family("stablelm", layer_norm_eps=1e-5, use_qkv_bias=True),
    "stablelm-12b": family(
        "stablelm", layer_norm_eps=1e-5, qk_layernorm=True, use_parallel_residual=True
    ),
    "starcoder2": family(
        "starcoder2", norm_epsilon=1e-4, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"
    ),
    "starcoder2-window": family(
        "starcoder2", norm_epsilon=1e-5, hidden_act="gelu", use_bias=False, sliding_window=19
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    parity.check_parity(VARIANTS[variant])


# Biases of the head, norms of heads that are many tensors, and norms stored without their 1.
@pytest.mark.parametrize("variant", ["phi", "stablelm-12b", "gemma"])
def test_quantized(variant: str) -> None:
    parity.check_quantized(VARIANTS[variant])


# Parameters of a layer, and what is outside of them, in folders that are published for MLC.
PUBLISHED = {
    "phi": """
        transformer.embd.weight lm_head.ln.bias lm_head.ln.weight lm_head.linear.bias
        lm_head.linear.weight transformer.h.0.ln.bias transformer.h.0.ln.weight
        transformer.h.0.mixer.Wqkv.bias transformer.h.0.mixer.Wqkv.weight
        transformer.h.0.mixer.out_proj.bias transformer.h.0.mixer.out_proj.weight
        transformer.h.0.mlp.fc1.bias transformer.h.0.mlp.fc1.weight transformer.h.0.mlp.fc2.bias
        transformer.h.0.mlp.fc2.weight
    """,
    "phi3": """
        transformer.embd.weight transformer.norm.weight lm_head.weight transformer.h.0.ln.weight
        transformer.h.0.mixer.qkv_proj.weight transformer.h.0.mixer.out_proj.weight
        transformer.h.0.mlp.gate_up_proj.weight transformer.h.0.mlp.down_proj.weight
        transformer.h.0.post_attention_layernorm.weight
    """,
    "gemma": """
        model.embed_tokens.weight model.norm.weight model.layers.0.input_layernorm.weight
        model.layers.0.self_attn.qkv_proj.weight model.layers.0.self_attn.o_proj.weight
        model.layers.0.mlp.gate_up_proj.weight model.layers.0.mlp.down_proj.weight
        model.layers.0.post_attention_layernorm.weight
    """,
    "starcoder2": """
        model.embed_tokens.weight model.norm.bias model.norm.weight
        model.layers.0.input_layernorm.bias model.layers.0.input_layernorm.weight
        model.layers.0.self_attn.wqkv_pack.bias model.layers.0.self_attn.wqkv_pack.weight
        model.layers.0.self_attn.o_proj.bias model.layers.0.self_attn.o_proj.weight
        model.layers.0.mlp.c_fc.bias model.layers.0.mlp.c_fc.weight model.layers.0.mlp.c_proj.bias
        model.layers.0.mlp.c_proj.weight model.layers.0.post_attention_layernorm.bias
        model.layers.0.post_attention_layernorm.weight
    """,
    "cohere": """
        model.embed_tokens.weight model.norm.weight model.layers.0.input_layernorm.weight
        model.layers.0.self_attn.qkv_proj.weight model.layers.0.self_attn.out_proj.weight
        model.layers.0.mlp.gate_proj.weight model.layers.0.mlp.up_proj.weight
        model.layers.0.mlp.down_proj.weight
    """,
    "internlm2": """
        model.tok_embeddings.weight model.norm.weight output.weight
        model.layers.0.attention_norm.weight model.layers.0.attention.wqkv.weight
        model.layers.0.attention.wo.weight model.layers.0.ffn_norm.weight
        model.layers.0.feed_forward.gate_up_proj.weight model.layers.0.feed_forward.w2.weight
    """,
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_parameters_are_called_as_in_published_folders(model_type: str) -> None:
    raw = family(model_type, num_hidden_layers=1, bias=False)
    del raw["hidden_act"], raw["tie_word_embeddings"]
    model = models.create(models.load_config(raw), "float16")
    names = [spec.name for spec in model.parameter_specs()]
    assert sorted(names) == sorted(PUBLISHED[model_type].split())
    module, _ = model.export_tvm(spec=model.export_spec())
    forward = module["forward"]
    parameters = forward.params[int(forward.attrs["num_input"]) :]
    assert [parameter.name for parameter in parameters] == names
    # QuantizeParameters expects one dtype, also where logits are float32.
    assert {str(parameter.ty.dtype) for parameter in parameters} == {"float16"}


REFUSED = {
    "phi3-bias": (family("phi3", attention_bias=True), "attention_bias = True"),
    "phi-tied": (family("phi", tie_word_embeddings=True), "tie_word_embeddings = True"),
    "gemma-erf": (
        family("gemma", hidden_act="gelu", hidden_activation="gelu"),
        "hidden_activation = 'gelu'",
    ),
    "gemma-silu": (family("gemma"), "hidden_act = 'silu'"),
    "gemma-encoder": (
        family("gemma", hidden_act="gelu", use_bidirectional_attention=True),
        "use_bidirectional_attention = True",
    ),
    "olmo-eps": (family("olmo", norm_eps=1e-6), "norm_eps = 1e-06"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str) -> None:
    raw, text = REFUSED[case]
    with pytest.raises(UnsupportedError, match=text):
        models.load_config(raw)
