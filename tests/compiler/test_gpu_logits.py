"""Kernels that find the largest logits on plain GPUs, against NumPy, run by the emulation."""

import numpy as np
import pytest

from relaxlm.compiler.kernels.gpu_logits import (
    gather_kernel,
    highest_kernel,
    peaks_kernel,
    weigh_kernel,
)
from relaxlm.runtime.peaks import BLOCK
from tests.compiler.cuda_emulation import needs_compiler
from tests.compiler.gpu_emulation import GpuEmulation
from tests.compiler.test_cuda_logits import VOCAB, check_logits


@needs_compiler
@pytest.mark.parametrize(("kind", "order"), [("metal", "random"), ("opencl", "reverse")])
def test_peaks_and_blocks_of_logits(kind: str, order: str) -> None:
    with GpuEmulation(kind, order) as gpu:
        check_logits(
            *gpu.build_all(
                [kernel(VOCAB) for kernel in (peaks_kernel, gather_kernel, weigh_kernel)]
            )
        )


@needs_compiler
def test_blocks_with_the_largest_peaks_come_in_order() -> None:
    blocks = 300
    peaks = np.random.default_rng(2).integers(-70, 70, (1, blocks)).astype(np.float32)
    peaks[0, 7], peaks[0, 290], peaks[0, 8] = np.inf, np.nan, -np.inf
    expected = np.argsort(np.where(np.isnan(peaks[0]), -np.inf, -peaks[0]), kind="stable")
    # No number comes first.
    expected = np.concatenate([[290], expected[expected != 290]])
    with GpuEmulation("opencl", "random") as gpu:
        (kernel,) = gpu.build_all([highest_kernel(blocks * BLOCK - 3)])
        for count in (1, 40, blocks):
            found = np.full(count, -7, np.int32)
            kernel(peaks, np.zeros(count, np.int32), found)
            np.testing.assert_array_equal(found, expected[:count])
