"""GLM-4-0414 and GLM-Z1, after `transformers/models/glm4/modeling_glm4.py`: GLM with norms before
and after attention and MLP."""

from typing import ClassVar, Literal

from tvm.relax.frontend.nn import Tensor

from relaxlm.models import glm
from relaxlm.models.base import Step
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attends, Block, Feeds, RMSNorm


class Config(glm.Config):
    model_type: Literal["glm4"]  # type: ignore[assignment]


class SandwichBlock(Block):
    def __init__(self, config: DecoderConfig, attention: Attends, mlp: Feeds) -> None:
        super().__init__(config, attention, mlp)
        self.post_self_attn_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), step, layer)
        x = x + self.post_self_attn_layernorm(attended)
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))


class Model(glm.Model):
    block: ClassVar[type[Block]] = SandwichBlock
