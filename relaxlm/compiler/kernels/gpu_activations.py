"""Activations of one float32 in kernels for GPUs of any kind.

Nothing becomes infinite on the way, which WGSL and fast modes of other compilers do not allow for.
"""

from collections.abc import Callable, Mapping

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

# exp of more is near the end of float32.
_MOST = 80.0
# From here on tanh is 1 in float32.
_TANH_LIMIT = 9.02
# And from here on the normal distribution's tail is 0.
_GELU_LIMIT = 12.0


def _exp(x: Expr) -> Expr:
    return T.exp(T.min(x, T.float32(_MOST)))


def sigmoid(x: Expr) -> Expr:
    return T.float32(1) / (T.float32(1) + _exp(-x))


def silu(x: Expr) -> Expr:
    return x / (T.float32(1) + _exp(-x))


def gelu_tanh(x: Expr) -> Expr:
    """x / (1 + exp(-2 u)), u = (2 / pi) ** 0.5 (x + 0.044715 x³), as `activations.gelu_tanh`."""
    slope = -2 * 0.7978845608028654
    inner = x * x * T.float32(slope * 0.044715) + T.float32(slope)
    return x / (T.float32(1) + _exp(x * inner))


def tanh(x: Expr) -> Expr:
    limit = T.float32(_TANH_LIMIT)
    return T.tanh(T.max(T.min(x, limit), -limit))


def gelu(x: Expr) -> Expr:
    """x times the normal distribution up to x, by 7.1.26 of Abramowitz and Stegun (1964): the
    absolute error of that distribution is below 1e-7. WGSL has no error function."""
    size = T.min(T.max(x, -x), T.float32(_GELU_LIMIT))
    t = T.float32(1) / (size * T.float32(0.3275911 * 0.5**0.5) + T.float32(1))
    tail: Expr = T.float32(0.5 * 1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = tail * t + T.float32(0.5 * factor)
    tail = tail * t * T.exp(size * size * T.float32(-0.5))
    return x * T.Select(x >= T.float32(0), T.float32(1) - tail, tail)


# Under the names of Relax operators; what they are of is best in memory of the thread.
ACTIVATIONS: Mapping[str, Callable[[Expr], Expr]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: T.max(x, T.float32(0)),
    "sigmoid": sigmoid,
    "tanh": tanh,
    "square": lambda x: x * x,
}
