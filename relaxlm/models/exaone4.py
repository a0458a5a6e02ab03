"""EXAONE 4, after `transformers/models/exaone4/modeling_exaone4.py`: norms behind attention and MLP
and on every query and key head. Where layers have windows, those without do not know positions."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.errors import UnsupportedError
from relaxlm.models import llama
from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, GatedMLP, RMSNorm
from relaxlm.models.olmo2 import Block


class Config(DecoderConfig):
    """`window` is that of the layers that have one, 0 if none has."""

    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    }

    model_type: Literal["exaone4"]
    layer_types: tuple[str, ...]
    window: int

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        raw, layers = dict(raw), raw.get("num_hidden_layers")
        window = raw.get("sliding_window", cls.absent["sliding_window"]) or 0
        raw["window"] = raw["sliding_window"] = window
        pattern = raw.get("sliding_window_pattern", cls.absent["sliding_window_pattern"])
        if isinstance(layers, int) and not raw.get("layer_types"):
            if window and not (isinstance(pattern, int) and pattern > 0):
                raise UnsupportedError(
                    f"{where}: sliding_window_pattern = {pattern!r} is not supported without "
                    "layer_types: expected a number of layers"
                )
            raw["layer_types"] = [
                "sliding_attention" if window and (i + 1) % pattern else "full_attention"
                for i in range(layers)
            ]
        return super().read(raw, where)

    def layer_rope(self, layer: int) -> Any:
        is_sliding = self.layer_types[layer] == "sliding_attention"
        return self.rope if is_sliding or not self.window else None


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = llama.Model.fused

    def __init__(self, config: Config) -> None:
        blocks = [
            Block(config, Attention(config, head_norm=RMSNorm), GatedMLP(config))
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks)
