"""ERNIE 4.5 dense, after `transformers/models/ernie4_5/modeling_ernie4_5.py`: Llama whose rotary
embeddings turn neighbouring features."""

from typing import ClassVar, Literal

from relaxlm.models import llama
from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, Block, GatedMLP


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_bias": False,
        "tie_word_embeddings": True,
    }
    rope_in_pairs: ClassVar[bool] = True

    model_type: Literal["ernie4_5"]
    use_bias: bool


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = llama.Model.fused

    def __init__(self, config: Config) -> None:
        bias = config.use_bias
        blocks = [
            Block(config, Attention(config, bias, bias), GatedMLP(config, bias))
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks)
