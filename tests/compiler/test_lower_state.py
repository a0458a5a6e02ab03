"""Recurrent operators of a model become kernels that keep what they should."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from relaxlm.compiler.passes.lower_state import lower_state_operator
from relaxlm.compiler.passes.signature import PagedSignature
from relaxlm.compiler.pipeline import instruction_passes, memory_passes
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import UnsupportedError
from relaxlm.models.base import PAGED_ATTENTION
from relaxlm.models.config import StateTensor
from relaxlm.models.state import (
    CAUSAL_CONV,
    LINEAR_SCAN,
    PREVIOUS_ROW,
    conv_state,
    row_state,
    scan_state,
)
from tests import reference
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler, needs_cpu_memory

HEADS, GROUPS, KEY, VALUE, TAPS = 4, 2, 8, 16, 4
WIDTH = HEADS * VALUE
STATES = (
    row_state("shift", WIDTH),
    conv_state(WIDTH, TAPS),
    scan_state(HEADS, KEY, VALUE),
)


def module(kind: str, states: tuple[StateTensor, ...] = STATES) -> tvm.IRModule:
    """A layer 3 with all three operators one after the other."""
    n, b, slots = (tirx.Var(name, "int64") for name in ("n", "b", "state_slots"))

    def var(name: str, *shape, dtype: str = "float32") -> relax.Var:
        return relax.Var(name, relax.TensorType(shape, dtype))

    x, q, k = var("x", n, WIDTH), var("q", n, GROUPS, KEY), var("k", n, GROUPS, KEY)
    decay, weight = var("decay", n, HEADS), var("weight", WIDTH, TAPS)
    positions, offsets = var("positions", n, dtype="int32"), var("offsets", b + 1, dtype="int32")
    sources, targets = (var(name, b, dtype="int32") for name in ("sources", "targets"))
    types = [relax.TensorType((slots, *state.shape), state.dtype) for state in states]
    tuple_ = relax.Var("states", relax.TupleType(types))
    signature = cast(
        PagedSignature,
        SimpleNamespace(
            tables={"row_offsets": offsets, "state_sources": sources, "state_targets": targets},
            positions=positions,
            states=tuple_,
            state_index={(3, state.name): i for i, state in enumerate(states)},
        ),
    )
    builder = relax.BlockBuilder()

    def operator(name: str, *arguments, like: relax.Expr) -> relax.Expr:
        kinds = {int: relax.prim_value, str: tvm.ir.StringImm}
        values = [kinds.get(type(value), lambda same: same)(value) for value in arguments]
        # The cache comes first; nothing looks at it.
        call = relax.op.call_dps_packed(name, relax.Tuple([positions, *values]), like.ty)
        lowered = lower_state_operator(builder.normalize(call), builder, signature, kind)
        assert lowered is not None
        return builder.emit(lowered)

    params = [x, q, k, decay, weight, positions, offsets, sources, targets, tuple_]
    with builder.function("forward", params):
        with builder.dataflow():
            shifted = operator(PREVIOUS_ROW, x, 3, "shift", like=x)
            mixed = operator(CAUSAL_CONV, shifted, weight, 3, 1, like=x)
            v = builder.emit(relax.op.reshape(mixed, (n, HEADS, VALUE)))
            out = operator(LINEAR_SCAN, q, k, v, decay, 3, 0, 0, 0, like=v)
            out = builder.emit_output(out)
        builder.emit_func_output(out)
    return builder.finalize()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[needs_compiler, needs_cpu_memory])])
def machine(request: pytest.FixtureRequest) -> Iterator[tuple]:
    """The compiled function, and what makes its tensors."""
    if request.param == "cpu":
        target = resolve_device("cpu").tvm_target(2)
        with target:
            mod = relax.transform.DeadCodeElimination(["forward"])(module("cpu"))
            mod = relax.transform.LegalizeOps()(mod)
            mod = tvm.transform.Sequential([*memory_passes(), *instruction_passes()])(mod)
        built = tvm.compile(mod, target=target, relax_pipeline=tvm.transform.Sequential([]))
        yield relax.VirtualMachine(built, tvm.cpu())["forward"], tvm.runtime.tensor
        return
    with CudaEmulation("random") as cuda:
        built = tvm.compile(module("cuda"), target=cuda.target)
        yield relax.VirtualMachine(built.mod, tvm.cuda())["forward"], cuda.tensor


def test_operators_become_kernels_that_write_the_states(machine: tuple) -> None:
    forward, tensors = machine
    rng = np.random.default_rng(1)
    lengths, sources, targets = [2, 5], [4, 0], [1, 0]
    n = sum(lengths)
    x, weight = (rng.standard_normal(s).astype("float32") for s in ((n, WIDTH), (WIDTH, TAPS)))
    q, k = (rng.standard_normal((n, GROUPS, KEY)).astype("float32") for _ in range(2))
    decay = rng.uniform(0.5, 0.9, (n, HEADS)).astype("float32")
    states = [rng.standard_normal((6, *state.shape)).astype("float32") for state in STATES]
    tables = [np.array(t, "int32") for t in ([7, 8, *range(5)], [0, 2, 7], sources, targets)]
    held = tuple(map(tensors, states))
    out = forward(*map(tensors, (x, q, k, decay, weight, *tables)), held).numpy()

    for start, end, source, slot in ((0, 2, 4, 1), (2, 7, None, 0)):
        shift, conv, scan = (s[source] if source else np.zeros_like(s[0]) for s in states)
        shifted = np.concatenate([shift[None], x[start : end - 1]])
        mixed, conv = reference.causal_conv(conv, shifted, weight, None, silu=True)
        v = mixed.reshape(-1, HEADS, VALUE)
        rows, scan = reference.linear_scan(scan, q[start:end], k[start:end], v, decay[start:end])
        np.testing.assert_allclose(out[start:end], rows, rtol=1e-5, atol=1e-5)
        for tensor, expected in zip(held, (x[end - 1], conv, scan), strict=True):
            np.testing.assert_allclose(tensor.numpy()[slot], expected, rtol=1e-5, atol=1e-5)
    for tensor, before in zip(held, states, strict=True):
        np.testing.assert_array_equal(tensor.numpy()[2:], before[2:])


def test_a_state_that_differs_from_the_operator_is_a_mistake() -> None:
    wrong = (*STATES[:2], scan_state(HEADS, KEY, VALUE + 1))
    with pytest.raises(AssertionError, match="layer 3: the configuration says of scan"):
        module("cpu", wrong)


def test_other_calls_are_left_alone() -> None:
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    call = relax.op.call_dps_packed(PAGED_ATTENTION, relax.Tuple([x]), x.ty)
    signature = cast(PagedSignature, None)
    assert lower_state_operator(call, relax.BlockBuilder(), signature, "cpu") is None


def test_other_targets_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=f"{PREVIOUS_ROW} is not supported on metal"):
        module("metal")
