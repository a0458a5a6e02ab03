"""Batches for the kernels of recurrent operators, on scattered slots, and what they should give."""

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np

from relaxlm.compiler.kernels.state import ConvShape, ScanShape
from tests import reference

SLOTS = 14

# A kernel as a function of NumPy arrays, which are written in place.
Kernel = Callable[..., None]


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

    def run(
        self, kernel: Kernel, states: np.ndarray, inputs: list[np.ndarray], like: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows, and the states of all slots afterwards."""
        state, out = states.copy(), np.full(like.shape, 7).astype(like.dtype)
        tables = (self.offsets, self.positions, self.sources, self.targets)
        kernel(*inputs, *tables, state, out)
        return out, state

    def expected(
        self, states: np.ndarray, one: Callable, *inputs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
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
        inputs[1] = (unit * k).astype(k.dtype)
        inputs.append(batch.rng.uniform(0.1, 1.9, (n, heads)).astype("float32"))
    if shape.bonus:
        inputs.append(batch.normal(heads, size))
    return inputs


def check_scan(kernel: Kernel, shape: ScanShape, lengths: list[int]) -> None:
    """Assert that a kernel of `linear_scan` does what it should."""
    batch = Batch(lengths)
    states = batch.states(shape.heads, shape.key_dim, shape.value_dim)
    inputs = scan_inputs(batch, shape)
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


CONV = ConvShape(channels=48, taps=4, silu=True, weight="float32", bias=None, dtype="float32")


def check_conv(kernel: Kernel, shape: ConvShape) -> None:
    """Assert that a kernel of `causal_conv` does what it should."""
    batch = Batch([*RAGGED, 4, 1, 2])
    x = batch.normal(batch.n, shape.channels, dtype=shape.dtype)
    weight = batch.normal(shape.channels, shape.taps, dtype=shape.weight)
    bias = [batch.normal(shape.channels, dtype=shape.bias)] if shape.bias else []
    states = batch.states(shape.taps - 1, shape.channels)
    rows, after = batch.run(kernel, states, [x, weight, *bias], x)

    def one(state, x):
        return reference.causal_conv(state, x, weight, bias[0] if bias else None, shape.silu)

    expected, states_after = batch.expected(states, one, x)
    tolerance = 2e-6 if shape.dtype == "float32" else 4e-3
    np.testing.assert_allclose(rows, expected, rtol=tolerance, atol=2e-6)
    np.testing.assert_array_equal(after, states_after.astype("float32"))


def check_previous_row(kernel: Kernel, size: int, dtype: str) -> None:
    """Assert that a kernel of `previous_row` does what it should."""
    batch = Batch(RAGGED)
    x = batch.normal(batch.n, size, dtype=dtype)
    states = batch.states(size).astype(x.dtype).astype("float32")
    rows, after = batch.run(kernel, states, [x], x)

    def one(state, x):
        past = np.concatenate([state[None], x])
        return past[:-1], past[-1]

    expected, states_after = batch.expected(states, one, x)
    np.testing.assert_array_equal(rows, expected.astype(x.dtype))
    np.testing.assert_array_equal(after, states_after)
