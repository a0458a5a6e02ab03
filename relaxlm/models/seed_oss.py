"""Seed-OSS, after `transformers/models/seed_oss/modeling_seed_oss.py`: Llama with a switch for each
kind of bias."""

from typing import ClassVar, Literal

from relaxlm.models import llama
from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, Block, GatedMLP


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }

    model_type: Literal["seed_oss"]
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = llama.Model.fused

    def __init__(self, config: Config) -> None:
        def block() -> Block:
            attention = Attention(config, config.attention_bias, config.attention_out_bias)
            return Block(config, attention, GatedMLP(config, config.mlp_bias))

        super().__init__(config, [block() for _ in range(config.num_hidden_layers)])
