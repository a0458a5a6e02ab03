"""dots.llm1, after `transformers/models/dots1/modeling_dots1.py`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.models import glm4_moe
from relaxlm.models.layers import Attention, RMSNorm


class Config(glm4_moe.FirstLayersDense):
    absent: ClassVar[dict] = {
        **glm4_moe.FirstLayersDense.absent,
        "num_key_value_heads": 32,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "sliding_window": 4096,
        "max_window_layers": 62,
    }

    model_type: Literal["dots1"]

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        first = values["max_window_layers"]
        return ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]


class Model(glm4_moe.Model):
    def attention(self, config: Config) -> Attention:  # type: ignore[override]
        return Attention(config, config.attention_bias, config.attention_bias, RMSNorm)
