"""The integers that a step gives to a compiled function, as int32 tensors.

They stay as long as steps have the same shapes, and the next step of the same kind overwrites them:
to make nine tensors anew costs more than a small step. Where pointers are addresses, all of them
lie in one buffer, one behind the other: on a CPU it is what is written to, and a GPU gets it in one
copy, since a copy takes as long as several kernels, and each one waits for the last.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from relaxlm.runtime import tvm_runtime

# Of tables on a GPU, in int32: a warp's loads, and everything that kernels read at a time.
_GPU_LINE = 64
_CPU_LINE = tvm_runtime.ALIGNMENT // 4


class StepInputs(Protocol):
    """Tensors of the arrays [k] that a function takes."""

    def fill(self, arrays: Sequence[np.ndarray]) -> Sequence[Any]:
        """The arrays as int32 tensors, good until the next call."""


class SharedInputs:
    """Arrays in one buffer of a CPU or a CUDA device.

    Where an array lies follows from the lengths alone, as long as the buffer is large enough.
    """

    def __init__(self, device: Any | None, capacity: int = 0) -> None:
        """
        Args:
            device: None for the CPU.
            capacity: of the buffer at first, as `needed` counts it; it grows if it has to.
        """
        self._device = device
        self._line = _CPU_LINE if device is None else _GPU_LINE
        self._sizes: list[int] = []
        self._places: list[tuple[int, int]] = []  # start and length of each
        self._arrays: list[np.ndarray] = []
        self._tensors: list[Any] = []
        self._capacity = capacity
        self._host: np.ndarray | None = None  # [capacity] int32
        self._buffer: Any = None  # the same on the device
        self._whole: tuple[np.ndarray, Any] | None = None  # what of both a step uses

    @staticmethod
    def needed(sizes: Sequence[int]) -> int:
        """Integers of the buffer that suffice for arrays of these lengths."""
        return sum(-(-size // _GPU_LINE) * _GPU_LINE for size in sizes)

    def fill(self, arrays: Sequence[np.ndarray]) -> Sequence[Any]:
        sizes = [len(array) for array in arrays]
        if sizes != self._sizes:
            self._place(sizes)
        for view, array in zip(self._arrays, arrays, strict=True):
            view[:] = array
        if self._whole is not None:
            host, buffer = self._whole
            tvm_runtime.overwrite(buffer, host)
        return self._tensors

    def _place(self, sizes: list[int]) -> None:
        line = self._line
        offsets = list(accumulate((-(-size // line) * line for size in sizes), initial=0))
        total = offsets.pop()
        if self._host is None or total > len(self._host):
            self._grow(2 * total if self._capacity < total else self._capacity)
        assert self._host is not None
        places = list(zip(offsets, sizes, strict=True))
        known = dict(zip(self._places, self._tensors, strict=True))
        self._arrays = [self._host[start : start + count] for start, count in places]
        self._tensors = [
            known[place] if place in known else self._tensor(array, place)
            for place, array in zip(places, self._arrays, strict=True)
        ]
        self._sizes, self._places = sizes, places
        if self._buffer is not None:
            whole = tvm_runtime.view(self._buffer, (total,), "int32")
            self._whole = self._host[:total], whole

    def _tensor(self, array: np.ndarray, place: tuple[int, int]) -> Any:
        if self._buffer is None:
            return tvm_runtime.share(array)
        return tvm_runtime.part(self._buffer, *place)

    def _grow(self, capacity: int) -> None:
        self._places, self._tensors = [], []
        self._host = tvm_runtime.aligned(capacity, "int32")
        if self._device is not None:
            self._buffer = tvm_runtime.empty((capacity,), "int32", self._device)


class SeparateInputs:
    """Arrays on a GPU whose pointers are no addresses, each at its own place.

    To allocate and free memory stops a GPU, so a place is left only for a larger one.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._places: list[tuple[Any, Any] | None] = []  # and the tensor there

    def fill(self, arrays: Sequence[np.ndarray]) -> Sequence[Any]:
        self._places += [None] * (len(arrays) - len(self._places))
        tensors = []
        for i, array in enumerate(arrays):
            place, tensor = self._places[i] or (None, None)
            if place is None or place.shape[0] < len(array):
                place, tensor = (
                    tvm_runtime.empty((2 * len(array) + 1,), "int32", self._device),
                    None,
                )
            if tensor is None or tensor.shape[0] != len(array):
                tensor = tvm_runtime.view(place, array.shape, "int32")
            self._places[i] = place, tensor
            tvm_runtime.overwrite(tensor, np.ascontiguousarray(array, np.int32))
            tensors.append(tensor)
        return tensors
