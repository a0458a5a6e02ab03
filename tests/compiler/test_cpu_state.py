"""The kernels of recurrent operators on CPUs against float64 NumPy, on scattered slots."""

import functools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels.cpu_conv import conv_kernel, previous_row_kernel
from relaxlm.compiler.kernels.cpu_scan import scan_kernel
from relaxlm.compiler.kernels.state import ConvShape, ScanShape
from relaxlm.compiler.kernels.vector import vector_unit
from relaxlm.compiler.target import resolve_device
from tests import reference

PORTABLE = tvm.target.Target({"kind": "llvm"})
NATIVE = resolve_device("cpu").tvm_target(2)
SLOTS = 14


@functools.cache  # compiling takes a second
def build(make, *arguments, target: tvm.target.Target = NATIVE):
    function = make(*arguments).with_attr("global_symbol", "kernel")
    with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
        return tvm.compile(tvm.IRModule({"kernel": function}), target=target)["kernel"]


class Batch:
    """Sequences with so many new tokens each, every other of which goes on from a state."""

    def __init__(self, lengths: list[int]) -> None:
        self.rng = np.random.default_rng(sum(lengths) + len(lengths))
        self.lengths, self.n = lengths, sum(lengths)
        starts = [0 if i % 2 else 3 + i for i in range(len(lengths))]
        runs = [start + np.arange(m) for start, m in zip(starts, lengths, strict=True)]
        self.positions = np.concatenate(runs).astype("int32")
        self.offsets = np.cumsum([0, *lengths]).astype("int32")
        slots = self.rng.permutation(SLOTS).astype("int32")
        self.sources, self.targets = slots[: len(lengths)], slots[: len(lengths)].copy()
        # Every third writes elsewhere, as one does whose state is shared.
        for i in range(0, len(lengths), 3):
            self.targets[i] = slots[len(lengths) + i // 3]

    def normal(self, *shape: int, dtype: str = "float32") -> np.ndarray:
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        return self.rng.standard_normal(shape).astype(kind)

    def states(self, *shape: int) -> np.ndarray:
        """What lies in all slots; NaN where nobody may look."""
        states = self.normal(SLOTS, *shape)
        for i, source in enumerate(self.sources):
            if self.lengths[i] and self.positions[self.offsets[i]] == 0:
                states[source] = np.nan
        return states

    def run(self, kernel, states: np.ndarray, inputs: list[np.ndarray], like: np.ndarray):
        """The rows, and the states of all slots afterwards."""
        state = tvm.runtime.tensor(states)
        out = tvm.runtime.tensor(np.full(like.shape, 7).astype(like.dtype))
        tables = (self.offsets, self.positions, self.sources, self.targets)
        kernel(*map(tvm.runtime.tensor, (*inputs, *tables)), state, out)
        return out.numpy(), state.numpy()

    def expected(self, states: np.ndarray, one, *inputs: np.ndarray):
        """What `one(state, *rows)` gives for each sequence; untouched slots stay."""
        rows, after = [], states.copy()
        for i, (start, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            if start < end:
                new = self.positions[start] == 0
                before = np.zeros(states.shape[1:]) if new else states[self.sources[i]]
                out, state = one(before, *(x[start:end] for x in inputs))
                rows.append(out)
                after[self.targets[i]] = state
        return np.concatenate(rows), after


RAGGED = [3, 1, 0, 7, 1, 18]
PLAIN = ScanShape(
    heads=4,
    groups=2,
    key_dim=24,
    value_dim=32,
    decay_per_key=False,
    removal=False,
    strength=False,
    bonus=False,
    dtype="float32",
)
EVERYTHING = replace(PLAIN, decay_per_key=True, removal=True, bonus=True)


def scan_inputs(batch: Batch, shape: ScanShape) -> list[np.ndarray]:
    """Random inputs under which a state neither explodes nor dies."""
    n, heads, size = batch.n, shape.heads, shape.key_dim
    unit = size**-0.5
    q = batch.normal(n, shape.groups, size, dtype=shape.dtype)
    k = batch.normal(n, shape.groups, size, dtype=shape.dtype)
    v = batch.normal(n, heads, shape.value_dim, dtype=shape.dtype)
    kept = (n, heads, size) if shape.decay_per_key else (n, heads)
    inputs = [q, k, v, batch.rng.uniform(0.5, 0.99, kept).astype("float32")]
    if shape.removal:
        inputs += [unit * batch.normal(n, heads, size) for _ in range(2)]
    if shape.strength:
        inputs[1] = unit * k
        inputs.append(batch.rng.uniform(0.1, 1.9, (n, heads)).astype("float32"))
    if shape.bonus:
        inputs.append(batch.normal(heads, size))
    return inputs


def check_scan(shape: ScanShape, lengths: list[int], target: tvm.target.Target = NATIVE) -> None:
    batch = Batch(lengths)
    states = batch.states(shape.heads, shape.key_dim, shape.value_dim)
    inputs = scan_inputs(batch, shape)
    kernel = build(scan_kernel, shape, vector_unit(target), target=target)
    rows, after = batch.run(kernel, states, inputs, inputs[2])

    def one(state, *rows):
        q, k, v, decay, *other = rows
        bonus = inputs[-1] if shape.bonus else None
        if shape.strength:
            key = np.repeat(k, shape.share, axis=1).astype("float64")
            kept, strength = decay.reshape(len(k), shape.heads, -1), other[0][..., None]
            other, v = (kept * key, -strength * key), v * strength
        return reference.linear_scan(state, q, k, v, decay, tuple(other) or None, bonus)

    by_row = inputs[:-1] if shape.bonus else inputs
    expected, states_after = batch.expected(states, one, *by_row)
    tolerance = 2e-6 if shape.dtype == "float32" else 4e-3  # half a unit of its last place
    scale = np.abs(expected).max()
    np.testing.assert_allclose(rows, expected, rtol=tolerance, atol=2e-6 * scale)
    np.testing.assert_allclose(after, states_after, rtol=1e-5, atol=2e-6 * scale)


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
    check_scan(replace(PLAIN, **change), RAGGED)


def test_scan_matches_numpy_on_any_cpu() -> None:
    check_scan(EVERYTHING, RAGGED, PORTABLE)


def test_scan_of_chunks_is_that_of_the_whole() -> None:
    whole = Batch([1, 19])
    shape = EVERYTHING
    kernel = build(scan_kernel, shape, vector_unit(NATIVE))
    *inputs, bonus = scan_inputs(whole, shape)
    states = whole.states(shape.heads, shape.key_dim, shape.value_dim)
    rows, after = whole.run(kernel, states, [*inputs, bonus], inputs[2])
    target = whole.targets[1]
    start = 1
    for length in (1, 8, 10):
        part = Batch([length])
        part.positions = np.arange(start - 1, start - 1 + length).astype("int32")
        part.sources, part.targets = whole.sources[1:], np.array([target], "int32")
        own = [np.ascontiguousarray(x[start : start + length]) for x in inputs]
        some, states = part.run(kernel, states, [*own, bonus], own[2])
        np.testing.assert_array_equal(some, rows[start : start + length])
        start += length
    np.testing.assert_array_equal(states[target], after[target])


CONV = ConvShape(channels=48, taps=4, silu=True, weight="float32", bias=None, dtype="float32")


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
    batch = Batch([*RAGGED, 4, 1, 2])
    x = batch.normal(batch.n, shape.channels, dtype=shape.dtype)
    weight = batch.normal(shape.channels, shape.taps, dtype=shape.weight)
    bias = [batch.normal(shape.channels, dtype=shape.bias)] if shape.bias else []
    states = batch.states(shape.taps - 1, shape.channels)
    rows, after = batch.run(build(conv_kernel, shape), states, [x, weight, *bias], x)

    def one(state, x):
        return reference.causal_conv(state, x, weight, bias[0] if bias else None, shape.silu)

    expected, states_after = batch.expected(states, one, x)
    tolerance = 2e-6 if shape.dtype == "float32" else 4e-3
    np.testing.assert_allclose(rows, expected, rtol=tolerance, atol=2e-6)
    np.testing.assert_array_equal(after, states_after.astype("float32"))


@pytest.mark.parametrize(("size", "dtype"), [(48, "float32"), (7, "bfloat16")])
def test_previous_row_matches_numpy(size: int, dtype: str) -> None:
    batch = Batch(RAGGED)
    x = batch.normal(batch.n, size, dtype=dtype)
    states = batch.states(size).astype(x.dtype).astype("float32")
    kernel = build(previous_row_kernel, size, dtype, "float32")
    rows, after = batch.run(kernel, states, [x], x)

    def one(state, x):
        past = np.concatenate([state[None], x])
        return past[:-1], past[-1]

    expected, states_after = batch.expected(states, one, x)
    np.testing.assert_array_equal(rows, expected.astype(x.dtype))
    np.testing.assert_array_equal(after, states_after)
