"""DeepSeek-V2 and V2-Lite, after `transformers/models/deepseek_v2/modeling_deepseek_v2.py`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.errors import ConfigError
from relaxlm.models.latent import LatentAttention, LatentConfig, projection_source
from relaxlm.models.layers import Block, GatedMLP
from relaxlm.models.moe import MoEConfig, MoELM, SharedMLP
from relaxlm.models.routing import choose, limit_to_groups
from relaxlm.models.weights import Role, Source


class Config(LatentConfig, MoEConfig):
    """The first `first_k_dense_replace` layers have a single MLP, the others experts."""

    absent: ClassVar[dict] = {
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 0,
        "moe_intermediate_size": 1407,
        "moe_layer_freq": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_group": 0,
        "topk_group": 0,
        # Of training only.
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "output_router_logits": False,
        "seq_aux": True,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        **MoEConfig.spelling,
        "n_routed_experts": "num_experts",
    }
    absent_q_lora_rank: ClassVar[int] = 1536
    rope_in_pairs: ClassVar[bool] = True

    model_type: Literal["deepseek_v2"]
    mlp_bias: bool
    first_k_dense_replace: NonNegativeInt
    num_experts_per_tok: NonNegativeInt
    n_shared_experts: PositiveInt  # type: ignore[assignment]
    moe_intermediate_size: PositiveInt
    moe_layer_freq: Literal[1]
    topk_method: Literal["greedy", "group_limited_greedy"]
    scoring_func: Literal["softmax"]
    norm_topk_prob: Literal[False]
    routed_scaling_factor: float
    n_group: NonNegativeInt
    topk_group: NonNegativeInt

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size


class RoutedMLP(SharedMLP):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.mlp_bias)
        if config.num_experts_per_tok == 0:
            raise ConfigError(
                "config.json: num_experts_per_tok is missing, and layers have experts"
            )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        config, scores = self.config, op.softmax(self.gate(x), axis=-1)
        if config.topk_method == "group_limited_greedy":
            scores = limit_to_groups(scores, config.n_group, config.topk_group)
        share, chosen = choose(scores, config.num_experts_per_tok)
        return share * config.routed_scaling_factor, chosen


class Model(MoELM):
    config: Config
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"gate_up_proj": ("gate_proj", "up_proj")}
    routed_mlp: ClassVar[type[SharedMLP]] = RoutedMLP

    def __init__(self, config: Config) -> None:
        def mlp(layer: int) -> GatedMLP | SharedMLP:
            if layer < config.first_k_dense_replace:
                return GatedMLP(config, config.mlp_bias)
            return self.routed_mlp(config)

        layers = range(config.num_hidden_layers)
        super().__init__(config, [Block(config, LatentAttention(config), mlp(i)) for i in layers])

    def _role(self, name: str, shape: tuple[int, ...]) -> Role:
        # As in folders for MLC, which quantize neither.
        return "vector" if name.endswith(("w_uk", "w_uv")) else super()._role(name, shape)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        if name.endswith(("w_uk", "w_uv")):
            return (projection_source(name, self.config),)
        return super()._sources(name, shape)
