"""Command R7B and Command A, after `transformers/models/cohere2/modeling_cohere2.py`: Command R
whose layers have a window and rotary embeddings, but for every fourth, which has neither."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from relaxlm.models import cohere
from relaxlm.models.config import DecoderConfig


class Config(cohere.Config):
    absent: ClassVar[dict] = {
        **{name: value for name, value in cohere.Config.absent.items() if name != "rope_theta"},
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "position_embedding_type": "rope_gptj",
        "order_of_interleaved_layers": "local_attn_first",
        "use_gated_activation": True,
        "use_parallel_block": True,
    }
    spelling: ClassVar[dict] = {
        **cohere.Config.spelling,
        "_sliding_window_pattern": "sliding_window_pattern",
    }
    # `layer_switch` is `sliding_window_pattern` once more; what shares the embedding says
    # `tie_word_embeddings`.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        "layer_switch rotary_pct use_embedding_sharing use_parallel_embedding".split()
    )

    model_type: Literal["cohere2"]  # type: ignore[assignment]
    layer_types: tuple[str, ...]
    sliding_window_pattern: PositiveInt
    use_qk_norm: Literal[False]
    position_embedding_type: Literal["rope_gptj"]
    order_of_interleaved_layers: Literal["local_attn_first"]
    use_gated_activation: Literal[True]
    use_parallel_block: Literal[True]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        raw, layers = dict(raw), raw.get("num_hidden_layers")
        pattern = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 4
        if not (isinstance(pattern, int) and pattern > 0):
            pattern = 4  # refused below
        if isinstance(layers, int) and not raw.get("layer_types"):
            numbers = range(1, layers + 1)
            kinds = ["sliding_attention" if i % pattern else "full_attention" for i in numbers]
            raw["layer_types"] = kinds
        return super().read(raw, where)

    def layer_rope(self, layer: int) -> Any:
        return self.rope if self.layer_types[layer] == "sliding_attention" else None


class Model(cohere.Model):
    pass
