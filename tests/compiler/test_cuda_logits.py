"""Kernels that find the largest logits on GPUs, against NumPy, run by the emulation."""

from collections.abc import Callable

import numpy as np

from relaxlm.compiler.kernels.cuda_logits import gather_kernel, peaks_kernel, weigh_kernel
from relaxlm.runtime.peaks import BLOCK
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.runtime.test_peaks import peaks_of

Kernel = Callable[..., None]
VOCAB = 3 * BLOCK + 48


@needs_compiler
def test_peaks_and_blocks_of_logits() -> None:
    with CudaEmulation("random") as cuda:
        check_logits(
            *cuda.build_all(
                [kernel(VOCAB) for kernel in (peaks_kernel, gather_kernel, weigh_kernel)]
            )
        )


def check_logits(peaks: Kernel, gather: Kernel, weigh: Kernel) -> None:
    """Compare what kernels find in random logits with what NumPy does."""
    vocab, blocks = VOCAB, 4
    logits = np.random.default_rng(1).normal(0, 5, (6, vocab)).astype(np.float32)
    logits[1] = -np.abs(logits[1])
    logits[2] = -np.inf
    logits[3, vocab // 2] = np.nan
    logits[4, vocab // 3] = -np.float32(np.nan)
    logits[5, vocab - 1] = np.inf
    places = np.array([3, 0, 23, 9, 9, 14, 7], np.int32)
    rows, references = np.array([1, 0], np.int32), np.array([-3, 11.5], np.float32)
    factors, sums = np.array([2, 0.7], np.float32), np.full((2, blocks), 7, np.float32)
    weigh(logits, rows, references.view("int32"), factors.view("int32"), sums)
    found = np.full((6, blocks), 7, np.float32)
    peaks(logits, found)
    pieces = np.full((len(places), BLOCK), 7, np.float32)
    gather(logits, places, pieces)
    np.testing.assert_array_equal(found, peaks_of(logits))
    padded = np.full((6, blocks * BLOCK), -np.inf, np.float32)
    padded[:, :vocab] = logits
    np.testing.assert_array_equal(pieces, padded.reshape(-1, BLOCK)[places])
    exponents = (padded[rows] - references[:, None].astype("float64")) * factors[:, None]
    expected = np.exp(exponents).reshape(2, blocks, BLOCK).sum(-1)
    np.testing.assert_allclose(sums, expected, rtol=3e-6)
