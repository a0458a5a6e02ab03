"""GLM-4.5 and 4.6, after `transformers/models/glm4_moe/modeling_glm4_moe.py`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from relaxlm.models.biased_router import BiasedConfig, BiasedMLP
from relaxlm.models.layers import Attention, Block, GatedMLP, RMSNorm
from relaxlm.models.moe import MoEConfig, MoELM


class FirstLayersDense(BiasedConfig):
    """The first `first_k_dense_replace` layers have a single MLP, the others experts."""

    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        # Of training only.
        "output_router_logits": False,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        **MoEConfig.spelling,
        "n_routed_experts": "num_experts",
    }

    scoring_func: Literal["sigmoid"]
    attention_bias: bool
    n_shared_experts: NonNegativeInt = 0  # type: ignore[assignment]
    first_k_dense_replace: NonNegativeInt
    moe_intermediate_size: PositiveInt

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size


class Config(FirstLayersDense):
    absent: ClassVar[dict] = {
        **FirstLayersDense.absent,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "num_nextn_predict_layers": 1,
    }

    model_type: Literal["glm4_moe"]
    use_qk_norm: bool


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "e_score_correction_bias": "gate.e_score_correction_bias"
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config, [self.block(config, i) for i in range(config.num_hidden_layers)])

    def attention(self, config: Config) -> Attention:
        norm = RMSNorm if config.use_qk_norm else None
        return Attention(config, config.attention_bias, head_norm=norm)

    def block(self, config: Config, layer: int) -> Block:
        is_dense = layer < config.first_k_dense_replace
        mlp = GatedMLP(config) if is_dense else BiasedMLP(config)
        return Block(config, self.attention(config), mlp)
