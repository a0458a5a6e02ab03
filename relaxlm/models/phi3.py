"""Phi-3, Phi-3.5 and Phi-4 (with Phi-4-mini), after `transformers/models/phi3/modeling_phi3.py`:
Llama with q, k, v and gate, up joined in the checkpoint already."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, Block, GatedMLP


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    }

    model_type: Literal["phi3"]
    # Phi-4-mini's files name what its own code could also do.
    attention_bias: Literal[False]
    mlp_bias: Literal[False]
    lm_head_bias: Literal[False]
    full_attn_mod: Literal[1]
    interpolate_factor: Literal[1]

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        rope = super()._rope(values)
        if rope["rope_type"] == "yarn":  # what the first Phi-3 files call longrope
            rope = super()._rope({**values, "rope_parameters": {**rope, "rope_type": "longrope"}})
        return rope

    @classmethod
    def _windows(cls, values: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
        windows = super()._windows(values, layers, where)
        # Most files name a window that is longer than any text.
        longest = values.get("max_position_embeddings", 0)
        return tuple(0 if window >= longest else window for window in windows)

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        return ["sliding_attention"] * layers


class Model(CausalLM):
    published_names: ClassVar[dict[str, str]] = {
        "model.embed_tokens": "transformer.embd",
        "model.layers": "transformer.h",
        "model.norm": "transformer.norm",
        "input_layernorm": "ln",
        "self_attn.o_proj": "mixer.out_proj",
        "self_attn": "mixer",
    }

    def __init__(self, config: Config) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(
            config, [Block(config, Attention(config), GatedMLP(config)) for _ in layers]
        )
