"""Command R and Aya 23, after `transformers/models/cohere/modeling_cohere.py`: attention and MLP
side by side behind one layer norm without bias."""

from functools import partial
from typing import ClassVar, Literal

from pydantic import PositiveFloat

from relaxlm.models import layers
from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import GatedMLP, LayerNorm, ParallelBlock

_Norm = partial(LayerNorm, bias=False)


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "logit_scale": 0.0625,
        "attention_bias": False,
        "use_qk_norm": False,
        "tie_word_embeddings": True,
    }
    spelling: ClassVar[dict] = {"layer_norm_eps": "norm_eps"}
    rope_in_pairs: ClassVar[bool] = True

    model_type: Literal["cohere"]
    logit_scale: PositiveFloat
    attention_bias: bool
    use_qk_norm: bool

    @property
    def logits_scale(self) -> float:
        return self.logit_scale


class Attention(layers.Attention):
    """With `use_qk_norm` (Command R+), every query and key head has a norm of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.attention_bias, config.attention_bias)
        if config.use_qk_norm:
            self.q_norm = _Norm((config.num_attention_heads, config.head_dim), config.norm_eps)
            self.k_norm = _Norm((config.num_key_value_heads, config.head_dim), config.norm_eps)
            self.head_norm = True


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    published_names: ClassVar[dict[str, str]] = {"o_proj": "out_proj"}

    def __init__(self, config: Config) -> None:
        def block() -> ParallelBlock:
            mlp = GatedMLP(config, joined=False)
            return ParallelBlock(config, Attention(config), mlp, _Norm)

        super().__init__(config, [block() for _ in range(config.num_hidden_layers)], _Norm)
