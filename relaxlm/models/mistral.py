"""Mistral 7B, after `transformers/models/mistral/modeling_mistral.py`: Llama without biases and
with a sliding window in every layer (absent or null: full attention)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.models import llama


class Config(llama.Config):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }

    model_type: Literal["mistral"]  # type: ignore[assignment]
    attention_bias: Literal[False]
    mlp_bias: Literal[False]

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        return ["sliding_attention"] * layers


class Model(llama.Model):
    pass
