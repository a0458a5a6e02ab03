"""Sums, activations and norms of rows on GPUs: a block per row, or a thread for a few elements.

The code is in `kernels/cuda/rows.cuh`, whose types are the expressions of `row_expression`. What a
row consists of is read once, kept in registers in float32, and rounded once.
"""

import functools
import math
import struct

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.builder import length, tensor
from relaxlm.compiler.kernels.cuda_source import (
    C_TYPES,
    WARP,
    activation_type,
    c_bool,
    device_call,
    grid,
    launches,
    shared_bytes,
)
from relaxlm.compiler.kernels.row_expression import (
    Activation,
    Binary,
    Expression,
    Input,
    Matrix,
    Norm,
    Normed,
    Number,
    Vector,
    parts,
)

# Warps of a block: at most, and where threads have nothing to do with each other.
MOST_WARPS, FREE_WARPS = 32, 8


@functools.cache  # every layer asks
def row_kernel(
    size: int,
    inputs: tuple[Input, ...],
    value: Expression,
    norm: Norm | None,
    keep: bool,
    dtype: str,
) -> tirx.PrimFunc:
    """(*inputs) -> [value [n, size],] result [n, size], of `dtype`. n must not be 0.

    Args:
        norm: of the value, which is the result; None: the value itself is.
        keep: whether the value is wanted, too.
    """
    inner = [part for part in parts(value) if isinstance(part, Normed)]
    whole = norm is not None or bool(inner)
    neighbours = _neighbours(size, inputs, value, dtype)
    warps = min(-(-size // (WARP * neighbours)), MOST_WARPS) if whole else FREE_WARPS
    text = _Writer(inputs, inner)
    types = [
        *(C_TYPES[dtype], str(size), str(neighbours), str(warps), text.expression(value)),
        *(text.norm(norm), c_bool(keep)),
        *map(text.expression, inner),
    ]
    kernel = f"relaxlm::rows::Kernel<{', '.join(types)}>"

    def body() -> None:
        n = length("n")
        given = [
            tensor(f"x{i}", (one.width,) if one.is_vector else (n, one.width), one.dtype).data
            for i, one in enumerate(inputs)
        ]
        kept = tensor("value", (n, size), dtype).data if keep else None
        out = tensor("result", (n, size), dtype).data
        if whole:
            with grid([n], warps) as (row,):
                device_call(
                    "rows.cuh",
                    f"relaxlm::whole_row<{kernel}>",
                    *(out if kept is None else kept, out, shared_bytes(4 * warps), row, *given),
                )
            return
        threads = WARP * warps
        with grid([(n * (size // neighbours) + threads - 1) // threads], warps) as (block,):
            device_call(
                "rows.cuh",
                f"relaxlm::each_element<{kernel}>",
                *(out, T.cast(n, "int32"), block, *given),
            )

    return launches(body)


def _neighbours(size: int, inputs: tuple[Input, ...], value: Expression, dtype: str) -> int:
    """How many elements a thread reads at once: 16 bytes of the narrowest, if they are aligned."""
    firsts = [part.first for part in parts(value) if isinstance(part, (Matrix, Vector))]
    widths = [given.width for given in inputs if not given.is_vector]
    return math.gcd(size, *firsts, *widths, 4 if dtype == "float32" else 8)


class _Writer:
    """Expressions as types in CUDA C++."""

    def __init__(self, inputs: tuple[Input, ...], inner: list[Normed]) -> None:
        self.inputs, self.inner = inputs, inner

    def expression(self, part: Expression | None) -> str:
        if part is None:
            return "relaxlm::rows::None"
        if isinstance(part, Matrix):
            given = self.inputs[part.input]
            return self._of("Matrix", part.input, C_TYPES[given.dtype], given.width, part.first)
        if isinstance(part, Vector):
            return self._of(
                "Vector", part.input, C_TYPES[self.inputs[part.input].dtype], part.first
            )
        if isinstance(part, Number):
            return self._of("Number", _bits(part.value))
        if isinstance(part, Binary):
            operator = f"relaxlm::rows::{part.operator.capitalize()}"
            return self._of(
                "Binary", operator, self.expression(part.left), self.expression(part.right)
            )
        if isinstance(part, Activation):
            return self._of("Activation", activation_type(part.name), self.expression(part.x))
        return self._of(
            "Normed", self.inner.index(part), self.expression(part.x), self.norm(part.norm)
        )

    def norm(self, norm: Norm | None) -> str:
        if norm is None:
            return "relaxlm::rows::None"
        return self._of(
            "Norm",
            c_bool(norm.kind == "layer"),
            _bits(norm.eps),
            self.expression(norm.weight),
            self.expression(norm.bias),
            _bits(norm.shift),
        )

    def _of(self, name: str, *arguments: object) -> str:
        return f"relaxlm::rows::{name}<{', '.join(map(str, arguments))}>"


def _bits(value: float) -> str:
    """A float32 as a template argument."""
    return f"{struct.unpack('<I', struct.pack('<f', value))[0]}u"
