"""Mixture of experts: each token passes a few of many MLPs, the ones that a router chooses."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt
from tvm import te
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.base import CausalLM
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import ACTIVATIONS, Float32Linear, GatedMLP
from relaxlm.models.routing import choose
from relaxlm.models.weights import Role, Source

# An abstract operator, which `compiler/passes/lower_expert_matmul.py` turns into kernels.
EXPERT_MATMUL = "relaxlm.expert_matmul"

# Outputs of the largest router that folders for MLC do not quantize.
FLOAT_GATE_OUTPUTS = 256


class MoEConfig(DecoderConfig):
    """What mixtures of experts have besides.

    Attributes:
        num_experts: of a layer.
        num_experts_per_tok: how many of them a token passes.
        n_shared_experts: how many others every token passes; none, where a family has no such.
        num_nextn_predict_layers: behind the last one in the checkpoint, layers that guess further
            tokens. They are not compiled, and their tensors stay unused.
    """

    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    n_shared_experts: Literal[0] = 0
    num_nextn_predict_layers: NonNegativeInt = 0

    @property
    def expert_size(self) -> int:
        """Inner width of an expert."""
        return self.intermediate_size

    @property
    def norm_experts(self) -> bool:
        """Whether the weights of a token's experts are scaled to add up to 1."""
        return True


class Experts(nn.Module):
    """The same projection of every expert: [E, N, K], and maybe their biases [E, N]."""

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool = False) -> None:
        self.weight = nn.Parameter((experts, outputs, inputs))
        # Added by what follows: `clamped_glu` of gpt-oss, `weighted_sum`.
        self.bias = nn.Parameter((experts, outputs)) if bias else None

    def forward(self, x: Tensor, chosen: Tensor, repeat: int) -> Tensor:
        """Row i of the result is row i // repeat of x times the matrix of expert chosen[i].

        Args:
            x: [rows / repeat, K].
            chosen: [n, experts_per_token] int32, rows of them in all.

        Returns:
            [rows, N], in the dtype of x.
        """
        n, each = chosen.shape
        shape = (n * each, self.weight.shape[1])
        result = Tensor.placeholder(shape, x.dtype)
        return op.extern(EXPERT_MATMUL, [x, self.weight, chosen, repeat], result)


class SparseMLP(nn.Module):
    """A router and gated MLPs, [n, hidden] -> [n, hidden].

    Args:
        gate_bias, expert_bias: whether the router has biases, and the experts' matrices.
    """

    def __init__(
        self, config: MoEConfig, gate_bias: bool = False, expert_bias: bool = False
    ) -> None:
        hidden, experts, inner = config.hidden_size, config.num_experts, config.expert_size
        self.config = config
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate = Float32Linear(hidden, experts, gate_bias)
        self.moe_gate_up_proj = Experts(experts, hidden, 2 * inner, expert_bias)
        self.moe_down_proj = Experts(experts, inner, hidden, expert_bias)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of every row and their weights: [n, each] float32 and int32."""
        share, chosen = choose(op.softmax(self.gate(x), axis=-1), self.config.num_experts_per_tok)
        if self.config.norm_experts:
            share = share / op.sum(share, axis=-1, keepdims=True)
        return share, chosen

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.route(x)
        gate_up = self.moe_gate_up_proj(x, chosen, self.config.num_experts_per_tok)
        gate, up = op.split(gate_up, 2, axis=-1)
        return weighted_sum(self.moe_down_proj(self.activation(gate) * up, chosen, 1), share)


class SharedMLP(SparseMLP):
    """Experts that a router chooses, and `shared_experts` that every token passes, as one MLP.

    Args:
        bias: whether the shared ones have biases.
    """

    def __init__(self, config: MoEConfig, bias: bool = False) -> None:
        super().__init__(config)
        shared = config.n_shared_experts
        wide = config.model_copy(update={"intermediate_size": config.expert_size * shared})
        self.shared_experts = GatedMLP(wide, bias) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        routed = super().forward(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class MoELM(CausalLM):
    """A decoder with layers of experts, whose checkpoint has a tensor for each expert."""

    # Parameter name parts that hold all experts' tensors -> those of one expert, in order.
    stacked: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "moe_gate_up_proj": ("gate_proj", "up_proj"),
        "moe_down_proj": ("down_proj",),
    }

    # Routers with more outputs than this are stored like other matrices.
    float_gate_outputs: ClassVar[int] = FLOAT_GATE_OUTPUTS

    def ignored_sources(self) -> tuple[str, ...]:
        first = self.config.num_hidden_layers
        behind = range(first, first + getattr(self.config, "num_nextn_predict_layers", 0))
        return (*super().ignored_sources(), *(f"model.layers.{layer}.*" for layer in behind))

    def _role(self, name: str, shape: tuple[int, ...]) -> Role:
        if len(shape) == 3 and name.endswith(".weight"):
            return "expert"
        is_gate = name.removesuffix(".weight").endswith("gate")
        if is_gate and shape[0] <= self.float_gate_outputs:
            return "vector"
        return super()._role(name, shape)

    def _sources(self, name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        *_, part, _ = f".{name}".split(".")
        if part in self.stacked:
            experts, rows, columns = shape
            pieces = self.stacked[part]
            return tuple(
                Source(
                    self._checkpoint_name(name.replace(part, f"experts.{expert}.{piece}")),
                    (rows // len(pieces), columns),
                )
                for expert in range(experts)
                for piece in pieces
            )
        if part == "gate_up_proj":  # of a shared expert, or of a layer without experts
            return tuple(
                Source(
                    self._checkpoint_name(name.replace(part, piece)), (shape[0] // 2, *shape[1:])
                )
                for piece in self.fused[part]
            )
        return super()._sources(name, shape)


def weighted_sum(
    x: Tensor, share: Tensor, bias: Tensor | None = None, chosen: Tensor | None = None
) -> Tensor:
    """The experts' results for every token, added up in float32.

    Args:
        x: [n * each, size].
        share: [n, each] float32.
        bias: [experts, size], added to the results of the `chosen` [n, each] int32 before.

    Returns:
        [n, size] like x.
    """
    each = int(share.shape[1])

    def compute(x: te.Tensor, share: te.Tensor, *own: te.Tensor) -> te.Tensor:
        j = te.reduce_axis((0, each), "j")

        def product(i, h):
            value = x[i * each + j, h].astype("float32")
            if own:
                bias, chosen = own
                value = value + bias[chosen[i, j], h].astype("float32")
            return value * share[i, j]

        total = te.compute(
            (share.shape[0], x.shape[1]),
            lambda i, h: te.sum(product(i, h), axis=j),
            name="expert_sum",
        )
        if x.dtype == "float32":
            return total
        return te.compute(total.shape, lambda i, h: total[i, h].astype(x.dtype), name="cast")

    own = [] if bias is None or chosen is None else [bias, chosen]
    return op.tensor_expr_op(compute, "expert_sum", [x, share, *own])
