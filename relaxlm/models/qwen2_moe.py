"""Qwen1.5-MoE and Qwen2-57B-A14B, after `transformers/models/qwen2_moe/modeling_qwen2_moe.py`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.layers import Attention, Block, GatedMLP
from relaxlm.models.moe import MoEConfig, MoELM, SparseMLP


class SomeLayers(MoEConfig):
    """Qwen's fields: experts have their own width, and some layers have none.

    Attributes:
        decoder_sparse_step: every so many-th layer has experts,
        mlp_only_layers: except these.
    """

    moe_intermediate_size: PositiveInt
    norm_topk_prob: bool
    decoder_sparse_step: PositiveInt
    mlp_only_layers: tuple[int, ...]

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size

    @property
    def norm_experts(self) -> bool:
        return self.norm_topk_prob

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, not a single MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


class SharedExpert(MoEConfig):
    """Besides the experts that are chosen, one that every token passes."""

    shared_expert_intermediate_size: PositiveInt


class Config(SomeLayers, SharedExpert):
    absent: ClassVar[dict] = {
        "num_key_value_heads": 16,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
        "qkv_bias": True,
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }

    model_type: Literal["qwen2_moe"]
    qkv_bias: Literal[True]

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        """With windows, every other of the first layers has one."""
        windows = values["max_window_layers"] if values["use_sliding_window"] else 0
        return [
            "sliding_attention" if i % 2 == 0 and i < windows else "full_attention"
            for i in range(layers)
        ]


class SharedMLP(SparseMLP):
    """Experts, and one more that every token passes, as far as a gate of its own opens."""

    def __init__(self, config: SharedExpert) -> None:
        super().__init__(config)
        size = config.shared_expert_intermediate_size
        self.shared_expert = GatedMLP(config.model_copy(update={"intermediate_size": size}))
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shared = op.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return super().forward(x) + shared


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    published_names: ClassVar[Mapping[str, str]] = {"qkv_proj": "c_attn"}

    def __init__(self, config: Config) -> None:
        super().__init__(
            config,
            [
                Block(
                    config,
                    Attention(config, qkv_bias=True),
                    SharedMLP(config) if config.has_experts(i) else GatedMLP(config),
                )
                for i in range(config.num_hidden_layers)
            ],
        )
