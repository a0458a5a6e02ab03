"""Nemotron-4 and Minitron, after `transformers/models/nemotron/modeling_nemotron.py`: squared ReLU,
and layer norms that are stored as what they differ from 1 by, in published folders too."""

from functools import partial
from typing import ClassVar, Literal

from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import MLP, Attention, Block, LayerNorm


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    spelling: ClassVar[dict] = {}

    model_type: Literal["nemotron"]
    attention_bias: bool
    mlp_bias: bool


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: Config) -> None:
        norm = partial(LayerNorm, shift=1.0)

        def block() -> Block:
            attention = Attention(config, config.attention_bias, config.attention_bias)
            return Block(config, attention, MLP(config, config.mlp_bias), norm)

        super().__init__(config, [block() for _ in range(config.num_hidden_layers)], norm)
