"""OLMoE, after `transformers/models/olmoe/modeling_olmoe.py`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from relaxlm.models import mixtral
from relaxlm.models.layers import Block, JointNormAttention
from relaxlm.models.moe import MoEConfig, MoELM, SparseMLP


class Config(MoEConfig):
    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "clip_qkv": None,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
    }
    # Published files say num_experts, and files that transformers 5 writes the other.
    spelling: ClassVar[Mapping[str, str]] = {
        **MoEConfig.spelling,
        "num_local_experts": "num_experts",
    }

    model_type: Literal["olmoe"]
    attention_bias: bool
    clip_qkv: Literal[None]
    norm_topk_prob: bool

    @property
    def norm_experts(self) -> bool:
        return self.norm_topk_prob


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = mixtral.Model.fused

    def __init__(self, config: Config) -> None:
        bias = config.attention_bias
        super().__init__(
            config,
            [
                Block(config, JointNormAttention(config, bias, bias), SparseMLP(config))
                for _ in range(config.num_hidden_layers)
            ],
        )
