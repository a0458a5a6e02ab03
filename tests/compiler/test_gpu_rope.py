"""From products to queries and pages on plain GPUs, against float64 NumPy, run by the emulation."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.gpu_rope import rope_append_kernel
from relaxlm.compiler.kernels.rope import RopeOptions
from relaxlm.quantization.kv_cache import get_kv_format
from tests.compiler.cuda_emulation import needs_compiler
from tests.compiler.gpu_emulation import GpuEmulation
from tests.compiler.test_cpu_rope import KV, Q, apart, joined
from tests.compiler.test_cuda_rope import check_rope

CASES: dict[str, tuple[int, RopeOptions, str]] = {
    "whole": (64, joined(64, turned=64, dtype="float16"), "float16"),
    "norm, other pages": (
        136,
        joined(136, turned=136, norm="float32", eps=1e-2, dtype="float16"),
        "float32",
    ),
    "norm, odd part": (24, joined(24, turned=6, norm="float32", eps=1e-2), "float16"),
    "pairs": (32, joined(32, turned=32, in_pairs=True, scaled=True), "float32"),
    "part in pairs": (40, joined(40, turned=12, in_pairs=True, dtype="float16"), "float32"),
    "none": (20, joined(20, dtype="float16"), "float32"),
    "apart": (32, apart(32, turned=32, dtype="float16"), "float16"),
}
ORDERS = {"metal": "random", "opencl": "reverse"}


def kernel_of(dim: int, options: RopeOptions, format: str):
    shape = AttentionShape(Q, KV, dim, 0, 0, 0.0)
    return rope_append_kernel(shape, get_kv_format(format), options)


@pytest.fixture(scope="module", params=ORDERS)
def kernels(request: pytest.FixtureRequest):
    with GpuEmulation(request.param, ORDERS[request.param]) as gpu:
        built = gpu.build_all([kernel_of(*case) for case in CASES.values()])
        yield dict(zip(CASES, built, strict=True))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_rope_and_append(kernels: dict[str, Callable[..., None]], name: str) -> None:
    check_rope(kernels[name], *CASES[name], joined_tables=True)


def test_a_kernel_has_no_more_buffers_than_every_device() -> None:
    whole = joined(64, turned=64, norm="float16")
    for options, buffers in (
        (whole, 8),
        (replace(whole, scaled=True), 9),
        (apart(64, turned=64), 8),
        (apart(64, norm="float16"), 9),
    ):
        kernel = kernel_of(64, options, "float16")
        assert (None if kernel is None else len(kernel.params)) == (
            buffers if buffers < 9 else None
        )
