"""Granite 3 mixtures of experts, after `transformers/models/granitemoe/modeling_granitemoe.py`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models import granite, mixtral
from relaxlm.models.layers import Attention, Block
from relaxlm.models.moe import MoEConfig, MoELM, SparseMLP
from relaxlm.models.routing import choose
from relaxlm.models.weights import Source


class Config(granite.Config, MoEConfig):
    absent: ClassVar[dict] = {
        **granite.Config.absent,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    spelling: ClassVar[Mapping[str, str]] = mixtral.Config.spelling

    model_type: Literal["granitemoe"]  # type: ignore[assignment]
    mlp_bias: Literal[False]


class ChosenSoftmax(SparseMLP):
    """The softmax is over the chosen experts."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, chosen = choose(self.gate(x), self.config.num_experts_per_tok)
        return op.softmax(scores, axis=-1), chosen


class Model(MoELM):
    fused: ClassVar[dict[str, tuple[str, ...]]] = mixtral.Model.fused
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "mlp": "block_sparse_moe",
        "gate": "router.layer",
        "moe_gate_up_proj": "input_linear",
        "moe_down_proj": "output_linear",
    }

    def __init__(self, config: Config) -> None:
        bias = config.attention_bias
        super().__init__(
            config,
            [
                Block(config, Attention(config, bias, bias), ChosenSoftmax(config))
                for _ in range(config.num_hidden_layers)
            ],
        )

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        if len(shape) == 3:  # of all experts, as we have them
            return (Source(self._checkpoint_name(name), shape),)
        return super()._sources(name, shape)
