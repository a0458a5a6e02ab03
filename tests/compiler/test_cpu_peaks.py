"""The kernel of peaks against NumPy."""

import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels.cpu_peaks import peaks_kernel
from relaxlm.compiler.target import resolve_device
from relaxlm.runtime.peaks import BLOCK
from tests.runtime.test_peaks import peaks_of


@pytest.mark.parametrize("vocab", [7, BLOCK, 3 * BLOCK + 48, 40 * BLOCK + 77])
@pytest.mark.parametrize("cpu", ["native", "x86-64-v2"])
def test_peaks_are_the_largest_of_their_blocks(vocab: int, cpu: str) -> None:
    target = resolve_device("cpu", None if cpu == "native" else cpu).tvm_target(3)
    function = peaks_kernel(vocab).with_attr("global_symbol", "peaks")
    kernel = tvm.compile(tvm.IRModule({"peaks": function}), target=target)["peaks"]
    logits = np.random.default_rng(1).normal(0, 5, (6, vocab)).astype(np.float32)
    logits[1] = -np.abs(logits[1])
    logits[2] = -np.inf
    logits[3, vocab // 2] = np.nan
    logits[4, vocab // 3] = -np.float32(np.nan)
    logits[5, vocab - 1] = np.inf
    found = tvm.runtime.empty((6, -(-vocab // BLOCK)), "float32")
    kernel(tvm.runtime.tensor(logits), found)
    np.testing.assert_array_equal(found.numpy(), peaks_of(logits))
