"""OLMo 3, after `transformers/models/olmo3/modeling_olmo3.py`: OLMo 2 with a window in three of
four layers, whose rotary embeddings are never scaled."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.models import olmo2
from relaxlm.models.config import DecoderConfig, rope_fields
from relaxlm.models.local_rope import LocalRopeConfig


class Config(LocalRopeConfig, olmo2.Config):
    absent: ClassVar[dict] = {
        **olmo2.Config.absent,
        "rope_theta": 500000.0,
        "sliding_window": 4096,
    }

    model_type: Literal["olmo3"]  # type: ignore[assignment]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        raw = dict(raw)
        layers, base = raw.get("num_hidden_layers"), raw.get("rope_theta")
        if isinstance(layers, int):
            raw["layer_types"] = raw.get("layer_types") or cls.default_layer_types(raw, layers)
        local = (raw.get("rope_parameters") or {}).get("sliding_attention")
        raw["local_rope"] = rope_fields({"rope_theta": base or cls.absent["rope_theta"]}, local)
        return super().read(raw, where)

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        numbers = range(1, layers + 1)
        return ["sliding_attention" if i % 4 else "full_attention" for i in numbers]

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        whole = (values.get("rope_parameters") or {}).get("full_attention")
        return rope_fields(values, whole or values.get("rope_scaling"))


class Model(olmo2.Model):
    pass
