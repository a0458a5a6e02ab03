"""Llama 1 to 3.3 and what shares its shape (TinyLlama, SmolLM2, Mistral), after
`transformers/models/llama/modeling_llama.py`."""

from typing import ClassVar, Literal

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Block, GatedMLP, merge_heads, split_heads


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }

    model_type: Literal["llama"]
    attention_bias: bool
    mlp_bias: bool


class Attention(nn.Module):
    """Grouped-query attention; with `attention_bias`, every projection has one."""

    def __init__(self, config: Config) -> None:
        self.config = config
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        width = config.num_attention_heads * config.head_dim
        self.qkv_proj = nn.Linear(
            config.hidden_size, heads * config.head_dim, bias=config.attention_bias
        )
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        q, k, v = split_heads(self.qkv_proj(x), self.config)
        out = step.attention(layer, step.rotary(q, layer), step.rotary(k, layer), v)
        return self.o_proj(merge_heads(out))


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, config: Config) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(
            config,
            [Block(config, Attention(config), GatedMLP(config, config.mlp_bias)) for _ in layers],
        )
