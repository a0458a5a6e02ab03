"""The layer of Mamba 2 (Dao and Gu 2024, arXiv:2405.21060), after `Mamba2Mixer` of
`transformers/models/mamba2/modeling_mamba2.py`, which hybrid models have, too."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.base import Step
from relaxlm.models.config import StateTensor
from relaxlm.models.layers import Float32Parameter
from relaxlm.models.recurrent import root_norm, softplus, step_decay
from relaxlm.models.state import causal_conv, conv_state, linear_scan, scan_state


@dataclass(frozen=True)
class MambaShape:
    """The sizes of one layer, and what its projections have.

    Attributes:
        hidden: features of the residual stream.
        heads, head_dim: of the values.
        groups, state: of what a head reads and writes its state by; heads share a group's.
        taps: of the convolution.
        bias, conv_bias: whether the projections and the convolution have biases.
        step_limit: the least and the largest size of a step.
        eps: of the gated norm.
    """

    hidden: int
    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    bias: bool
    conv_bias: bool
    step_limit: tuple[float, float]
    eps: float

    @property
    def width(self) -> int:
        """Features of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """What the convolution mixes: values and what groups write and read by."""
        return self.width + 2 * self.groups * self.state

    def problem(self) -> str | None:
        """Why there is no such layer, in words."""
        if self.heads % self.groups or self.width % self.groups:
            return f"{self.heads} heads in {self.groups} groups: expected groups of one size"
        low, high = self.step_limit
        if not 0 <= low <= high:
            return f"time_step_limit = {list(self.step_limit)}: expected two numbers, at least 0"
        return None

    def states(self) -> tuple[StateTensor, ...]:
        return (
            conv_state(self.channels, self.taps),
            scan_state(self.heads, self.state, self.head_dim),
        )


def step_limit(values: Mapping[str, Any]) -> Any:
    """`time_step_limit` of config.json; infinity is null in files that may not have it."""
    limit = values["time_step_limit"]
    if isinstance(limit, list | tuple) and len(limit) == 2:
        spelled = [
            float(part["__float__"]) if isinstance(part, Mapping) and "__float__" in part else part
            for part in limit
        ]
        return tuple(math.inf if part is None else part for part in spelled)
    return limit


class GatedNorm(nn.Module):
    """Root mean square norm of y silu(z), of each group's features by themselves."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        self.weight = nn.Parameter((size,))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """[n, size] float32 and [n, size] -> [n, size] like z."""
        n, size = y.shape
        gated = y * op.silu(op.astype(z, "float32"))
        parts = op.reshape(gated, (n, self.groups, int(size) // self.groups))
        normed = op.reshape(root_norm(parts, self.eps, mean=True), (n, size))
        return op.astype(normed, z.dtype) * self.weight


class Mamba2Mixer(nn.Module):
    """[n, hidden] -> [n, hidden]."""

    def __init__(self, shape: MambaShape) -> None:
        self.shape = shape
        columns = shape.width + shape.channels + shape.heads
        self.in_proj = nn.Linear(shape.hidden, columns, bias=shape.bias)
        self.conv1d_weight = nn.Parameter((shape.channels, 1, shape.taps))
        self.conv1d_bias = nn.Parameter((shape.channels,)) if shape.conv_bias else None
        self.dt_bias, self.A_log = (
            Float32Parameter((shape.heads,)),
            Float32Parameter((shape.heads,)),
        )
        self.D = Float32Parameter((shape.heads,))
        self.norm = GatedNorm(shape.width, shape.groups, shape.eps)
        self.out_proj = nn.Linear(shape.width, shape.hidden, bias=shape.bias)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        shape, n = self.shape, x.shape[0]
        ends = [shape.width, shape.width + shape.channels]
        z, mixed, raw_step = op.split(self.in_proj(x), ends, axis=-1)
        mixed = causal_conv(
            step, layer, mixed, self.conv1d_weight, self.conv1d_bias, activation="silu"
        )
        ends = [shape.width, shape.width + shape.groups * shape.state]
        v, k, q = op.split(mixed, ends, axis=-1)
        v = op.astype(op.reshape(v, (n, shape.heads, shape.head_dim)), "float32")
        k, q = (
            op.astype(op.reshape(part, (n, shape.groups, shape.state)), "float32")
            for part in (k, q)
        )
        size = _limited(softplus(raw_step, self.dt_bias), *shape.step_limit)
        scaled = v * op.reshape(size, (n, shape.heads, 1))
        out = linear_scan(step, layer, q, k, scaled, step_decay(self.A_log, size))
        out = out + v * op.reshape(self.D, (1, shape.heads, 1))
        return self.out_proj(self.norm(op.reshape(out, (n, shape.width)), z))


def _limited(x: Tensor, low: float, high: float) -> Tensor:
    """x, but at least `low` and at most `high`."""
    if (low, high) == (0, math.inf):  # of a softplus
        return x

    def compute(x: te.Tensor) -> te.Tensor:
        def element(*i):
            least = tirx.Max(x(*i), tirx.const(low, "float32"))
            return least if high == math.inf else tirx.Min(least, tirx.const(high, "float32"))

        return te.compute(x.shape, element, name="limited")

    return op.tensor_expr_op(compute, "limited", [x])
