"""ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4-9B in their own checkpoint layout, after the
`modeling_chatglm.py` that is published with their weights."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.errors import UnsupportedError
from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, Block, GatedMLP
from relaxlm.models.rope import DefaultRope


class Config(DecoderConfig):
    """Biases of q, k and v are `add_qkv_bias`, those of all other matrices `add_bias_linear`."""

    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rope_ratio": 1.0,
        "multi_query_attention": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "position_encoding_2d": False,
        "pre_seq_len": None,
        "tie_word_embeddings": False,
    }
    spelling: ClassVar[dict] = {
        "num_layers": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        "kv_channels": "head_dim",
        "multi_query_group_num": "num_key_value_heads",
        "padded_vocab_size": "vocab_size",
        "layernorm_epsilon": "norm_eps",
        "seq_length": "max_position_embeddings",
    }
    rope_in_pairs: ClassVar[bool] = True

    model_type: Literal["chatglm"]
    rope: DefaultRope
    position_encoding_2d: Literal[False]
    multi_query_attention: Literal[True]
    rmsnorm: Literal[True]
    post_layer_norm: Literal[True]
    apply_residual_connection_post_layernorm: Literal[False]
    add_bias_linear: bool
    add_qkv_bias: bool
    pre_seq_len: Literal[None]
    tie_word_embeddings: Literal[False]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        name, ratio = str(raw.get("_name_or_path", "")), raw.get("rope_ratio") or 1
        if "chatglm2" in name and ratio != 1:
            # Its code divides positions, where that of later ones multiplies the base.
            raise UnsupportedError(
                f"{where}: rope_ratio = {ratio} of {name} is not supported: its rotary embeddings "
                "are not those of ChatGLM3"
            )
        if raw.get("padded_vocab_size"):
            raw = {**raw, "vocab_size": raw["padded_vocab_size"]}
        return super().read(raw, where)

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        base = 10000.0 * values["rope_ratio"]
        return {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": 0.5}


class Model(CausalLM):
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "model": "transformer.encoder",
        "transformer.encoder.embed_tokens": "transformer.embedding.word_embeddings",
        "transformer.encoder.norm": "transformer.encoder.final_layernorm",
        "self_attn": "self_attention",
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "gate_up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
        "lm_head": "transformer.output_layer",
    }
    published_names: ClassVar[Mapping[str, str]] = {
        **checkpoint_names,
        "transformer.encoder.embed_tokens": "transformer.embedding",
    }
    ignored: ClassVar[tuple[str, ...]] = ("*.rotary_pos_emb.inv_freq",)

    def __init__(self, config: Config) -> None:
        bias = config.add_bias_linear
        blocks = [
            Block(
                config,
                Attention(config, bias or config.add_qkv_bias, bias),
                GatedMLP(config, bias),
            )
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, blocks)
