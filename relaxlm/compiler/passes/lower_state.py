"""Turn the operators of recurrent layers (`models/state.py`) into kernels for one target.

    out = call_dps_packed("relaxlm.causal_conv", (cache, x, weight, layer, silu, bias))
    ->
    out, state' = call_tir_inplace(
        causal_conv, (x, weight, bias, row_offsets, positions, sources, targets, states[i]))

The lowerings of attention call this: they make the parameters it reads. Each operator is the only
one that touches its state, so that the order of operators does not matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm
from tvm import relax, tirx

from relaxlm.compiler.kernels import cpu_conv, cpu_scan, cuda_state, gpu_state
from relaxlm.compiler.kernels.state import ConvShape, ScanShape
from relaxlm.compiler.kernels.vector import vector_unit
from relaxlm.compiler.passes.signature import PagedSignature
from relaxlm.errors import UnsupportedError
from relaxlm.models.config import StateTensor
from relaxlm.models.state import (
    CAUSAL_CONV,
    LINEAR_SCAN,
    PREVIOUS_ROW,
    conv_state,
    row_state,
    scan_state,
)


@dataclass(frozen=True)
class StateKernels:
    """The kernels of one target.

    `view`, where there is one, makes a tensor [b, 4] int32 of the tables, which the others then
    take in their place (`kernels/gpu_state.py`).
    """

    scan: Callable[[ScanShape], tirx.PrimFunc]
    conv: Callable[[ConvShape], tirx.PrimFunc]
    previous_row: Callable[[int, str, str], tirx.PrimFunc]
    view: Callable[[], tirx.PrimFunc] | None = None


def _cpu_scan(shape: ScanShape) -> tirx.PrimFunc:
    return cpu_scan.scan_kernel(shape, vector_unit(tvm.target.Target.current()))


KERNELS = {
    "cpu": StateKernels(_cpu_scan, cpu_conv.conv_kernel, cpu_conv.previous_row_kernel),
    "cuda": StateKernels(
        cuda_state.scan_kernel, cuda_state.conv_kernel, cuda_state.previous_row_kernel
    ),
    "gpu": StateKernels(
        gpu_state.scan_kernel,
        gpu_state.conv_kernel,
        gpu_state.previous_row_kernel,
        gpu_state.view_kernel,
    ),
}

# Name of a kernel, the kernel, tensors it reads, layer, and what the operator keeps.
Lowered = tuple[str, tirx.PrimFunc, Sequence[relax.Expr], int, StateTensor]


def lower_state_operator(
    call: relax.Call, builder: relax.BlockBuilder, signature: PagedSignature, kind: str
) -> relax.Expr | None:
    """What takes the place of a call; None if it is none of the operators.

    Args:
        call: of `relax.call_dps_packed`, its arguments rewritten already.
        kind: of the target.

    Raises:
        UnsupportedError: there is no kernel for this operator on this target.
    """
    operators: dict[str, Callable[..., Lowered]] = {
        LINEAR_SCAN: _scan,
        CAUSAL_CONV: _conv,
        PREVIOUS_ROW: _previous_row,
    }
    operator = str(call.args[0].global_symbol)
    if operator not in operators:
        return None
    if kind not in KERNELS:
        raise UnsupportedError(
            f"{operator} is not supported on {kind}. Compile for the CPU: --device cpu"
        )
    name, kernel, inputs, layer, state = operators[operator](
        KERNELS[kind], *call.args[1].fields[1:]
    )
    place = signature.state_index[layer, state.name]
    slots = builder.emit(relax.TupleGetItem(signature.states, place))
    shape = tuple(int(extent) for extent in list(slots.ty.shape)[1:])
    assert (shape, str(slots.ty.dtype)) == (state.shape, state.dtype), (
        f"layer {layer}: the configuration says of {state.name} {shape} {slots.ty.dtype}, "
        f"the model {state}"
    )
    arguments = [*inputs, *_tables(KERNELS[kind], builder, signature), slots]
    both = relax.call_tir_inplace(
        builder.add_func(kernel, name), arguments, [-1, len(arguments) - 1], [call.ty, slots.ty]
    )
    return relax.TupleGetItem(builder.emit(both), 0)


def _tables(
    kernels: StateKernels, builder: relax.BlockBuilder, signature: PagedSignature
) -> list[relax.Expr]:
    """What a kernel is told of the step."""
    names = ("state_sources", "state_targets")
    tables = signature.tables
    read = [tables["row_offsets"], signature.positions, *(tables[name] for name in names)]
    if kernels.view is None:
        return read
    if "state_view" not in tables:  # once per step
        function = builder.add_func(kernels.view(), "view_of_states")
        ty = relax.TensorType((read[-1].ty.shape[0], 4), "int32")
        tables["state_view"] = builder.emit(relax.call_tir(function, read, ty))
    return [tables["state_view"]]


def _scan(kernels, q, k, v, decay, layer, removal, strength, bonus, *optional) -> Lowered:
    groups, key_dim = (int(extent) for extent in list(q.ty.shape)[1:])
    heads, value_dim = (int(extent) for extent in list(v.ty.shape)[1:])
    shape = ScanShape(
        heads,
        groups,
        key_dim,
        value_dim,
        decay_per_key=len(decay.ty.shape) == 3,
        removal=bool(removal.value),
        strength=bool(strength.value),
        bonus=bool(bonus.value),
        dtype=str(v.ty.dtype),
    )
    assert heads % groups == 0, f"{heads} heads cannot share {groups} groups of q and k"
    assert str(q.ty.dtype) == str(k.ty.dtype) == shape.dtype
    assert all(str(x.ty.dtype) == "float32" for x in (decay, *optional))
    state = scan_state(heads, key_dim, value_dim)
    return "linear_scan", kernels.scan(shape), [q, k, v, decay, *optional], int(layer.value), state


def _conv(kernels, x, weight, layer, silu, *bias) -> Lowered:
    channels, taps = (int(extent) for extent in weight.ty.shape)
    assert taps > 1, "a convolution of one tap is a product"
    shape = ConvShape(
        channels,
        taps,
        bool(silu.value),
        weight=str(weight.ty.dtype),
        bias=str(bias[0].ty.dtype) if bias else None,
        dtype=str(x.ty.dtype),
    )
    state = conv_state(channels, taps)
    return "causal_conv", kernels.conv(shape), [x, weight, *bias], int(layer.value), state


def _previous_row(kernels, x, layer, name) -> Lowered:
    size = int(x.ty.shape[1])
    state = row_state(str(name.value), size)
    kernel = kernels.previous_row(size, str(x.ty.dtype), state.dtype)
    return "previous_row", kernel, [x], int(layer.value), state
