"""Granite 3 dense, after `transformers/models/granite/modeling_granite.py`: Llama with four
constants."""

from typing import ClassVar, Literal

from pydantic import PositiveFloat

from relaxlm.models import llama
from relaxlm.models.config import DecoderConfig


class Constants(DecoderConfig):
    """Those that every Granite multiplies by."""

    absent: ClassVar[dict] = {
        "rms_norm_eps": 1e-6,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }

    embedding_multiplier: PositiveFloat
    attention_multiplier: PositiveFloat
    residual_multiplier: PositiveFloat
    logits_scaling: PositiveFloat

    @property
    def embedding_scale(self) -> float:
        return self.embedding_multiplier

    @property
    def attention_scale(self) -> float:
        return self.attention_multiplier

    @property
    def residual_scale(self) -> float:
        return self.residual_multiplier

    @property
    def logits_scale(self) -> float:
        return 1 / self.logits_scaling


class Config(Constants, llama.Config):
    absent: ClassVar[dict] = {**llama.Config.absent, **Constants.absent}

    model_type: Literal["granite"]  # type: ignore[assignment]


class Model(llama.Model):
    pass
