"""ERNIE 4.5 21B-A3B and 300B-A47B, after
`transformers/models/ernie4_5_moe/modeling_ernie4_5_moe.py`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from relaxlm.models.base import CausalLM
from relaxlm.models.biased_router import BiasedConfig, BiasedMLP
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Attention, Block, GatedMLP
from relaxlm.models.moe import MoEConfig, MoELM
from relaxlm.models.weights import Source


class Config(BiasedConfig):
    """Every `moe_layer_interval`-th of the layers between start and end has experts."""

    absent: ClassVar[dict] = {
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "moe_gate": "topk",
        "moe_use_aux_free": True,
        "use_rmsnorm": True,
        "scoring_func": "softmax",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        # Of training only.
        "moe_capacity": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        **MoEConfig.spelling,
        "moe_k": "num_experts_per_tok",
        "moe_num_experts": "num_experts",
        "moe_num_shared_experts": "n_shared_experts",
    }
    rope_in_pairs: ClassVar[bool] = True

    model_type: Literal["ernie4_5_moe"]
    n_shared_experts: NonNegativeInt  # type: ignore[assignment]
    scoring_func: Literal["softmax"]
    use_bias: Literal[False]
    moe_intermediate_size: PositiveInt
    moe_layer_start_index: NonNegativeInt
    moe_layer_end_index: int
    moe_layer_interval: PositiveInt
    # What the weights' sum is at least taken for: always less than it is.
    moe_norm_min: Annotated[float, Field(ge=0, le=1e-6)]
    moe_gate: Literal["topk"]
    moe_use_aux_free: Literal[True]
    use_rmsnorm: Literal[True]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        last, layers = raw.get("moe_layer_end_index"), raw.get("num_hidden_layers")
        if last in (None, -1) and isinstance(layers, int):
            raw = {**raw, "moe_layer_end_index": layers - 1}
        return super().read(raw, where)

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size

    def has_experts(self, layer: int) -> bool:
        within = self.moe_layer_start_index <= layer <= self.moe_layer_end_index
        return within and (layer + 1) % self.moe_layer_interval == 0


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "e_score_correction_bias": "moe_statics.e_score_correction_bias"
    }
    # Layers that guess further tokens.
    ignored: ClassVar[tuple[str, ...]] = (*CausalLM.ignored, "model.mtp_*")

    def __init__(self, config: Config) -> None:
        def mlp(layer: int) -> GatedMLP | BiasedMLP:
            return BiasedMLP(config) if config.has_experts(layer) else GatedMLP(config)

        super().__init__(
            config,
            [Block(config, Attention(config), mlp(i)) for i in range(config.num_hidden_layers)],
        )

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        if name.endswith("e_score_correction_bias"):  # [1, experts]
            return (Source(self._checkpoint_name(name), (1, *shape), view=np.squeeze),)
        return super()._sources(name, shape)
