"""SmolLM3, after `transformers/models/smollm3/modeling_smollm3.py`: Llama with layers that know no
positions."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, model_validator

from relaxlm.models import llama


class Config(llama.Config):
    absent: ClassVar[dict] = {
        **llama.Config.absent,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    }

    model_type: Literal["smollm3"]  # type: ignore[assignment]
    no_rope_layer_interval: PositiveInt
    # 1 for every layer with rotary embeddings, 0 for every one without.
    no_rope_layers: tuple[Literal[0, 1], ...] | None = None

    @model_validator(mode="after")
    def _as_many_as_layers(self) -> "Config":
        if self.no_rope_layers is not None and len(self.no_rope_layers) < self.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers has {len(self.no_rope_layers)} entries, expected one for each of "
                f"{self.num_hidden_layers} layers"
            )
        return self

    @classmethod
    def _windows(cls, values: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
        # Layers of the kind "sliding_attention" have a window only with `use_sliding_window`.
        window = values.get("sliding_window") if values["use_sliding_window"] else None
        return super()._windows({**values, "sliding_window": window}, layers, where)

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        with_rope = values.get("no_rope_layers") or [
            (layer + 1) % values["no_rope_layer_interval"] != 0 for layer in range(layers)
        ]
        return ["full_attention" if has else "sliding_attention" for has in with_rope[:layers]]

    def layer_rope(self, layer: int) -> Any:
        if self.no_rope_layers is not None:
            return self.rope if self.no_rope_layers[layer] else None
        return self.rope if (layer + 1) % self.no_rope_layer_interval else None


class Model(llama.Model):
    pass
