"""Activations of float32 lanes: what TVM would compute by one library call per lane."""

from collections.abc import Callable, Mapping, Sequence

from tvm.ir import Expr
from tvm.script import tirx as T

from relaxlm.compiler.kernels.vector import exp, gelu, multiply_add, silu, splat

_TANH_LIMIT = 8.95
_TANH = (
    (9.999999808e-1, 1.338431199e-1, 3.499493437e-3, 2.067351308e-5, 1.344445234e-8),
    (1.0, 4.671762853e-1, 2.589183292e-2, 3.292027574e-4, 7.813187678e-7),
)


def _polynomial(x: Expr, factors: Sequence[float], lanes: int) -> Expr:
    result = splat(factors[-1], lanes)
    for factor in factors[-2::-1]:
        result = multiply_add(result, x, splat(factor, lanes))
    return result


def tanh(x: Expr, lanes: int) -> Expr:
    """x P(x²) / Q(x²), fitted to the least relative error, which is below 4e-7 in float32.

    Beyond a limit, where the result rounds to 1, x is that limit.
    """
    x = T.max(T.min(x, splat(_TANH_LIMIT, lanes)), splat(-_TANH_LIMIT, lanes))
    over, under = (_polynomial(x * x, factors, lanes) for factors in _TANH)
    return x * over / under


def sigmoid(x: Expr, lanes: int) -> Expr:
    return splat(1.0, lanes) / (splat(1.0, lanes) + exp(x * splat(-1.0, lanes), lanes))


def gelu_tanh(x: Expr, lanes: int) -> Expr:
    """x / (1 + exp(-2 u)), u = (2 / pi) ** 0.5 (x + 0.044715 x³), for x times the normal
    distribution up to x (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    slope = -2 * 0.7978845608028654
    inner = multiply_add(x * x, splat(slope * 0.044715, lanes), splat(slope, lanes))
    return x / (splat(1.0, lanes) + exp(x * inner, lanes))


def relu(x: Expr, lanes: int) -> Expr:
    return T.max(x, splat(0.0, lanes))


# Under the names of Relax operators.
ACTIVATIONS: Mapping[str, Callable[[Expr, int], Expr]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "square": lambda x, lanes: x * x,
}
