"""Qwen1.5, Qwen2 and Qwen2.5, after `transformers/models/qwen2/modeling_qwen2.py`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Block, GatedMLP, merge_heads, split_heads


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "num_key_value_heads": 32,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "max_window_layers": 28,
    }

    model_type: Literal["qwen2"]

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        if not values["use_sliding_window"]:
            return ["full_attention"] * layers
        full = values["max_window_layers"]
        return ["full_attention" if i < full else "sliding_attention" for i in range(layers)]


class Attention(nn.Module):
    """Grouped-query attention with biases on q, k and v only."""

    def __init__(self, config: Config) -> None:
        self.config = config
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        width = config.num_attention_heads * config.head_dim
        self.c_attn = nn.Linear(config.hidden_size, heads * config.head_dim, bias=True)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        q, k, v = split_heads(self.c_attn(x), self.config)
        out = step.attention(layer, step.rotary(q, layer), step.rotary(k, layer), v)
        return self.o_proj(merge_heads(out))


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "c_attn": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, config: Config) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(
            config, [Block(config, Attention(config), GatedMLP(config)) for _ in layers]
        )
