"""The CUDA kernels of recurrent operators against NumPy, run by the emulation, and by nvcc."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tvm

from relaxlm.compiler.cuda import check_device_code, cuda_compilation
from relaxlm.compiler.kernels.cuda_state import conv_kernel, previous_row_kernel, scan_kernel
from relaxlm.compiler.kernels.state import ConvShape, ScanShape
from relaxlm.compiler.link import export_library
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import UnsupportedError
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.state_batch import (
    CONV,
    EVERYTHING,
    PLAIN,
    RAGGED,
    check_conv,
    check_previous_row,
    check_scan,
)
from tests.compiler.test_cuda import needs_nvcc


@pytest.fixture(params=["forward"])
def cuda(request: pytest.FixtureRequest) -> Iterator[CudaEmulation]:
    with CudaEmulation(request.param) as emulation:
        yield emulation


@needs_compiler
@pytest.mark.parametrize(
    ("change", "cuda"),
    [
        ({"strength": True}, "random"),
        ({"decay_per_key": True, "removal": True, "bonus": True}, "reverse"),
        ({"groups": 1, "key_dim": 7, "value_dim": 5, "removal": True}, "forward"),
        ({"dtype": "bfloat16", "key_dim": 130, "strength": True, "decay_per_key": True}, "forward"),
    ],
    ids=str,
    indirect=["cuda"],
)
def test_scan_matches_numpy(cuda: CudaEmulation, change: dict) -> None:
    shape = replace(PLAIN, **change)
    check_scan(cuda.build(scan_kernel(shape)), shape, RAGGED)


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        {"bias": "float16", "weight": "float16", "dtype": "float16"},
        {"taps": 2, "channels": 300, "silu": False},
    ],
    ids=str,
)
def test_conv_matches_numpy(cuda: CudaEmulation, change: dict) -> None:
    shape = replace(CONV, **change)
    check_conv(cuda.build(conv_kernel(shape)), shape)


@needs_compiler
def test_previous_row_matches_numpy(cuda: CudaEmulation) -> None:
    kernel = cuda.build(previous_row_kernel(300, "bfloat16", "float32"))
    check_previous_row(kernel, 300, "bfloat16")


def test_keys_that_do_not_fit_into_registers() -> None:
    with pytest.raises(UnsupportedError, match="of 257 features per key is not supported on GPUs"):
        scan_kernel(replace(PLAIN, key_dim=257))


@needs_nvcc
def test_kernels_compile_to_machine_code_in_registers(tmp_path: Path) -> None:
    target = resolve_device("cuda", "sm_90")
    delta = ScanShape(32, 16, 128, 128, False, False, True, False, "float16")
    conv = ConvShape(8192, 4, True, weight="float16", bias=None, dtype="float16")
    kernels = {
        "delta": scan_kernel(delta),
        "wide": scan_kernel(replace(EVERYTHING, key_dim=256)),
        "conv": conv_kernel(conv),
    }
    functions = {name: f.with_attr("global_symbol", name) for name, f in kernels.items()}
    with cuda_compilation(target.arch) as build:
        executable = tvm.compile(tvm.IRModule(functions), target=target.tvm_target())
    library = tmp_path / "kernels.so"
    export_library(executable, library)
    check_device_code(library, target.arch)
    assert len(build.reports) == 1 + 1 + 2
    assert [str(report) for report in build.reports if report.spill_stores > 8] == []
    assert max(report.registers for report in build.reports) <= 168
