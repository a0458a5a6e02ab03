"""DeepSeek-V3, V3.1 and R1, Kimi K2, after
`transformers/models/deepseek_v3/modeling_deepseek_v3.py`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from relaxlm.models import deepseek_v2
from relaxlm.models.biased_router import BiasedConfig, BiasedMLP
from relaxlm.models.latent import LatentConfig
from relaxlm.models.moe import SharedMLP


class Config(LatentConfig, BiasedConfig):
    """The first `first_k_dense_replace` layers have a single MLP, the others experts."""

    absent: ClassVar[dict] = {
        "num_key_value_heads": 128,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rope_interleave": True,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_nextn_predict_layers": 1,
        # Of training only.
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "output_router_logits": False,
        "seq_aux": True,
    }
    spelling: ClassVar[Mapping[str, str]] = deepseek_v2.Config.spelling
    absent_q_lora_rank: ClassVar[int] = 1536
    rope_in_pairs: ClassVar[bool] = True
    mlp_bias: ClassVar[bool] = False

    model_type: Literal["deepseek_v3", "kimi_k2"]
    scoring_func: Literal["sigmoid"]
    rope_interleave: Literal[True]
    n_shared_experts: NonNegativeInt  # type: ignore[assignment]
    first_k_dense_replace: NonNegativeInt
    moe_intermediate_size: PositiveInt
    moe_layer_freq: Literal[1]

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size


class Model(deepseek_v2.Model):
    routed_mlp: ClassVar[type[SharedMLP]] = BiasedMLP
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "e_score_correction_bias": "gate.e_score_correction_bias"
    }
    # Whatever folders for MLC do: they have none with more experts.
    float_gate_outputs: ClassVar[int] = 512
