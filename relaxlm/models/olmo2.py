"""OLMo 2, after `transformers/models/olmo2/modeling_olmo2.py`: norms behind attention and MLP, and
over all query or key heads together."""

from typing import ClassVar, Literal

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attends, Feeds, GatedMLP, JointNormAttention, RMSNorm


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }

    model_type: Literal["olmo2"]
    attention_bias: bool


class Block(nn.Module):
    """What attention and MLP add to the residual stream goes through a norm."""

    def __init__(self, config: DecoderConfig, attention: Attends, mlp: Feeds) -> None:
        self.self_attn, self.mlp = attention, mlp
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, step, layer))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, config: Config) -> None:
        bias = config.attention_bias
        blocks = [
            Block(config, JointNormAttention(config, bias, bias), GatedMLP(config))
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks)
