"""Gemma 3, the text part of all sizes, after `transformers/models/gemma3/modeling_gemma3.py`: five
layers with a window and a rotary embedding of their own for each layer that reads everything, and
norms before and after attention and MLP."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig, rope_fields, text_fields
from relaxlm.models.layers import GatedMLP, RMSNorm, SplitProjections, merge_heads
from relaxlm.models.local_rope import LocalRopeConfig


class Config(LocalRopeConfig):
    absent: ClassVar[dict] = {
        "vocab_size": 262208,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "tie_word_embeddings": True,
    }
    spelling: ClassVar[dict] = {
        **DecoderConfig.spelling,
        "hidden_activation": "hidden_act",
        "_sliding_window_pattern": "sliding_window_pattern",
    }

    model_type: Literal["gemma3", "gemma3_text"]
    hidden_act: Literal["gelu_pytorch_tanh"]
    attention_bias: bool
    query_pre_attn_scalar: PositiveFloat
    final_logit_softcapping: Literal[None]
    attn_logit_softcapping: Literal[None]
    use_bidirectional_attention: Literal[False]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        raw = text_fields(raw)
        raw.pop("hidden_act", None)  # what counts is hidden_activation
        values = {**cls.absent, **{key: value for key, value in raw.items() if value is not None}}
        layers, every = values.get("num_hidden_layers"), values["sliding_window_pattern"]
        if isinstance(layers, int):
            numbers = range(1, layers + 1)
            kinds = ["sliding_attention" if i % every else "full_attention" for i in numbers]
            raw["layer_types"] = raw.get("layer_types") or kinds
        local = (values.get("rope_parameters") or {}).get("sliding_attention")
        raw["local_rope"] = rope_fields({"rope_theta": values["rope_local_base_freq"]}, local)
        return super().read(raw, where)

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        whole = (values.get("rope_parameters") or {}).get("full_attention")
        return rope_fields(values, whole or values.get("rope_scaling"))

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @property
    def embedding_scale(self) -> float:
        return self.hidden_size**0.5


class Attention(SplitProjections):
    def __init__(self, config: Config) -> None:
        super().__init__(config, config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        q, k, v = self.project(x)
        q, k = step.rotary(self.q_norm(q), layer), step.rotary(self.k_norm(k), layer)
        return self.o_proj(merge_heads(step.attention(layer, q, k, v)))


class Block(nn.Module):
    """Attention and MLP, each between two norms, added to the residual stream."""

    def __init__(self, config: DecoderConfig, attention: nn.Module, mlp: nn.Module) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_eps)

        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), step, layer)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Model(CausalLM):
    norm_shift: ClassVar[float] = 1.0
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"gate_up_proj": ("gate_proj", "up_proj")}
    published_names: ClassVar[Mapping[str, str]] = {
        "model": "language_model.model",
        "lm_head": "language_model.lm_head",
    }
    ignored: ClassVar[tuple[str, ...]] = (
        *CausalLM.ignored,
        *("vision_tower.*", "multi_modal_projector.*"),
        *("model.vision_tower.*", "model.multi_modal_projector.*"),
    )

    def __init__(self, config: Config) -> None:
        blocks = [
            Block(config, Attention(config), GatedMLP(config))
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks)
