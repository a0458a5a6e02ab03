"""Hunyuan dense, after `transformers/models/hunyuan_v1_dense/modeling_hunyuan_v1_dense.py`: every
query and key head has a norm behind its rotary embedding."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from tvm.relax.frontend.nn import Tensor

from relaxlm.models import layers, llama
from relaxlm.models.base import CausalLM, Step
from relaxlm.models.config import DecoderConfig, rope_fields
from relaxlm.models.layers import Block, GatedMLP, RMSNorm, merge_heads, split_heads
from relaxlm.models.rope import AlphaRope, DefaultRope

# Fields beside `alpha` that do nothing where there is one.
_BESIDE_ALPHA = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


class Config(DecoderConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "tie_word_embeddings": False,
        # Of the files that are published, beside what transformers reads.
        "mlp_bias": False,
        "use_cla": False,
        "use_qk_norm": True,
        "use_rotary_pos_emb": True,
        "norm_type": "rms",
    }
    without_effect: ClassVar[frozenset[str]] = frozenset(
        """
        add_classification_head attention_head_dim cla_share_factor class_num dense_list
        enable_lm_head_fp32 eod_token_id im_end_id im_newline_id im_start_id mask_init_id
        org_vocab_size pool_type sep_token_id text_end_id text_start_id
        """.split()
    )

    model_type: Literal["hunyuan_v1_dense"]
    rope: Annotated[AlphaRope | DefaultRope, Field(discriminator="rope_type")]  # type: ignore[assignment]
    attention_bias: bool
    mlp_bias: Literal[False]
    use_cla: Literal[False]
    use_qk_norm: Literal[True]
    use_rotary_pos_emb: Literal[True]
    norm_type: Literal["rms"]

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        given = values.get("rope_parameters") or values.get("rope_scaling") or {}
        kind = given.get("rope_type", given.get("type"))
        if kind != "dynamic" or not given.get("alpha"):
            return super()._rope(values)
        left = ("type", "rope_type", *_BESIDE_ALPHA)
        scaling = {name: value for name, value in given.items() if name not in left}
        return rope_fields(values, {**scaling, "rope_type": "ntk_alpha"})


class Attention(layers.Attention):
    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        q, k, v = split_heads(self.qkv_proj(x), self.config)
        q, k = self.q_norm(step.rotary(q, layer)), self.k_norm(step.rotary(k, layer))
        return self.o_proj(merge_heads(step.attention(layer, q, k, v)))


class Model(CausalLM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = llama.Model.fused
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "q_norm": "query_layernorm",
        "k_norm": "key_layernorm",
    }

    def __init__(self, config: Config) -> None:
        def block() -> Block:
            bias = config.attention_bias
            return Block(config, Attention(config, bias, bias, RMSNorm), GatedMLP(config))

        super().__init__(config, [block() for _ in range(config.num_hidden_layers)])
