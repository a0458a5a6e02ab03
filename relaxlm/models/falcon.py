"""Falcon 7B, 40B, 180B, 11B and RW, after `transformers/models/falcon/modeling_falcon.py`.

Where positions are ALiBi (RW), transformers rounds the biases to bfloat16; here they are exact.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from relaxlm.models.alibi import AlibiConfig, slopes
from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.gpt_neox import by_kind
from relaxlm.models.internlm2 import by_group
from relaxlm.models.layers import MLP, Attention, Block, LayerNorm, ParallelBlock
from relaxlm.models.rope import Rope
from relaxlm.models.weights import Source


class Config(AlibiConfig):
    absent: ClassVar[dict] = {
        "layer_norm_epsilon": 1e-5,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "num_ln_in_parallel_attn": None,
        "bias": False,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "activation": "gelu",
        "tie_word_embeddings": True,
    }
    spelling: ClassVar[dict] = {
        "ffn_hidden_size": "intermediate_size",
        "activation": "hidden_act",
        "layer_norm_epsilon": "norm_eps",
        "num_kv_heads": "num_key_value_heads",
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
    }
    # The reference does not read it.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"apply_residual_connection_post_layernorm"}
    )

    model_type: Literal["falcon"]
    rope: Rope | None
    alibi: bool
    new_decoder_architecture: bool
    multi_query: bool
    parallel_attn: bool
    num_ln_in_parallel_attn: Literal[1, 2] | None
    bias: bool

    @model_validator(mode="after")
    def _is_one_of_the_published_shapes(self) -> "Config":
        if self.new_decoder_architecture and not self.parallel_attn:
            raise ValueError("new_decoder_architecture needs parallel_attn")
        if self.num_ln_in_parallel_attn == 2 and not self.new_decoder_architecture:
            raise ValueError("num_ln_in_parallel_attn = 2 needs new_decoder_architecture")
        heads = self.num_attention_heads
        if not (self.new_decoder_architecture or self.multi_query):
            if self.num_key_value_heads != heads:
                raise ValueError(
                    f"num_kv_heads = {self.num_key_value_heads}, expected num_attention_heads = "
                    f"{heads} without multi_query and new_decoder_architecture"
                )
        return self

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        raw = dict(raw)
        width = raw.get("hidden_size") or raw.get("n_embed")
        if isinstance(width, int) and not raw.get("ffn_hidden_size"):
            raw["ffn_hidden_size"] = 4 * width
        one = raw.get("multi_query") in (True, None) and not raw.get("new_decoder_architecture")
        if one:  # whatever num_kv_heads says
            raw["num_key_value_heads"] = 1
        if raw.get("new_decoder_architecture"):
            raw["num_ln_in_parallel_attn"] = raw.get("num_ln_in_parallel_attn") or 2
        return super().read(raw, where)

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> Any:
        return None if values["alibi"] else super()._rope(values)

    @property
    def alibi_slopes(self) -> tuple[float, ...] | None:
        if self.rope is not None:
            return None
        # Here the biases are scaled, too.
        return tuple(slope * self.attention_scale for slope in slopes(self.num_attention_heads))

    @property
    def norms(self) -> int:
        """Norms of a block whose attention and MLP stand side by side."""
        return self.num_ln_in_parallel_attn or 1


class Model(CausalLM):
    config: Config
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "model": "transformer",
        "embed_tokens": "word_embeddings",
        "layers": "h",
        "norm": "ln_f",
        "self_attn": "self_attention",
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    }

    def __init__(self, config: Config) -> None:
        if config.norms == 2:
            names = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
            self.checkpoint_names = {**self.checkpoint_names, **names}  # type: ignore[misc]

        def block() -> Block | ParallelBlock:
            attention, mlp = Attention(config, config.bias, config.bias), MLP(config, config.bias)
            if not config.parallel_attn:
                return Block(config, attention, mlp, LayerNorm)
            return ParallelBlock(config, attention, mlp, LayerNorm, config.norms)

        blocks = [block() for _ in range(config.num_hidden_layers)]
        super().__init__(config, blocks, LayerNorm)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        (source,) = super()._sources(name, shape)
        if ".qkv_proj." not in name:
            return (source,)
        if self.config.new_decoder_architecture:
            return (by_group(source, self.config),)
        if self.config.multi_query:  # all query heads, then one for keys and one for values
            return (source,)
        return (Source(source.name, shape, view=by_kind(self.config.num_attention_heads)),)
