"""Mixtral 8x7B and 8x22B, after `transformers/models/mixtral/modeling_mixtral.py`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.models.layers import Attention, Block
from relaxlm.models.moe import MoEConfig, MoELM, SparseMLP


class Config(MoEConfig):
    absent: ClassVar[dict] = {
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        **MoEConfig.spelling,
        "num_local_experts": "num_experts",
    }

    model_type: Literal["mixtral"]

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        return ["sliding_attention"] * layers


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "mlp": "block_sparse_moe",
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
    }
    published_names: ClassVar[Mapping[str, str]] = {
        "mlp": "moe",
        "moe_gate_up_proj": "e1_e3",
        "moe_down_proj": "e2",
    }

    def __init__(self, config: Config) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(
            config, [Block(config, Attention(config), SparseMLP(config)) for _ in layers]
        )
