"""Gemma 2, after `transformers/models/gemma2/modeling_gemma2.py` and arXiv:2408.00118: every other
layer has a window, attention's scores and the logits are capped, and norms stand before and after
attention and MLP."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models import gemma, llama
from relaxlm.models import layers as shared
from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig
from relaxlm.models.gemma3 import Block
from relaxlm.models.layers import GatedMLP, merge_heads, split_heads

CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


class Config(gemma.Config):
    """A cap of 0 is none."""

    absent: ClassVar[dict] = {
        **gemma.Config.absent,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    model_type: Literal["gemma2"]  # type: ignore[assignment]
    query_pre_attn_scalar: PositiveFloat
    attn_logit_softcapping: NonNegativeFloat
    final_logit_softcapping: NonNegativeFloat

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        # null turns a cap off; only a field that is not there has the default.
        off = {name: 0.0 for name in CAPS if name in raw and raw[name] is None}
        return super().read({**raw, **off}, where)

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        return [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5


class Attention(shared.Attention):
    def __init__(self, config: Config) -> None:
        super().__init__(config, config.attention_bias, config.attention_bias)
        self.cap = config.attn_logit_softcapping

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        q, k, v = split_heads(self.qkv_proj(x), self.config)
        q, k = step.rotary(q, layer), step.rotary(k, layer)
        return self.o_proj(merge_heads(step.attention(layer, q, k, v, cap=self.cap)))


class Model(CausalLM):
    norm_shift: ClassVar[float] = 1.0
    fused: ClassVar[dict[str, tuple[str, ...]]] = llama.Model.fused

    def __init__(self, config: Config) -> None:
        numbers = range(config.num_hidden_layers)
        blocks = [Block(config, Attention(config), GatedMLP(config)) for _ in numbers]
        super().__init__(config, blocks)
        self.cap = config.final_logit_softcapping

    def _logits(self, x: Tensor) -> Tensor:
        logits = super()._logits(x)
        return op.tanh(logits / self.cap) * self.cap if self.cap else logits
