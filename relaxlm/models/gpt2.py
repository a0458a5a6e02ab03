"""GPT-2, after `transformers/models/gpt2/modeling_gpt2.py`: learned positions, and matrices that
the checkpoint has the other way round."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relaxlm.models.base import Step
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import (
    MLP,
    Attention,
    Block,
    LayerNorm,
    merge_heads,
    scaled,
    split_heads,
)
from relaxlm.models.learned_positions import LearnedConfig, LearnedPositions
from relaxlm.models.weights import Source


class Config(LearnedConfig):
    absent: ClassVar[dict] = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    spelling: ClassVar[dict] = {
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "norm_eps",
    }

    model_type: Literal["gpt2"]
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    add_cross_attention: Literal[False]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> "DecoderConfig":
        return super().read(with_sizes(raw), where)

    @property
    def attention_scale(self) -> float:
        return super().attention_scale if self.scale_attn_weights else 1.0


class ScaledAttention(Attention):
    """`scale_attn_by_inverse_layer_idx`: deeper layers attend less sharply."""

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        q, k, v = split_heads(self.qkv_proj(x), self.config)
        return self.o_proj(merge_heads(step.attention(layer, scaled(q, 1 / (layer + 1)), k, v)))


class GPT2Like(LearnedPositions):
    """With GPT-2's blocks and names."""

    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "model": "transformer",
        "embed_tokens": "wte",
        "embed_positions": "wpe",
        "layers": "h",
        "norm": "ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn": "attn",
        "qkv_proj": "c_attn",
        "o_proj": "c_proj",
        "up_proj": "c_fc",
        "down_proj": "c_proj",
    }
    published_names: ClassVar[Mapping[str, str]] = checkpoint_names
    # The causal mask, which old files have as a tensor.
    ignored: ClassVar[tuple[str, ...]] = ("*.attn.bias", "*.attn.masked_bias")

    def __init__(self, config: Config, attention: type[Attention]) -> None:
        blocks = [
            Block(config, attention(config, True, True), MLP(config), LayerNorm)
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks)
        if config.tie_word_embeddings:  # in published folders, there are two matrices all the same
            self.lm_head = nn.Linear(
                config.hidden_size, config.vocab_size, bias=False, out_dtype="float32"
            )

    def _logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        return super()._sources(name, shape)


class Model(GPT2Like):
    def __init__(self, config: Config) -> None:
        by_depth = config.scale_attn_by_inverse_layer_idx
        super().__init__(config, ScaledAttention if by_depth else Attention)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        (source,) = super()._sources(name, shape)
        if name.endswith("_proj.weight"):
            return (Source(source.name, shape[::-1], view=np.transpose),)
        return (source,)


def with_sizes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of GPT-2's relatives with the sizes that follow from others."""
    raw = dict(raw)
    width = raw.get("n_embd", raw.get("hidden_size"))
    if isinstance(width, int) and not (raw.get("n_inner") or 0) > 0:
        raw["n_inner"] = raw.get("intermediate_size") or 4 * width
    if (raw.get("context_window_size") or 0) > 0 and "max_position_embeddings" not in raw:
        # Folders published for MLC have the trained length only here.
        raw.setdefault("n_positions", raw["context_window_size"])
    return raw
