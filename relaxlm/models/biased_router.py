"""Routers with a bias that balances the load of the experts (Wang et al. 2024, arXiv:2408.15664).

The bias decides which experts are chosen, and nothing else: their weights are the scores without
it.
"""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.layers import Float32Parameter
from relaxlm.models.moe import MoEConfig, SharedMLP
from relaxlm.models.routing import choose, limit_to_groups, pick

# In the sum that weights are divided by, as in the reference.
_EPSILON = 1e-20


class BiasedConfig(MoEConfig):
    """Of `n_group` groups of experts, a token's may be in the `topk_group` best only."""

    scoring_func: Literal["sigmoid", "softmax"]
    topk_method: Literal["noaux_tc"]
    norm_topk_prob: bool
    routed_scaling_factor: PositiveFloat
    n_group: PositiveInt
    topk_group: PositiveInt

    @model_validator(mode="after")
    def _groups_fit(self) -> "BiasedConfig":
        groups, kept, experts = self.n_group, self.topk_group, self.num_experts
        if experts % groups or (groups > 1 and experts // groups < 2) or kept > groups:
            raise ValueError(
                f"{experts} experts in n_group = {groups} groups, of which topk_group = {kept} are "
                "kept: expected groups of two or more experts, all of one size"
            )
        if self.num_experts_per_tok > experts // groups * kept:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} of the {experts // groups} "
                f"experts in each of topk_group = {kept} groups"
            )
        return self


class BiasedMLP(SharedMLP):
    """`SharedMLP` with such a router."""

    config: BiasedConfig

    def __init__(self, config: BiasedConfig) -> None:
        super().__init__(config)
        # Only differences of it matter, which half precision would lose next to its mean.
        self.e_score_correction_bias = Float32Parameter((config.num_experts,))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return route(self.config, self.gate(x), self.e_score_correction_bias)


def route(config: BiasedConfig, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of every row and their weights: [n, each] float32 and int32.

    Args:
        logits: [n, experts] float32.
        bias: [experts] float32.
    """
    scores = op.sigmoid(logits) if config.scoring_func == "sigmoid" else op.softmax(logits)
    ranked = scores + bias
    if config.topk_group < config.n_group:
        ranked = limit_to_groups(
            ranked, config.n_group, config.topk_group, best=2, otherwise=float("-inf")
        )
    _, chosen = choose(ranked, config.num_experts_per_tok)
    share = pick(scores, chosen)
    if config.norm_topk_prob:
        share = share / (op.sum(share, axis=-1, keepdims=True) + _EPSILON)
    return share * config.routed_scaling_factor, chosen
