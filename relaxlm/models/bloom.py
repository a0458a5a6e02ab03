"""BLOOM and BLOOMZ, after `transformers/models/bloom/modeling_bloom.py`: ALiBi, biases everywhere,
and a norm of the embedding."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from tvm.relax.frontend.nn import Tensor

from relaxlm.models.alibi import AlibiConfig
from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.gpt_neox import by_kind
from relaxlm.models.layers import MLP, Attention, Block, LayerNorm
from relaxlm.models.weights import Source


class Config(AlibiConfig):
    absent: ClassVar[dict] = {
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
        "seq_length": 2048,
    }
    spelling: ClassVar[dict] = {
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "layer_norm_epsilon": "norm_eps",
        "seq_length": "max_position_embeddings",
    }
    without_effect: ClassVar[frozenset[str]] = frozenset(
        "masked_softmax_fusion offset_alibi skip_bias_add skip_bias_add_qkv slow_but_exact".split()
    )

    model_type: Literal["bloom"]
    rope: None = None
    hidden_act: Literal["gelu_pytorch_tanh"]
    apply_residual_connection_post_layernorm: Literal[False]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        raw = dict(raw)
        width = raw.get("n_embed") or raw.get("hidden_size")
        if isinstance(width, int):
            raw["hidden_size"], raw["intermediate_size"] = width, 4 * width
        return super().read(raw, where)

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> Any:
        return None


class Model(CausalLM):
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "model": "transformer",
        "embed_tokens": "word_embeddings",
        "embed_norm": "word_embeddings_layernorm",
        "layers": "h",
        "norm": "ln_f",
        "self_attn": "self_attention",
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    }

    def __init__(self, config: Config) -> None:
        blocks = [
            Block(config, Attention(config, True, True), MLP(config), LayerNorm)
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks, LayerNorm)
        self.model.embed_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_norm(super().embed(input_ids))

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        (source,) = super()._sources(name, shape)
        if ".qkv_proj." not in name:
            return (source,)
        return (Source(source.name, shape, view=by_kind(self.config.num_attention_heads)),)
