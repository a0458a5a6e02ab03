"""Phi-3.5-MoE and Phi-mini-MoE, after `transformers/models/phimoe/modeling_phimoe.py`.

Its longrope has a factor of attention for short texts and one for long ones. For long ones
transformers takes the short texts' factors of frequencies all the same, and Microsoft's own code,
in the models' folders, those for long ones, as is done here.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat
from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models import mixtral
from relaxlm.models.layers import Attention, Block, LayerNorm
from relaxlm.models.moe import MoEConfig, MoELM, SparseMLP
from relaxlm.models.routing import choose


class Config(MoEConfig):
    absent: ClassVar[dict] = {
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "lm_head_bias": False,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
        # Of training only.
        "expert_dropout": 0.0,
        "input_jitter_noise": 0.0,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    spelling: ClassVar[Mapping[str, str]] = mixtral.Config.spelling

    model_type: Literal["phimoe"]
    num_experts_per_tok: Literal[2]
    attention_bias: bool
    lm_head_bias: bool
    router_jitter_noise: NonNegativeFloat

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        return ["sliding_attention"] * layers  # with a window of 0, if there is none


class MixedMLP(SparseMLP):
    """Two experts, each weighed against those with about its score (arXiv:2409.12136)."""

    config: Config

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x)
        best, chosen = choose(scores, 2)
        return share_of_close_ones(scores, best, chosen, self.config.router_jitter_noise), chosen


def share_of_close_ones(scores: Tensor, best: Tensor, chosen: Tensor, jitter: float) -> Tensor:
    """What a softmax gives each of the chosen, over those that are less by 2 jitter at most.

    The difference is relative to the larger of both; the first one does not count for the second.

    Args:
        scores: [n, experts] float32.
        best, chosen: [n, 2], the two best scores and their places.

    Returns:
        [n, 2] float32.
    """

    def compute(scores: te.Tensor, best: te.Tensor, chosen: te.Tensor) -> te.Tensor:
        e = te.reduce_axis((0, scores.shape[1]), "e")
        zero = tirx.const(0.0, "float32")

        def weight(i, j):
            score, top = scores[i, e], best[i, j]
            far = (top - score) / tirx.Max(tirx.abs(score), top)
            is_far = far > tirx.const(2 * jitter, "float32")
            is_taken = tirx.And(j == 1, chosen[i, 0] == e.var)
            return tirx.Select(tirx.Or(is_far, is_taken), zero, tirx.exp(score - top))

        total = te.compute(best.shape, lambda i, j: te.sum(weight(i, j), axis=e), name="total")
        one = tirx.const(1.0, "float32")
        return te.compute(best.shape, lambda i, j: one / total[i, j], name="share")

    return op.tensor_expr_op(compute, "share_of_close_ones", [scores, best, chosen])


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = mixtral.Model.fused
    checkpoint_names: ClassVar[Mapping[str, str]] = mixtral.Model.checkpoint_names

    def __init__(self, config: Config) -> None:
        bias = config.attention_bias
        super().__init__(
            config,
            [
                Block(config, Attention(config, bias, bias), MixedMLP(config), LayerNorm)
                for _ in range(config.num_hidden_layers)
            ],
            LayerNorm,
            head_bias=config.lm_head_bias,
        )
