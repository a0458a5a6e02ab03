"""GPT-NeoX: Pythia, Dolly 2, RedPajama-INCITE and StableLM-alpha, after
`transformers/models/gpt_neox/modeling_gpt_neox.py`."""

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import numpy as np

from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import MLP, Attention, Block, LayerNorm, ParallelBlock
from relaxlm.models.weights import Source


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    spelling: ClassVar[dict] = {
        "layer_norm_eps": "norm_eps",
        "rotary_pct": "partial_rotary_factor",
        "rotary_emb_base": "rope_theta",
    }

    model_type: Literal["gpt_neox"]
    use_parallel_residual: bool
    attention_bias: bool


class Model(CausalLM):
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "model": "gpt_neox",
        "gpt_neox.norm": "gpt_neox.final_layer_norm",
        "embed_tokens": "embed_in",
        "self_attn": "attention",
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
        "lm_head": "embed_out",
    }
    published_names: ClassVar[Mapping[str, str]] = checkpoint_names
    # The causal mask, which old files have as a tensor.
    ignored: ClassVar[tuple[str, ...]] = (
        *CausalLM.ignored,
        "*.attention.bias",
        "*.attention.masked_bias",
    )

    def __init__(self, config: Config) -> None:
        bias = config.attention_bias
        blocks = [
            (
                ParallelBlock(config, Attention(config, bias, bias), MLP(config), LayerNorm, 2)
                if config.use_parallel_residual
                else Block(config, Attention(config, bias, bias), MLP(config), LayerNorm)
            )
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks, LayerNorm)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        (source,) = super()._sources(name, shape)
        if ".qkv_proj." not in name:
            return (source,)
        return (Source(source.name, shape, view=by_kind(self.config.num_attention_heads)),)


def by_kind(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows that come head by head, each its q, k and v, as all q, all k and all v."""
    return lambda rows: rows.reshape(heads, 3, -1, *rows.shape[1:]).swapaxes(0, 1)
