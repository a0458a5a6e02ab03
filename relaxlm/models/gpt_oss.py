"""gpt-oss-20b and 120b, after `transformers/models/gpt_oss/modeling_gpt_oss.py`: sink logits,
windows in every other layer, biases everywhere, and experts with a gate of their own kind."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import PositiveFloat
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models import layers as shared
from relaxlm.models.base import Step
from relaxlm.models.config import rope_fields
from relaxlm.models.layers import Block, merge_heads
from relaxlm.models.moe import MoEConfig, MoELM, SparseMLP, weighted_sum
from relaxlm.models.routing import choose
from relaxlm.models.weights import Role, Source

# What transformers takes where config.json has no rotary embedding.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class Config(MoEConfig):
    absent: ClassVar[dict] = {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "rope_theta": 150000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    spelling: ClassVar[Mapping[str, str]] = {
        **MoEConfig.spelling,
        "num_local_experts": "num_experts",
        # Once more what other fields say.
        "experts_per_token": "num_experts_per_tok",
        "initial_context_length": "original_max_position_embeddings",
    }

    model_type: Literal["gpt_oss"]
    hidden_act: Literal["silu"]
    attention_bias: bool
    swiglu_alpha: PositiveFloat
    swiglu_limit: PositiveFloat

    @classmethod
    def default_layer_types(cls, values: Mapping[str, Any], layers: int) -> list[str]:
        return [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        given = values.get("rope_parameters") or values.get("rope_scaling")
        return rope_fields(values, given or _ROPE)


class Attention(shared.Attention):
    """`sinks` are logits of a token without a value, one for each head."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.attention_bias, config.attention_bias)
        self.sinks = nn.Parameter((config.num_attention_heads,))

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        q, k, v = self.project(x, step)
        q, k = step.rotary(q, layer), step.rotary(k, layer)
        return self.o_proj(merge_heads(step.attention(layer, q, k, v, sink_logits=self.sinks)))


class BiasedExperts(SparseMLP):
    """The router and the matrices of all experts have biases."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config, gate_bias=True, expert_bias=True)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, chosen = choose(self.gate(x), self.config.num_experts_per_tok)
        return op.softmax(scores, axis=-1), chosen

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        share, chosen = self.route(x)
        gate_up = self.moe_gate_up_proj(x, chosen, config.num_experts_per_tok)
        bias = self.moe_gate_up_proj.bias
        gated = clamped_glu(gate_up, bias, chosen, config.swiglu_alpha, config.swiglu_limit)
        down = self.moe_down_proj
        return weighted_sum(down(gated, chosen, 1), share, down.bias, chosen)


def clamped_glu(x: Tensor, bias: Tensor, chosen: Tensor, alpha: float, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), of clamped gate and up.

    Args:
        x: [n * each, 2 * inner], gate and up of the chosen experts without their biases.
        bias: [experts, 2 * inner].
        chosen: [n, each] int32.
        limit: the gate is at most this, up is between it and its negative.

    Returns:
        [n * each, inner] like x; computed in float32.
    """
    each, inner = int(chosen.shape[1]), int(x.shape[1]) // 2

    def compute(x: te.Tensor, bias: te.Tensor, chosen: te.Tensor) -> te.Tensor:
        most, one = tirx.const(limit, "float32"), tirx.const(1.0, "float32")

        def element(row, j):
            def part(at):
                own = bias[chosen[row // each, row % each], at]
                return x[row, at].astype("float32") + own.astype("float32")

            gate = tirx.Min(part(j), most)
            up = tirx.Max(tirx.Min(part(j + inner), most), -most)
            opened = gate / (one + tirx.exp(tirx.const(-alpha, "float32") * gate))
            return ((up + one) * opened).astype(x.dtype)

        return te.compute((x.shape[0], inner), element, name="clamped_glu")

    return op.tensor_expr_op(compute, "clamped_glu", [x, bias, chosen])


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    checkpoint_names: ClassVar[Mapping[str, str]] = {"gate": "router"}

    def __init__(self, config: Config) -> None:
        super().__init__(
            config,
            [
                Block(config, Attention(config), BiasedExperts(config))
                for _ in range(config.num_hidden_layers)
            ],
        )

    def _role(self, name: str, shape: tuple[int, ...]) -> Role:
        return "vector" if name.endswith(".bias") else super()._role(name, shape)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        """Experts are [E, in, out] in one tensor, with gate and up in turns."""
        stem, is_expert, part = name.partition(".moe_")
        if not is_expert:
            return super()._sources(name, shape)
        part, _, ending = part.partition(".")
        experts, in_turns = shape[0], part == "gate_up_proj"
        if ending == "bias":

            def split(bias: np.ndarray) -> np.ndarray:
                return bias.reshape(experts, -1, 2).transpose(0, 2, 1)

            source = f"{stem}.experts.{part}_bias"
            return (Source(source, shape, view=split if in_turns else None),)

        def matrix(expert: np.ndarray) -> np.ndarray:
            if not in_turns:
                return expert.T
            return expert.reshape(shape[2], -1, 2).transpose(2, 1, 0)

        source = f"{stem}.experts.{part}"
        stored = (experts, shape[2], shape[1])
        return tuple(Source(source, stored, view=matrix, index=i) for i in range(experts))
