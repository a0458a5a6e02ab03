"""The read loop reads every byte."""

import numpy as np
import pytest

from relaxlm.profiling.roofline import ReadLoop
from relaxlm.runtime import tvm_runtime

TASK = 256 << 10


def aligned(nbytes: int) -> np.ndarray:
    room = np.empty(nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + nbytes]


def test_sums_of_what_it_read() -> None:
    rng = np.random.default_rng(0)
    arrays = [aligned(3 * TASK), aligned(TASK + 64), aligned(TASK - 64)]
    for array in arrays:
        array[:] = rng.integers(1, 256, array.nbytes)
    loop = ReadLoop(arrays)
    assert loop.nbytes == 4 * TASK  # whole tasks only
    assert loop.run() > 0
    for array, (_, sums) in zip(arrays[:2], loop._parts, strict=True):
        tasks = array.nbytes // TASK
        words = array[: tasks * TASK].view(np.uint32).reshape(tasks, -1, 16)
        expected = words.sum(1, dtype=np.uint32)
        np.testing.assert_array_equal(tvm_runtime.download(sums), expected)


def test_nothing_to_read() -> None:
    with pytest.raises(AssertionError, match="nothing to read"):
        ReadLoop([aligned(64)])
