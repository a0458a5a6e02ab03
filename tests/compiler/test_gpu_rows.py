"""Sums, activations and norms of rows on plain GPUs against float64 NumPy, run by the emulation."""

from collections.abc import Callable

import pytest

from relaxlm.compiler.kernels.gpu_rows import row_kernel
from relaxlm.compiler.kernels.row_expression import Binary, Input, Matrix
from tests.compiler.cuda_emulation import needs_compiler
from tests.compiler.gpu_emulation import GpuEmulation
from tests.compiler.test_cuda_rows import CASES, SUM, Case, as_plain, check_rows, rows

# There is no bfloat16 here.
PLAIN = {name: as_plain(case) for name, case in CASES.items()}
PLAIN["one element"] = Case(1, rows(1, "float32", count=2), SUM, CASES["bare layer norm"].norm)
ORDERS = {"metal": "random", "opencl": "reverse"}


@pytest.fixture(scope="module", params=ORDERS)
def kernels(request: pytest.FixtureRequest):
    with GpuEmulation(request.param, ORDERS[request.param]) as gpu:
        built = gpu.build_all(
            [row_kernel(*case[:5], dtype=case.inputs[0].dtype) for case in PLAIN.values()]
        )
        yield dict(zip(PLAIN, built, strict=True))


@needs_compiler
@pytest.mark.parametrize("name", PLAIN)
def test_rows(kernels: dict[str, Callable[..., None]], name: str) -> None:
    # Of gelu 1e-7 is lost, absolutely, and then divided by small numbers.
    check_rows(kernels[name], PLAIN[name], 4e-6 if name == "gelu" else 0)


def test_a_kernel_has_no_more_buffers_than_every_device() -> None:
    value = Matrix(0)
    for i in range(1, 8):
        value = Binary("add", value, Matrix(i))
    inputs = (Input(8),) * 8
    assert row_kernel(8, inputs, value, None, False, "float32") is None
    assert row_kernel(8, inputs[:7], value.left, None, False, "float32") is not None
    assert row_kernel(8, inputs[:7], value.left, None, True, "float32") is None
