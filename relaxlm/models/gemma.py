"""Gemma 1, after `transformers/models/gemma/modeling_gemma.py`: Llama with wide heads, a scaled
embedding that doubles as head, and norms that are stored as what they differ from 1 by."""

from typing import ClassVar, Literal

from pydantic import field_validator

from relaxlm.models import llama
from relaxlm.models.config import DecoderConfig


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 16,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "tie_word_embeddings": True,
    }

    model_type: Literal["gemma"]
    hidden_act: Literal["gelu_pytorch_tanh"]
    # The first files name the activation twice.
    hidden_activation: Literal["gelu_pytorch_tanh"]
    attention_bias: bool
    use_bidirectional_attention: Literal[False]

    @field_validator("hidden_act", mode="before")
    @classmethod
    def _as_trained(cls, value: object) -> object:
        return "gelu_pytorch_tanh" if value == "gelu" else value  # says what it does not mean

    @property
    def mlp_bias(self) -> bool:
        return False

    @property
    def embedding_scale(self) -> float:
        return self.hidden_size**0.5


class Model(llama.Model):
    norm_shift: ClassVar[float] = 1.0
