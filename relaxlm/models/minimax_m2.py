"""MiniMax M2, M2.1 and M2.5, after `transformers/models/minimax_m2/modeling_minimax_m2.py`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.models import mixtral
from relaxlm.models.biased_router import BiasedConfig, BiasedMLP
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Block, JointNormAttention
from relaxlm.models.moe import MoEConfig, MoELM


class Config(BiasedConfig):
    """`rotary_dim` features of a head turn."""

    absent: ClassVar[dict] = {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": False,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "attn_type_list": [],
        "qk_norm_type": "per_layer",
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "topk_method": "noaux_tc",
        "use_qk_norm": True,
        "use_routing_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        # Of layers that guess further tokens.
        "mtp_transformer_layers": 1,
        "use_mtp": False,
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        **MoEConfig.spelling,
        "num_local_experts": "num_experts",
        "num_mtp_modules": "num_nextn_predict_layers",
        "rotary_dim": "rotary_dim",
    }

    model_type: Literal["minimax_m2"]
    scoring_func: Literal["sigmoid"]
    attn_type_list: tuple[Literal[1], ...]  # 1 is full attention
    qk_norm_type: Literal["per_layer"]
    shared_intermediate_size: Literal[0]
    use_qk_norm: Literal[True]
    use_routing_bias: Literal[True]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        turning, size = raw.get("rotary_dim"), raw.get("head_dim") or cls.absent["head_dim"]
        if isinstance(turning, int) and isinstance(size, int) and size > 0:
            raw = {**raw, "partial_rotary_factor": turning / size}
        return super().read(raw, where)


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = mixtral.Model.fused
    checkpoint_names: ClassVar[Mapping[str, str]] = mixtral.Model.checkpoint_names

    def __init__(self, config: Config) -> None:
        super().__init__(
            config,
            [
                Block(config, JointNormAttention(config), BiasedMLP(config))
                for _ in range(config.num_hidden_layers)
            ],
        )
