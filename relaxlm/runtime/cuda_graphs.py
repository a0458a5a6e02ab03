"""Records what a function launches on an NVIDIA GPU, and launches it again as a whole.

A step of decoding is hundreds of small kernels, and the CPU takes longer to launch many of them one
by one than the GPU takes to run them. A CUDA graph holds the launches with all their arguments and
costs one call. So what is recorded has to be the same each time: the addresses, the grids, the
sizes. Whoever gives a key to a step promises that.

Kernels also take scratch memory from TVM while they are launched (`partial` of attention, for
example). TVM keeps one such buffer per thread, and frees it for a larger one when a kernel asks for
more. Then a graph would write to memory that is not its own any more; so it is looked at before
every step, and graphs that know another address are forgotten.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from relaxlm.errors import LibraryError
from relaxlm.runtime import cuda, tvm_runtime

# Graphs that are kept; those that were not used for the longest time go first.
MOST_GRAPHS = 64
# cudaStreamCaptureMode: what other threads do is their business.
_THREAD_LOCAL = 1


class CudaGraphs:
    """Steps on one device by their keys.

    Attributes:
        recorded: graphs made so far, those included that are gone.
    """

    def __init__(self, device: Any, most: int = MOST_GRAPHS) -> None:
        """
        Raises:
            LibraryError: the CUDA runtime library is not here.
        """
        self._runtime = _Runtime()
        self._device, self._most = device, most
        self._stream = tvm_runtime.new_stream(device)
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._scratch = 0
        self.recorded = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, step: Callable[[], Any]) -> Any:
        """What `step` returns, whose values are as if it had run.

        The first time for a key it just runs: many are never seen again. From the third time on, a
        graph runs in its place.

        Args:
            step: launches kernels, and allocates nothing that it does not keep; it returns the same
                tensors every time.

        Raises:
            LibraryError: the step cannot be recorded.
        """
        self._forget_moved_scratch()
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            graph.launch()
            return graph.result
        result = step()
        if key not in self._seen:
            self._seen.add(key)
            return result
        # Now this thread's scratch memory is large enough, and all kernels are loaded.
        self._forget_moved_scratch()
        self._graphs[key] = self._record(step)
        self.recorded += 1
        if len(self._graphs) > self._most:
            self._graphs.popitem(last=False)
        return result

    def _forget_moved_scratch(self) -> None:
        scratch = tvm_runtime.scratch_address(self._device)
        if scratch != self._scratch:
            self._graphs.clear()
            self._scratch = scratch

    def _record(self, step: Callable[[], Any]) -> _Graph:
        graph = ctypes.c_void_p()
        stream = ctypes.c_void_p(self._stream)
        try:
            with tvm_runtime.use_stream(self._device, self._stream), _nothing_is_freed():
                self._runtime.call("cudaStreamBeginCapture", stream, _THREAD_LOCAL)
                try:
                    result = step()
                finally:
                    ended = self._runtime.try_call(
                        "cudaStreamEndCapture", stream, ctypes.byref(graph)
                    )
            self._runtime.check("cudaStreamEndCapture", ended)
            executable = ctypes.c_void_p()
            self._runtime.call(
                "cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0)
            )
            self._runtime.call("cudaGraphDestroy", graph)
        except Exception as error:
            raise LibraryError(
                f"a step could not be recorded as a CUDA graph: {_first_line(error)}. Compile "
                'with --opt "cuda_graph=0"'
            ) from error
        return _Graph(self._runtime, executable, result)


class _Graph:
    """An executable graph, and what the step returned that it was recorded from."""

    def __init__(self, runtime: _Runtime, executable: ctypes.c_void_p, result: Any) -> None:
        self._runtime, self._executable, self.result = runtime, executable, result
        # If it is still running, the driver waits for its end. At exit, the driver cleans up.
        weakref.finalize(self, runtime.try_call, "cudaGraphExecDestroy", executable).atexit = False

    def launch(self) -> None:
        # On the stream that everything else is on.
        self._runtime.call("cudaGraphLaunch", self._executable, None)


class _Runtime:
    """Functions of NVIDIA's runtime library."""

    def __init__(self) -> None:
        name = cuda.load_cudart()
        if name is None:
            raise LibraryError(
                f'CUDA graphs need {cuda.CUDART}, which is not here: `pip install "relaxlm[cuda]"`'
            )
        self._library = ctypes.CDLL(name)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def try_call(self, name: str, *arguments: Any) -> int:
        return int(getattr(self._library, name)(*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        self.check(name, self.try_call(name, *arguments))

    def check(self, name: str, error: int) -> None:
        if error:
            self._library.cudaGetLastError()  # else a later call would report it
            text = self._library.cudaGetErrorString(error).decode(errors="replace")
            raise LibraryError(f"{name}: {text}")


@contextmanager
def _nothing_is_freed() -> Iterator[None]:
    """While a stream records, memory may be neither taken nor freed, by the collector either."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
