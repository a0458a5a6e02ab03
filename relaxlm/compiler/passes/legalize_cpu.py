"""LegalizeOps for CPUs: exponentials in plain operations, of which LLVM makes vectors.

TVM's own loop nests call the mathematical library once per element, which takes ten times as long.
"""

import math
from collections.abc import Callable

import tvm
from tvm import relax, te, tirx
from tvm.ir import Expr

from relaxlm.compiler.kernels.vector import exp

# Of tanh(x) / x - 1 in x * x, for |x| below `_SMALL`; minimax, relative error below 1e-7.
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 0.133314422036, -0.333332819422)
_SMALL = 0.625


def _number(value: float) -> Expr:
    return tirx.const(value, "float32")


def _sigmoid(x: Expr) -> Expr:
    return _number(1) / (_number(1) + exp(-x))


def _silu(x: Expr) -> Expr:
    return x * _sigmoid(x)


def _tanh(x: Expr) -> Expr:
    square = x * x
    series = _number(_TANH[0])
    for factor in _TANH[1:]:
        series = series * square + _number(factor)
    # From here on, 1 - 2 / (1 + e^2x) loses no digits.
    large = _number(1) - _number(2) / (_number(1) + exp(_number(2) * x))
    return tirx.Select(tirx.abs(x) < _number(_SMALL), x * square * series + x, large)


def _gelu_tanh(x: Expr) -> Expr:
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u, which loses no digits where tanh is almost -1.
    inner = x + x * x * x * _number(0.044715)
    return x * _sigmoid(inner * _number(2 * math.sqrt(2 / math.pi)))


_ELEMENTS: dict[str, Callable[[Expr], Expr]] = {
    "exp": exp,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "nn.silu": _silu,
    "nn.gelu_tanh": _gelu_tanh,
}


def _rule(operator: str) -> Callable[[relax.BlockBuilder, relax.Call], relax.Expr]:
    default = tvm.ir.Op.get(f"relax.{operator}").get_attr("FLegalize")

    def legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        if str(call.args[0].ty.dtype) != "float32":
            return default(builder, call)
        name = operator.removeprefix("nn.")

        def compute(x: te.Tensor) -> te.Tensor:
            def element(*index: Expr) -> Expr:
                value = tirx.Var("value", "float32")
                return tirx.Let(value, x(*index), _ELEMENTS[operator](value))

            return te.compute(x.shape, element, name=name)

        return builder.call_te(compute, call.args[0], primfunc_name_hint=name)

    return legalize


def legalize_cpu() -> tvm.transform.Pass:
    """The pass."""
    rules = {f"relax.{operator}": _rule(operator) for operator in _ELEMENTS}
    return relax.transform.LegalizeOps(rules)
