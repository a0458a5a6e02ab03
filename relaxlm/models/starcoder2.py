"""StarCoder2, after `transformers/models/starcoder2/modeling_starcoder2.py`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import MLP, Attention, Block, LayerNorm


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "gelu_pytorch_tanh",
        "num_key_value_heads": 2,
        "norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
        "use_bias": True,
        "mlp_type": "default",
        "norm_type": "layer_norm",
        "scale_attn_weights": True,
        "layer_norm_epsilon": None,  # in some files, and nobody reads it
        "tie_word_embeddings": True,
    }
    spelling: ClassVar[dict] = {"norm_epsilon": "norm_eps"}

    model_type: Literal["starcoder2"]
    use_bias: bool
    mlp_type: Literal["default"]
    norm_type: Literal["layer_norm"]
    scale_attn_weights: Literal[True]

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        return ["sliding_attention"] * layers


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    checkpoint_names: ClassVar[dict[str, str]] = {"up_proj": "c_fc", "down_proj": "c_proj"}
    published_names: ClassVar[dict[str, str]] = {**checkpoint_names, "qkv_proj": "wqkv_pack"}

    def __init__(self, config: Config) -> None:
        def block() -> Block:
            attention = Attention(config, qkv_bias=config.use_bias, out_bias=config.use_bias)
            return Block(config, attention, MLP(config, config.use_bias), LayerNorm)

        super().__init__(config, [block() for _ in range(config.num_hidden_layers)], LayerNorm)
