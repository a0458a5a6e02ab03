"""GLM-4-9B and GLM-Edge, after `transformers/models/glm/modeling_glm.py`: half of every head turns,
in neighbouring pairs."""

from typing import ClassVar, Literal

from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, Block, GatedMLP


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    rope_in_pairs: ClassVar[bool] = True

    model_type: Literal["glm"]
    attention_bias: bool


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    block: ClassVar[type[Block]] = Block

    def __init__(self, config: Config) -> None:
        blocks = [
            self.block(config, Attention(config, config.attention_bias), GatedMLP(config))
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks)
