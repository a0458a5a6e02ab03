"""MPT, after `transformers/models/mpt/modeling_mpt.py` and the code that is published with its
weights, which also reads `alibi_bias_max`: ALiBi, and nothing has a bias."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, model_validator

from relaxlm.models.alibi import AlibiConfig, slopes
from relaxlm.models.base import CausalLM
from relaxlm.models.config import WITHOUT_EFFECT, DecoderConfig
from relaxlm.models.layers import MLP, Block, LayerNorm
from relaxlm.models.olmo import ClippedAttention


class AttentionConfig(BaseModel):
    """`attn_config`; a field that is not known here might change the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attn_type: Literal["multihead_attention"] = "multihead_attention"
    clip_qkv: PositiveFloat | None = None
    softmax_scale: PositiveFloat | None = None
    prefix_lm: Literal[False] = False
    qk_ln: Literal[False] = False
    attn_uses_sequence_id: Literal[False] = False
    alibi: Literal[True] = True
    alibi_bias_max: PositiveFloat = 8

    @model_validator(mode="before")
    @classmethod
    def _without_what_has_no_effect(cls, values: Any) -> Any:
        """Without what is off, how it is computed, and what transformers writes of the part."""
        if not isinstance(values, dict):
            return values
        known, unread = set(cls.model_fields), WITHOUT_EFFECT | {"attn_impl"}
        return {
            key: value
            for key, value in values.items()
            if value is not None and (key in known or (value and key not in unread))
        }


class Config(AlibiConfig):
    absent: ClassVar[dict] = {
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "layer_norm_epsilon": 1e-5,
        "logit_scale": None,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
    }
    spelling: ClassVar[dict] = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "max_seq_len": "max_position_embeddings",
        "layer_norm_epsilon": "norm_eps",
    }
    # With ALiBi, no positions are learned, whatever the file says.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        "emb_pdrop embedding_fraction init_config init_device learned_pos_emb param_init_fn "
        "tokenizer_name verbose".split()
    )

    model_type: Literal["mpt"]
    rope: None = None
    hidden_act: Literal["gelu"]
    expansion_ratio: Literal[4]
    logit_scale: None
    no_bias: Literal[True]
    norm_type: Literal["low_precision_layernorm", "layernorm"]
    attn_config: AttentionConfig = AttentionConfig()

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        raw = dict(raw)
        width = raw.get("d_model") or raw.get("hidden_size")
        if isinstance(width, int):
            raw["intermediate_size"] = 4 * width
        return super().read(raw, where)

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> Any:
        return None

    @property
    def attention_scale(self) -> float:
        return self.attn_config.softmax_scale or super().attention_scale

    @property
    def alibi_slopes(self) -> tuple[float, ...]:
        return slopes(self.num_attention_heads, self.attn_config.alibi_bias_max)


class Model(CausalLM):
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "model": "transformer",
        "embed_tokens": "wte",
        "layers": "blocks",
        "norm": "norm_f",
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "norm_2",
        "self_attn": "attn",
        "qkv_proj": "Wqkv",
        "o_proj": "out_proj",
        "mlp": "ffn",
    }

    def __init__(self, config: Config) -> None:
        norm = partial(LayerNorm, bias=False)

        def block() -> Block:
            attention = ClippedAttention(config, config.attn_config.clip_qkv)
            return Block(config, attention, MLP(config, bias=False), norm)

        super().__init__(config, [block() for _ in range(config.num_hidden_layers)], norm)
