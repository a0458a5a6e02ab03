"""Ministral 3, after `transformers/models/ministral3/modeling_ministral3.py`: Mistral whose queries
grow with their position."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveInt
from tvm.relax.frontend.nn import Tensor

from relaxlm.models import layers
from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Block, GatedMLP

# What transformers fills in.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }

    model_type: Literal["ministral3"]
    # A query is multiplied by 1 + beta log(1 + floor(position / length)).
    llama_4_scaling_beta: NonNegativeFloat
    original_max_position_embeddings: PositiveInt

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> "DecoderConfig":
        rope = dict(raw.get("rope_parameters") or _ROPE)
        growth = ("llama_4_scaling_beta", "original_max_position_embeddings")
        found = {name: rope[name] for name in growth if name in rope}
        rope.pop("llama_4_scaling_beta", None)
        return super().read({**raw, **found, "rope_parameters": rope}, where)

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        return ["sliding_attention"] * layers


class Attention(layers.Attention):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.beta = config.llama_4_scaling_beta
        self.length = config.original_max_position_embeddings

    def project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, step)
        return step.scale_by_position(q, self.beta, self.length), k, v


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, config: Config) -> None:
        super().__init__(
            config,
            [
                Block(config, Attention(config), GatedMLP(config))
                for _ in range(config.num_hidden_layers)
            ],
        )
