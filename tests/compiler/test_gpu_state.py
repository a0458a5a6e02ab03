"""The kernels of recurrent operators for any GPU against NumPy, as CUDA kernels by the emulation.

That their WGSL is right is shown by the models of `tests/web`.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from relaxlm.compiler.kernels.gpu_state import (
    conv_kernel,
    previous_row_kernel,
    scan_kernel,
    view_kernel,
)
from relaxlm.errors import UnsupportedError
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.state_batch import (
    CONV,
    PLAIN,
    RAGGED,
    Kernel,
    check_conv,
    check_previous_row,
    check_scan,
)


@pytest.fixture(params=["forward"])
def gpu(request: pytest.FixtureRequest) -> Iterator[CudaEmulation]:
    with CudaEmulation(request.param) as emulation:
        yield emulation


def with_tables(gpu: CudaEmulation, kernel) -> Kernel:
    """A kernel with the arguments of `cuda_state`, of this one and the one that makes its view."""
    see, built = gpu.build(view_kernel()), gpu.build(kernel)

    def run(*arrays: np.ndarray) -> None:
        *inputs, offsets, positions, sources, targets, state, out = arrays
        view = np.full((len(sources), 4), -9, "int32")
        see(offsets, positions, sources, targets, view)
        built(*inputs, view, state, out)

    return run


@needs_compiler
@pytest.mark.parametrize(
    ("change", "gpu"),
    [
        ({"strength": True}, "random"),
        ({"decay_per_key": True, "removal": True, "bonus": True}, "reverse"),
        ({"groups": 1, "key_dim": 70, "value_dim": 65, "dtype": "float16"}, "forward"),
    ],
    ids=str,
    indirect=["gpu"],
)
def test_scan_matches_numpy(gpu: CudaEmulation, change: dict) -> None:
    shape = replace(PLAIN, **change)
    check_scan(with_tables(gpu, scan_kernel(shape)), shape, RAGGED)


@needs_compiler
def test_conv_and_previous_row_match_numpy(gpu: CudaEmulation) -> None:
    shape = replace(CONV, bias="float16", weight="float16", dtype="float16")
    check_conv(with_tables(gpu, conv_kernel(shape)), shape)
    kernel = previous_row_kernel(300, "float16", "float32")
    check_previous_row(with_tables(gpu, kernel), 300, "float16")


def test_keys_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="of 257 features per key is not supported on GPUs"):
        scan_kernel(replace(PLAIN, key_dim=257))
