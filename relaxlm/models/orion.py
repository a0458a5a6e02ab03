"""Orion-14B, after the `modeling_orion.py` that is published with its weights: Llama with layer
norms."""

from typing import ClassVar, Literal

from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, Block, GatedMLP, LayerNorm


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }

    model_type: Literal["orion"]
    attention_bias: bool


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, config: Config) -> None:
        def block() -> Block:
            attention = Attention(config, config.attention_bias, config.attention_bias)
            return Block(config, attention, GatedMLP(config), LayerNorm)

        super().__init__(config, [block() for _ in range(config.num_hidden_layers)], LayerNorm)
