"""OPT, but for 350M, after `transformers/models/opt/modeling_opt.py`: GPT-2 with ReLU and a matrix
each for queries, keys and values. (350M has its norms behind attention and MLP.)"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import MLP, Attention, Block, LayerNorm
from relaxlm.models.learned_positions import LearnedConfig, LearnedPositions
from relaxlm.models.weights import Source

# The first rows of the table of positions are no position's.
OFFSET = 2


class Config(LearnedConfig):
    absent: ClassVar[dict] = {
        "activation_function": "relu",
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "norm_eps": 1e-5,
    }
    spelling: ClassVar[dict] = {
        "ffn_dim": "intermediate_size",
        "activation_function": "hidden_act",
        "_remove_final_layer_norm": "remove_final_layer_norm",
    }
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"activation_dropout", "dropout", "init_std", "layerdrop", "prefix"}
    )

    model_type: Literal["opt"]
    do_layer_norm_before: Literal[True]
    remove_final_layer_norm: Literal[False]
    enable_bias: bool
    layer_norm_elementwise_affine: Literal[True]
    word_embed_proj_dim: int

    @model_validator(mode="after")
    def _embeds_in_full_size(self) -> "Config":
        if self.word_embed_proj_dim != self.hidden_size:
            raise ValueError(
                f"word_embed_proj_dim = {self.word_embed_proj_dim} is not supported: expected "
                f"hidden_size = {self.hidden_size}"
            )
        return self

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        if raw.get("word_embed_proj_dim") is None:
            raw = {**raw, "word_embed_proj_dim": raw.get("hidden_size")}
        return super().read(raw, where)


class Model(LearnedPositions):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "model": "model.decoder",
        "decoder.norm": "decoder.final_layer_norm",
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "o_proj": "out_proj",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
    }

    def __init__(self, config: Config) -> None:
        bias = config.enable_bias
        blocks = [
            Block(config, Attention(config, bias, bias), MLP(config, bias), LayerNorm)
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        sources = super()._sources(name, shape)
        if "embed_positions" not in name:
            return sources
        stored = (shape[0] + OFFSET, shape[1])
        return (Source(sources[0].name, stored, view=lambda table: table[OFFSET:]),)
