"""BERT as an encoder of texts, after `transformers/models/bert/modeling_bert.py`.

What bge, E5, GTE, MiniLM and Arctic Embed are. Every text is of token type 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import PositiveInt
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.encoder import Encoder, EncoderConfig, EncoderStep
from relaxlm.models.layers import ACTIVATIONS, LayerNorm


class Config(EncoderConfig):
    """`rope` is None: a table has a vector for each of `max_position_embeddings` positions."""

    absent: ClassVar[dict] = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
    }
    spelling: ClassVar[dict] = {"layer_norm_eps": "norm_eps"}

    model_type: Literal["bert"]
    rope: None  # type: ignore[assignment]
    type_vocab_size: PositiveInt
    position_embedding_type: Literal["absolute"]

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> Any:
        return None


class SelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        self.heads, self.dim = 3 * config.num_attention_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, self.heads * self.dim)

    def forward(self, x: Tensor, step: EncoderStep) -> Tensor:
        return step.attention(op.reshape(self.qkv(x), (x.shape[0], self.heads, self.dim)))


class Output(nn.Module):
    """A projection back to the residual stream, which is normed behind the sum."""

    def __init__(self, config: Config, size: int) -> None:
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        self.self = SelfAttention(config)
        self.output = Output(config, config.num_attention_heads * config.head_dim)

    def forward(self, x: Tensor, step: EncoderStep) -> Tensor:
        return self.output(self.self(x, step), x)


class Intermediate(nn.Module):
    def __init__(self, config: Config) -> None:
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(self, x: Tensor, step: EncoderStep, layer: int) -> Tensor:
        x = self.attention(x, step)
        return self.output(self.intermediate(x), x)


class Embeddings(nn.Module):
    def __init__(self, config: Config) -> None:
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        first = Tensor.from_const(np.zeros(1, np.int32))
        return self.LayerNorm(x + self.token_type_embeddings(first))


class Layers(nn.Module):
    def __init__(self, config: Config) -> None:
        self.layer = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])


class Model(Encoder):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv": ("query", "key", "value")}
    # `embeddings` is an entry point.
    checkpoint_names: ClassVar[Mapping[str, str]] = {"inputs": "embeddings"}
    published_names: ClassVar[Mapping[str, str]] = checkpoint_names
    # The pooler is for classification, `cls` for masked words; older files have a buffer, too.
    ignored: ClassVar[tuple[str, ...]] = (
        *("pooler.*", "*.pooler.*", "cls.*"),
        *("embeddings.position_ids", "*.embeddings.position_ids"),
    )
    base_name: ClassVar[str] = "bert"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.inputs = Embeddings(config)
        self.encoder = Layers(config)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.inputs(input_ids, positions)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.encoder.layer)
