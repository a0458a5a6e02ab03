"""What recurrent layers share besides the operators of `models/state.py`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from tvm import te, tirx
from tvm.ir import Expr
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.errors import ConfigError
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import Float32Parameter, layer_norm

# A recurrence knows no longest text. This many tokens are what a context window is by default.
LONGEST_TEXT = 2**20

# From here on, softplus(x) is x (as in torch).
_LINEAR = 20.0


class RecurrentConfig(DecoderConfig):
    """A decoder none of whose layers attends, so that there are neither pages nor positions."""

    rope: None  # type: ignore[assignment]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        # What files give as the longest text is that of training, or a default of some library.
        return super().read({**raw, "max_position_embeddings": LONGEST_TEXT}, where)

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> Any:
        return None

    @classmethod
    def _windows(cls, values: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
        window = values.get("sliding_window_size", -1)
        if window > 0:
            raise ConfigError(_no_window(window))
        return (0,) * layers

    def has_pages(self, layer: int) -> bool:
        return False

    def for_context(self, context: int) -> "RecurrentConfig":
        return self

    def with_window(self, window: int, sinks: int) -> DecoderConfig:
        if window > 0:
            raise ConfigError(_no_window(window))
        return self


def _no_window(window: int) -> str:
    return (
        f"sliding_window_size = {window}: no layer of this model attends to earlier tokens, so "
        "there is nothing to limit. Leave it out"
    )


class HybridConfig(DecoderConfig):
    """A decoder some of whose layers attend and others are recurrent; `layer_types` says which.

    A window that is asked for at compile time limits the layers that attend.
    """

    layer_types: tuple[str, ...]

    # Kinds of `layer_types` that do not attend.
    recurrent_kinds: ClassVar[tuple[str, ...]] = ("linear_attention",)

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        values = {**cls.absent, **{key: value for key, value in raw.items() if value is not None}}
        layers = values.get("num_hidden_layers")
        if "layer_types" not in values and isinstance(layers, int):
            raw = {**raw, "layer_types": cls.default_layer_types(values, layers)}
        return super().read(raw, where)

    @classmethod
    def _windows(cls, values: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
        kinds = [
            "full_attention" if kind in cls.recurrent_kinds else kind
            for kind in values["layer_types"]
        ]
        return super()._windows({**values, "layer_types": kinds}, layers, where)

    def has_pages(self, layer: int) -> bool:
        return self.layer_types[layer] not in self.recurrent_kinds


class GroupNorm(nn.Module):
    """Layer norm of each of `groups` equal parts of a row (Wu and He 2018, arXiv:1803.08494).

    [n, size] -> [n, size]
    """

    def __init__(self, groups: int, size: int, eps: float) -> None:
        self.weight, self.bias = Float32Parameter((size,)), Float32Parameter((size,))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        n, size = x.shape
        part = (self.groups, int(size) // self.groups)
        weight, bias = op.reshape(self.weight, part), op.reshape(self.bias, part)
        return op.reshape(layer_norm(op.reshape(x, (n, *part)), weight, bias, self.eps), (n, size))


def root_norm(x: Tensor, eps: float, mean: bool) -> Tensor:
    """x / sqrt(s + eps), where s is the sum of the squares over the last axis, or their mean.

    Returns:
        float32.
    """

    def compute(x: te.Tensor) -> te.Tensor:
        *rows, size = x.shape

        def value(*index):
            return x(*index).astype("float32")

        j = te.reduce_axis((0, size), "j")
        total = te.compute(
            rows, lambda *i: te.sum(value(*i, j) * value(*i, j), axis=j), name="squares"
        )
        share = tirx.Cast("float32", size) if mean else tirx.const(1.0, "float32")
        floor = tirx.const(eps, "float32")
        return te.compute(
            x.shape,
            lambda *i: value(*i) * tirx.rsqrt(total(*i[:-1]) / share + floor),
            name="root_norm",
        )

    return op.tensor_expr_op(compute, "root_norm", [x])


def _softplus(x: Expr) -> Expr:
    """log(1 + exp(x)) of a float32, with all its digits where it is small."""
    one = tirx.const(1.0, "float32")
    power = tirx.exp(x)
    grown = one + power
    # log(1 + y) = y log(g) / (g - 1) with g = 1 + y as rounded: what g lost cancels out.
    small = tirx.Select(grown == one, power, tirx.log(grown) * power / (grown - one))
    return tirx.Select(x > tirx.const(_LINEAR, "float32"), x, small)


def softplus(x: Tensor, bias: Tensor) -> Tensor:
    """log(1 + exp(x + bias)), computed in float32: [n, heads], [heads] -> [n, heads] float32."""

    def compute(x: te.Tensor, bias: te.Tensor) -> te.Tensor:
        return te.compute(
            x.shape,
            lambda i, h: _softplus(x[i, h].astype("float32") + bias[h].astype("float32")),
            name="softplus",
        )

    return op.tensor_expr_op(compute, "softplus", [x, bias])


def step_decay(a_log: Tensor, step_size: Tensor) -> Tensor:
    """exp(-exp(a_log) dt), what a state keeps over a step of size dt: [heads], [n, heads]."""

    def compute(a_log: te.Tensor, dt: te.Tensor) -> te.Tensor:
        return te.compute(
            dt.shape, lambda i, h: tirx.exp(-tirx.exp(a_log[h]) * dt[i, h]), name="decay"
        )

    return op.tensor_expr_op(compute, "decay", [a_log, step_size])
