"""Configurations whose layers with a window have a rotary embedding of their own."""

from typing import Any

from relaxlm.models.config import DecoderConfig
from relaxlm.models.rope import Rope


class LocalRopeConfig(DecoderConfig):
    """`rope` is that of layers that read everything, `local_rope` that of the others."""

    local_rope: Rope
    layer_types: tuple[str, ...]

    def layer_rope(self, layer: int) -> Any:
        return self.local_rope if self.layer_types[layer] == "sliding_attention" else self.rope

    def for_context(self, context: int) -> DecoderConfig:
        local = self.local_rope.for_context(context)
        return super().for_context(context).model_copy(update={"local_rope": local})
