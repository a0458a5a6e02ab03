"""The kernels of recurrent operators on CPUs against float64 NumPy, on scattered slots."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels.cpu_conv import conv_kernel, previous_row_kernel
from relaxlm.compiler.kernels.cpu_scan import scan_kernel
from relaxlm.compiler.kernels.state import ScanShape
from relaxlm.compiler.kernels.vector import vector_unit
from relaxlm.compiler.target import resolve_device
from tests.compiler.state_batch import (
    CONV,
    EVERYTHING,
    PLAIN,
    RAGGED,
    Batch,
    Kernel,
    check_conv,
    check_previous_row,
    check_scan,
    scan_inputs,
)

PORTABLE = tvm.target.Target({"kind": "llvm"})
NATIVE = resolve_device("cpu").tvm_target(2)


@functools.cache  # compiling takes a second
def build(make, *arguments, target: tvm.target.Target = NATIVE) -> Kernel:
    function = make(*arguments).with_attr("global_symbol", "kernel")
    with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
        library = tvm.compile(tvm.IRModule({"kernel": function}), target=target)

    def kernel(*arrays: np.ndarray) -> None:
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        library["kernel"](*tensors)
        for array, tensor in zip(arrays, tensors, strict=True):
            array[...] = tensor.numpy()

    return kernel


def build_scan(shape: ScanShape, target: tvm.target.Target = NATIVE) -> Kernel:
    return build(scan_kernel, shape, vector_unit(target), target=target)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"decay_per_key": True},
        {"removal": True},
        {"strength": True},
        {"strength": True, "decay_per_key": True},
        {"bonus": True},
        {"decay_per_key": True, "removal": True, "bonus": True},
        {"groups": 4, "value_dim": 80},
        {"groups": 1, "key_dim": 7, "value_dim": 5},
        {"dtype": "bfloat16", "removal": True},
    ],
    ids=str,
)
def test_scan_matches_numpy(change: dict) -> None:
    shape = replace(PLAIN, **change)
    check_scan(build_scan(shape), shape, RAGGED)


def test_scan_matches_numpy_on_any_cpu() -> None:
    check_scan(build_scan(EVERYTHING, PORTABLE), EVERYTHING, RAGGED)


def scan_case(shape: ScanShape) -> tuple:
    def inputs(batch: Batch) -> tuple[list[np.ndarray], list[np.ndarray]]:
        *rows, last = scan_inputs(batch, shape)
        return (rows, [last]) if shape.bonus else ([*rows, last], [])

    state = (shape.heads, shape.key_dim, shape.value_dim)
    return build_scan(shape), state, inputs, 2


def conv_case() -> tuple:
    def inputs(batch: Batch) -> tuple[list[np.ndarray], list[np.ndarray]]:
        weight = batch.normal(CONV.channels, CONV.taps)
        return [batch.normal(batch.n, CONV.channels)], [weight]

    return build(conv_kernel, CONV), (CONV.taps - 1, CONV.channels), inputs, 0


@pytest.mark.parametrize(
    "case",
    [
        lambda: scan_case(EVERYTHING),
        lambda: scan_case(replace(PLAIN, strength=True)),
        conv_case,
    ],
    ids=["everything", "strength", "conv"],
)
def test_rows_do_not_depend_on_the_step(case) -> None:
    """Bit by bit: a sequence in chunks and alone is the same as at once and among others."""
    kernel, state, make_inputs, value = case()
    whole = Batch([3, 19, 1, 18])
    by_row, fixed = make_inputs(whole)
    states = whole.states(*state)
    rows, after = whole.run(kernel, states, [*by_row, *fixed], by_row[value])
    sequence, start = 1, 3
    for length in (1, 2, 8, 1, 1, 6):
        part = Batch([length])
        part.positions = np.arange(start - 3, start - 3 + length).astype("int32")
        part.sources = whole.sources[[sequence]]
        part.targets = whole.targets[[sequence]]
        own = [np.ascontiguousarray(x[start : start + length]) for x in by_row]
        some, states = part.run(kernel, states, [*own, *fixed], own[value])
        np.testing.assert_array_equal(some, rows[start : start + length])
        start += length
    assert start == 3 + 19
    np.testing.assert_array_equal(states[whole.targets[1]], after[whole.targets[1]])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"silu": False, "bias": "bfloat16", "weight": "bfloat16"},
        {"taps": 2, "channels": 13},
        {"dtype": "bfloat16", "bias": "float32"},
    ],
    ids=str,
)
def test_conv_matches_numpy(change: dict) -> None:
    shape = replace(CONV, **change)
    check_conv(build(conv_kernel, shape), shape)


@pytest.mark.parametrize(("size", "dtype"), [(48, "float32"), (7, "bfloat16")])
def test_previous_row_matches_numpy(size: int, dtype: str) -> None:
    check_previous_row(build(previous_row_kernel, size, dtype, "float32"), size, dtype)
