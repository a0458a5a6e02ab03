"""Phi-1, Phi-1.5 and Phi-2, after `transformers/models/phi/modeling_phi.py`: attention and a plain
MLP side by side behind one layer norm, biases everywhere, part of each head turned."""

from typing import ClassVar, Literal

from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import MLP, Attention, LayerNorm, ParallelBlock


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
    }
    spelling: ClassVar[dict] = {"layer_norm_eps": "norm_eps"}

    model_type: Literal["phi"]
    qk_layernorm: bool
    tie_word_embeddings: Literal[False]


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    checkpoint_names: ClassVar[dict[str, str]] = {
        "model.norm": "model.final_layernorm",
        "self_attn.o_proj": "self_attn.dense",
        "q_norm": "q_layernorm",
        "k_norm": "k_layernorm",
        "up_proj": "fc1",
        "down_proj": "fc2",
    }
    published_names: ClassVar[dict[str, str]] = {
        "lm_head": "lm_head.linear",
        "model.norm": "lm_head.ln",
        "model.embed_tokens": "transformer.embd",
        "model.layers": "transformer.h",
        "input_layernorm": "ln",
        "self_attn.qkv_proj": "mixer.Wqkv",
        "self_attn.o_proj": "mixer.out_proj",
        "self_attn": "mixer",
        "up_proj": "fc1",
        "down_proj": "fc2",
    }

    def __init__(self, config: Config) -> None:
        def block() -> ParallelBlock:
            head_norm = LayerNorm if config.qk_layernorm else None
            attention = Attention(config, qkv_bias=True, out_bias=True, head_norm=head_norm)
            return ParallelBlock(config, attention, MLP(config), LayerNorm)

        blocks = [block() for _ in range(config.num_hidden_layers)]
        super().__init__(config, blocks, LayerNorm, head_bias=True)
