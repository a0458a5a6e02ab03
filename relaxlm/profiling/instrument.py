"""Looks into the steps of an executor: which kernels are called, with what, and for how long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from relaxlm.runtime import tvm_runtime
from relaxlm.runtime.executor import Executor

# What the virtual machine calls for its own ends: shapes, buffers, tuples.
_OF_THE_MACHINE = ("vm.builtin.", "shape_func")
# What TVM takes as "go on with the call".
_GO_ON = 0


@dataclass(frozen=True)
class Argument:
    """A tensor that a kernel was called with.

    Attributes:
        name: the parameter's, or that of the tensor of the cache or of a recurrent state; "" for
            others.
    """

    shape: tuple[int, ...]
    dtype: str
    name: str


@dataclass(frozen=True)
class Call:
    """One call of a kernel; its last argument is its (last) result."""

    kernel: str
    arguments: tuple[Argument, ...]


class Instrument:
    """Watches `forward` of an executor, by a virtual machine of its own for the same library.

    Looking at arguments takes longer than many kernels do: `record` and `measure` are two things.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._machine = tvm_runtime.machine(executor.library.module, executor.device)
        info = executor.metadata
        pairs = [
            *zip(executor._params, info.params, strict=True),
            *zip(executor._kv, info.kv_cache.tensors, strict=True),
            *zip(executor._states, info.state.tensors, strict=True),
        ]
        self._names = {_address(tensor): tensor_info.name for tensor, tensor_info in pairs}

    @contextmanager
    def record(self) -> Iterator[list[Call]]:
        """The kernels called within, in order."""
        calls: list[Call] = []

        def see(function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
            if before and not name.startswith(_OF_THE_MACHINE):
                tensors = [a for a in arguments if hasattr(a, "__dlpack__")]
                calls.append(Call(name, tuple(map(self._describe, tensors))))
            return _GO_ON

        with self._watched_by(see):
            yield calls

    @contextmanager
    def measure(self) -> Iterator[list[float]]:
        """Seconds of each kernel called within, in order."""
        seconds: list[float] = []
        clock, started = time.perf_counter, 0.0

        def see(function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
            nonlocal started
            if before:
                started = clock()
            elif not name.startswith(_OF_THE_MACHINE):
                seconds.append(clock() - started)
            return _GO_ON

        with self._watched_by(see):
            yield seconds

    @contextmanager
    def _watched_by(self, see: Callable[..., int]) -> Iterator[None]:
        import tvm_ffi

        self._machine["set_instrument"](tvm_ffi.convert(see))
        executor = self._executor
        unwatched = executor._forward, executor._decode
        executor._forward, executor._decode = self._machine["forward"], None
        try:
            yield
        finally:
            executor._forward, executor._decode = unwatched

    def _describe(self, tensor: Any) -> Argument:
        name = self._names.get(_address(tensor), "")
        return Argument(tuple(tensor.shape), str(tensor.dtype), name)


def _address(tensor: Any) -> int:
    return int(tensor.data_ptr())
