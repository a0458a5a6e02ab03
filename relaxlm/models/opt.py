"""OPT, after `transformers/models/opt/modeling_opt.py`: GPT-2 with ReLU and a matrix each for
queries, keys and values. 350M has its norms behind attention and MLP, and narrower embeddings."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relaxlm.errors import UnsupportedError
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import MLP, Attention, Block, Float32Linear, LayerNorm, Norm
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
    do_layer_norm_before: bool
    remove_final_layer_norm: bool
    enable_bias: bool
    layer_norm_elementwise_affine: bool
    word_embed_proj_dim: PositiveInt

    @property
    def has_final_norm(self) -> bool:
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        if raw.get("word_embed_proj_dim") is None:
            raw = {**raw, "word_embed_proj_dim": raw.get("hidden_size")}
        return super().read(raw, where)


class PostNormBlock(Block):
    """The residual stream goes through a norm behind attention and behind the MLP."""

    def forward(self, x: Tensor, step, layer: int) -> Tensor:
        x = self.input_layernorm(x + self.self_attn(x, step, layer))
        return self.post_attention_layernorm(x + self.mlp(x))


class NoNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Model(LearnedPositions):
    config: Config
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
        affine = config.layer_norm_elementwise_affine
        norm: Norm = partial(LayerNorm, weight=affine, bias=affine)
        make = Block if config.do_layer_norm_before else PostNormBlock
        bias = config.enable_bias
        blocks = [
            make(config, Attention(config, bias, bias), MLP(config, bias), norm)
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks, norm if config.has_final_norm else lambda *_: NoNorm())
        width, hidden = config.word_embed_proj_dim, config.hidden_size
        self.is_projected = width != hidden
        if not self.is_projected:
            return
        if not config.has_head:
            raise UnsupportedError(
                f"word_embed_proj_dim = {width} is not supported for embeddings: the reference "
                f"gives vectors of that size, and relaxlm those of hidden_size = {hidden}"
            )
        self.model.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.model.project_in = nn.Linear(width, hidden, bias=False)
        self.model.project_out = nn.Linear(hidden, width, bias=False)
        if not config.tie_word_embeddings:
            self.lm_head = Float32Linear(width, config.vocab_size)

    def embed(self, input_ids: Tensor) -> Tensor:
        x = super().embed(input_ids)
        return self.model.project_in(x) if self.is_projected else x

    def _logits(self, x: Tensor) -> Tensor:
        return super()._logits(self.model.project_out(x) if self.is_projected else x)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        sources = super()._sources(name, shape)
        if "embed_positions" not in name:
            return sources
        stored = (shape[0] + OFFSET, shape[1])
        return (Source(sources[0].name, stored, view=lambda table: table[OFFSET:]),)
