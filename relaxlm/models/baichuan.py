"""Baichuan and Baichuan 2, after the `modeling_baichuan.py` that is published with their weights.
The 7B models have rotary embeddings, the 13B models ALiBi in their place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from relaxlm.models.alibi import AlibiConfig
from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, Block, GatedMLP
from relaxlm.models.rope import Rope
from relaxlm.models.weights import Source

# Nothing else in their config.json tells the second generation from the first.
VOCABULARY_OF_BAICHUAN_2 = 125696


class Config(AlibiConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "alibi": False,
    }

    model_type: Literal["baichuan"]
    rope: Rope | None
    tie_word_embeddings: Literal[False]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        if "model_max_length" in raw and raw.get("max_position_embeddings") is None:
            # Nothing else in their config.json tells the 13B models from the others.
            raw = {**raw, "max_position_embeddings": raw["model_max_length"], "alibi": True}
        if (raw.get("context_window_size") or 0) > 0:  # folders published for MLC
            raw = {"max_position_embeddings": raw["context_window_size"], **raw}
        return super().read(raw, where)

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> Any:
        return None if values["alibi"] else super()._rope(values)


@dataclass(frozen=True)
class UnitRows(Source):
    """A matrix whose rows are divided by their lengths before it is used."""

    @property
    def is_changed(self) -> bool:
        return True

    def values(self, tensor: np.ndarray) -> np.ndarray:
        rows = tensor.reshape(-1, self.shape[-1]).astype(np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"gate_up_proj": ("gate_proj", "up_proj")}
    checkpoint_names: ClassVar[Mapping[str, str]] = {"qkv_proj": "W_pack"}
    published_names: ClassVar[Mapping[str, str]] = checkpoint_names

    def __init__(self, config: Config) -> None:
        blocks = [
            Block(config, Attention(config), GatedMLP(config))
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        if name == "lm_head.weight" and self.config.vocab_size == VOCABULARY_OF_BAICHUAN_2:
            return (UnitRows(name, shape),)
        return super()._sources(name, shape)
