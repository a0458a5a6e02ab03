"""What a step gives to a compiled function arrives, wherever it lies."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from relaxlm.runtime import tvm_runtime
from relaxlm.runtime.step_inputs import SeparateInputs, SharedInputs, StepInputs

KINDS: dict[str, Callable[[], StepInputs]] = {
    "cpu": lambda: SharedInputs(None),
    # To copies and addresses, the CPU is a device like others.
    "cuda": lambda: SharedInputs(tvm_runtime.device("cpu")),
    "others": lambda: SeparateInputs(tvm_runtime.device("cpu")),
}


def random_arrays(rng: np.random.Generator, lengths: list[int]) -> list[np.ndarray]:
    return [rng.integers(1, 2**31 - 1, length).astype("int32") for length in lengths]


def values(tensors: Any) -> list[list[int]]:
    return [np.from_dlpack(tensor).tolist() for tensor in tensors]


def address(tensor: Any) -> int:
    return np.from_dlpack(tensor).ctypes.data


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_arrive_whatever_was_given_before(kind: str) -> None:
    inputs, rng = KINDS[kind](), np.random.default_rng(2)
    for most in (3, 40, 900, 5, 0, 300):
        arrays = random_arrays(rng, rng.integers(0, most + 1, 5).tolist())
        tensors = inputs.fill(arrays)
        assert values(tensors) == [array.tolist() for array in arrays]
        assert all(address(tensor) % tvm_runtime.ALIGNMENT == 0 for tensor in tensors)
        assert {str(tensor.dtype) for tensor in tensors} == {"int32"}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_stay_as_long_as_lengths_do(kind: str) -> None:
    inputs, rng = KINDS[kind](), np.random.default_rng(3)
    first = list(inputs.fill(random_arrays(rng, [4, 5, 6])))
    again = list(inputs.fill(random_arrays(rng, [4, 5, 6])))
    assert all(a is b for a, b in zip(first, again, strict=True))
    longer = inputs.fill(random_arrays(rng, [4, 7, 6]))
    assert [a is b for a, b in zip(first, longer, strict=True)] == [True, False, True]


def test_a_gpu_gets_all_arrays_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    overwrite = tvm_runtime.overwrite

    def counted(tensor: Any, array: np.ndarray) -> None:
        copied.append(array.nbytes)
        overwrite(tensor, array)

    monkeypatch.setattr(tvm_runtime, "overwrite", counted)
    inputs, rng = KINDS["cuda"](), np.random.default_rng(4)
    inputs.fill(random_arrays(rng, [1, 2, 2, 70, 1]))
    assert copied == [4 * 64 * 6]
    inputs.fill(random_arrays(rng, [1, 2, 2, 70, 1]))
    assert copied == [4 * 64 * 6] * 2


def test_places_follow_from_lengths_alone() -> None:
    """A graph of CUDA that was made for some lengths finds the tables where they were."""
    rng = np.random.default_rng(5)
    largest = [3, 600, 3]
    inputs = SharedInputs(tvm_runtime.device("cpu"), SharedInputs.needed(largest))

    def addresses(lengths: list[int]) -> list[int]:
        return [address(tensor) for tensor in inputs.fill(random_arrays(rng, lengths))]

    before = addresses([1, 5, 1])
    for lengths in (largest, [2, 90, 2], [3, 600, 3]):
        addresses(lengths)
    assert addresses([1, 5, 1]) == before
