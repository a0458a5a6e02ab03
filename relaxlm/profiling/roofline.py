"""How fast this machine's memory can be read: the limit of decoding, which reads every weight once.

Measured by a loop that only reads and adds, on the threads that the kernels run on, with the
prefetching that they use. A machine's speed changes with what else it does: a comparison with
this limit is worth something only if both were measured in turns.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from relaxlm.runtime import tvm_runtime
from relaxlm.runtime.threads import set_threads

_LINE = 64  # bytes, and one vector of 16 words
_TASK = 4096  # lines that one task reads: 256 KiB
_AHEAD = 64  # lines
# Interleaved chains of additions: one would wait for itself.
_CHAINS = 8
DEFAULT_BYTES = 256 << 20


class ReadLoop:
    """Reads given arrays, or memory of its own, with the threads of TVM's pool.

    Attributes:
        nbytes: that one pass reads.
    """

    def __init__(self, arrays: Sequence[np.ndarray] | None = None) -> None:
        """
        Args:
            arrays: contiguous, at addresses divisible by 64; the part of each that is a multiple
                of 256 KiB is read. 256 MiB of its own if None.
        """
        set_threads()
        if arrays is None:
            room = np.ones(DEFAULT_BYTES + _LINE, np.uint8)
            start = -room.ctypes.data % _LINE
            arrays = [room[start : start + DEFAULT_BYTES]]
        self._read = _compile()
        self._parts: list[tuple[Any, Any]] = []
        self.nbytes = 0
        for array in arrays:
            flat = array.reshape(-1).view(np.uint8)
            tasks = flat.nbytes // (_TASK * _LINE)
            if not tasks:
                continue
            words = flat[: tasks * _TASK * _LINE].view(np.uint32).reshape(tasks, -1)
            sums = tvm_runtime.upload(np.zeros((tasks, 16), np.uint32), tvm_runtime.device("cpu"))
            self._parts.append((tvm_runtime.share(words), sums))
            self.nbytes += words.nbytes
        assert self.nbytes, "nothing to read"

    def run(self) -> float:
        """Read everything once; bytes per second."""
        start = time.perf_counter()
        for words, sums in self._parts:
            self._read(words, sums)
        return self.nbytes / (time.perf_counter() - start)


def _compile() -> Any:
    """(words [tasks, 16 * lines], sums [tasks, 16]) uint32: each task's lines, added up."""
    import tvm
    from tvm.script.ir_builder import tirx as T

    from relaxlm.compiler.kernels.builder import emit, length, scratch, tensor
    from relaxlm.compiler.kernels.vector import prefetch
    from relaxlm.compiler.target import resolve_device

    def body() -> None:
        tasks = length("tasks")
        words = tensor("words", (tasks, _TASK * 16), "uint32")
        sums = tensor("sums", (tasks, 16), "uint32")
        with T.parallel(tasks) as task:
            chains = scratch(_CHAINS * 16, "uint32")
            for i in range(_CHAINS):
                zeros = T.broadcast(T.uint32(0), 16)
                T.buffer_store(chains, zeros, [T.ramp(i * 16, 1, 16)])
            with T.serial(_TASK // _CHAINS) as step:
                for i in range(_CHAINS):
                    start = (step * _CHAINS + i) * 16
                    prefetch(T.address_of(words[task, start + _AHEAD * 16]))
                    value = words.vload([task, start], "uint32x16")
                    value = chains.vload([i * 16], "uint32x16") + value
                    T.buffer_store(chains, value, [T.ramp(i * 16, 1, 16)])
            total = chains.vload([0], "uint32x16")
            for i in range(1, _CHAINS):
                total = total + chains.vload([i * 16], "uint32x16")
            T.buffer_store(sums, total, [task, T.ramp(0, 1, 16)])

    function = emit(body).with_attr("global_symbol", "read")
    target = resolve_device("cpu").tvm_target()
    return tvm.compile(tvm.IRModule({"read": function}), target=target)["read"]
