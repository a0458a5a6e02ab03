"""Qwen3 dense decoder, after `transformers/models/qwen3/modeling_qwen3.py`."""

from typing import ClassVar, Literal

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relaxlm.models import qwen2
from relaxlm.models.base import CausalLM, Step
from relaxlm.models.layers import Block, GatedMLP, RMSNorm, merge_heads, split_heads


class Config(qwen2.Config):
    absent: ClassVar[dict] = {**qwen2.Config.absent, "head_dim": 128, "attention_bias": False}

    model_type: Literal["qwen3"]  # type: ignore[assignment]
    attention_bias: bool


class Attention(nn.Module):
    """Grouped-query attention with a norm on every query and key head."""

    def __init__(self, config: Config) -> None:
        self.config = config
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        width = config.num_attention_heads * config.head_dim
        bias = config.attention_bias
        self.c_attn = nn.Linear(config.hidden_size, heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        q, k, v = split_heads(self.c_attn(x), self.config)
        q, k = step.rotary(self.q_norm(q), layer), step.rotary(self.k_norm(k), layer)
        return self.o_proj(merge_heads(step.attention(layer, q, k, v)))


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = qwen2.Model.fused

    def __init__(self, config: Config) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(
            config, [Block(config, Attention(config), GatedMLP(config)) for _ in layers]
        )
