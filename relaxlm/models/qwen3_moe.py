"""Qwen3-30B-A3B and its kin, after `transformers/models/qwen3_moe/modeling_qwen3_moe.py`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.models import qwen2_moe
from relaxlm.models.layers import Attention, Block, GatedMLP, RMSNorm
from relaxlm.models.moe import MoEConfig, MoELM, SparseMLP


class Config(qwen2_moe.SomeLayers):
    absent: ClassVar[dict] = {
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_local_experts": 128,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    # Published files say num_experts, and files that transformers 5 writes the other.
    spelling: ClassVar[Mapping[str, str]] = {
        **MoEConfig.spelling,
        "num_local_experts": "num_experts",
    }

    model_type: Literal["qwen3_moe"]
    attention_bias: bool

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        kind = "sliding_attention" if values["use_sliding_window"] else "full_attention"
        return [kind] * layers


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = qwen2_moe.Model.fused
    published_names: ClassVar[Mapping[str, str]] = qwen2_moe.Model.published_names

    def __init__(self, config: Config) -> None:
        bias = config.attention_bias
        super().__init__(
            config,
            [
                Block(
                    config,
                    Attention(config, bias, bias, RMSNorm),
                    SparseMLP(config) if config.has_experts(i) else GatedMLP(config),
                )
                for i in range(config.num_hidden_layers)
            ],
        )
