"""The emulation of CUDA itself: right kernels give right results, wrong ones are found out."""

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.relax.frontend import nn
from tvm.s_tir import dlight
from tvm.script import tirx as T

from tests.compiler.cuda_emulation import ORDERS, CudaEmulation, needs_compiler, needs_cpu_memory

pytestmark = needs_compiler

# fmt: off


def neighbour_sums(with_barrier: bool) -> tirx.PrimFunc:
    """y[i] = x[i] + x[i + 1], through shared memory, over 64 threads."""

    @T.prim_func(s_tir=True)
    def kernel(x_h: T.handle, y_h: T.handle):
        n = T.int32()
        x = T.match_buffer(x_h, (n, 64), "float32")
        y = T.match_buffer(y_h, (n, 64), "float32")
        for block in T.thread_binding(n, thread="blockIdx.x"):
            for lane in T.thread_binding(64, thread="threadIdx.x"):
                with T.sblock("sums"):
                    shared = T.sblock_alloc_buffer((65,), "float32", scope="shared")
                    shared[lane] = x[block, lane]
                    if lane == 63:
                        shared[64] = T.float32(0)
                    if with_barrier:
                        T.tvm_storage_sync("shared")
                    y[block, lane] = shared[lane] + shared[lane + 1]

    return kernel


@T.prim_func(s_tir=True)
def waits_on_two_branches(x_h: T.handle):
    x = T.match_buffer(x_h, (64,), "float32")
    for lane in T.thread_binding(64, thread="threadIdx.x"):
        with T.sblock("wait"):
            if lane < 32:
                T.tvm_storage_sync("shared")
                x[lane] = T.float32(1)
            else:
                T.tvm_storage_sync("shared")
                x[lane] = T.float32(2)


@T.prim_func(s_tir=True)
def half_of_a_warp_shuffles(x_h: T.handle):
    x = T.match_buffer(x_h, (32,), "float32")
    for lane in T.thread_binding(32, thread="threadIdx.x"):
        with T.sblock("shuffle"):
            if lane < 16:
                x[lane] = T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), x[lane], 1, 32, 32)


@T.prim_func(s_tir=True)
def reads_and_writes_one_too_many(x_h: T.handle, y_h: T.handle):
    n = T.int32()
    x = T.match_buffer(x_h, (n,), "float16")
    y = T.match_buffer(y_h, (n,), "float16")
    for block in T.thread_binding(n // 64 + 1, thread="blockIdx.x"):
        for lane in T.thread_binding(64, thread="threadIdx.x"):
            with T.sblock("copy"):
                y[block * 64 + lane] = x[block * 64 + lane]


@T.prim_func(s_tir=True)
def warp_total(x_h: T.handle, y_h: T.handle):
    n = T.int32()
    x = T.match_buffer(x_h, (n, 4, 32), "int32")
    y = T.match_buffer(y_h, (n, 4), "int32")
    for block in T.thread_binding(n, thread="blockIdx.x"):
        for warp in T.thread_binding(4, thread="threadIdx.y"):
            for lane in T.thread_binding(32, thread="threadIdx.x"):
                with T.sblock("total"):
                    total = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    total[0] = x[block, warp, lane]
                    for k in T.unroll(5):
                        total[0] = total[0] + T.tvm_warp_shuffle_xor(
                            T.uint32(0xFFFFFFFF), total[0], T.shift_left(1, k), 32, 32)
                    if lane == 0:
                        y[block, warp] = total[0]


def cast(source: str, target: str) -> tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def kernel(x_h: T.handle, y_h: T.handle):
        n = T.int32()
        x = T.match_buffer(x_h, (n,), source)
        y = T.match_buffer(y_h, (n,), target)
        for block in T.thread_binding(n, thread="blockIdx.x"):
            with T.sblock("cast"):
                y[block] = T.cast(x[block], target)

    return kernel

# fmt: on


def error_of(call: Callable, *arguments: object) -> str:
    with pytest.raises(RuntimeError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_with_a_barrier(order: str) -> None:
    x = np.random.default_rng(0).standard_normal((3, 64)).astype("float32")
    y = np.zeros_like(x)
    with CudaEmulation(order) as cuda:
        cuda.build(neighbour_sums(with_barrier=True))(x, y)
    np.testing.assert_array_equal(y, x + np.pad(x[:, 1:], ((0, 0), (0, 1))))


def test_a_missing_barrier_shows_in_some_order() -> None:
    # TVM adds barriers of its own where it sees the need, so the source is patched.
    x = np.ones((2, 64), "float32")
    wrong = []
    for order in ORDERS:
        y = np.zeros_like(x)
        with CudaEmulation(order) as cuda:
            cuda.patch = lambda code: code.replace("__syncthreads();", "")
            cuda.build(neighbour_sums(with_barrier=True))(x, y)
        wrong.append(bool(np.isnan(y).any()))
    assert wrong == [True, False, True]


def test_barriers_on_two_branches_are_refused() -> None:
    with CudaEmulation() as cuda:
        message = error_of(cuda.build(waits_on_two_branches), np.zeros(64, "float32"))
    assert re.fullmatch(
        r"CUDA emulation, kernel0_kernel: __syncthreads\(\) does not match: thread \(0, 0, 0\) of "
        r"block \(0, 0, 0\) is on line \d+, thread \(32, 0, 0\) of block \(0, 0, 0\) on line \d+",
        message,
    )


def test_a_shuffle_that_some_lanes_skip_is_refused() -> None:
    with CudaEmulation() as cuda:
        kernel = cuda.build(half_of_a_warp_shuffles)
        message = error_of(kernel, np.zeros(32, "float32"))
    assert message.startswith(
        "CUDA emulation, kernel0_kernel: threads wait for each other: "
        "thread (0, 0, 0) of block (0, 0, 0) is in a warp operation on line "
    )
    assert message.endswith("thread (16, 0, 0) of block (0, 0, 0) has returned;")


def test_memory_beyond_an_array_is_refused() -> None:
    x, y = np.ones(128, "float16"), np.zeros(128, "float16")
    with CudaEmulation() as cuda:
        message = error_of(cuda.build(reads_and_writes_one_too_many), x, y)
    assert message.startswith(
        "CUDA emulation, kernel0_kernel: thread (0, 0, 0) of block (2, 0, 0) "
        "accesses invalid memory at 0x"
    )


@pytest.mark.parametrize("order", ORDERS)
def test_warp_shuffles(order: str) -> None:
    x = np.random.default_rng(0).integers(-100, 100, (3, 4, 32), dtype="int32")
    y = np.zeros((3, 4), "int32")
    with CudaEmulation(order) as cuda:
        cuda.build(warp_total)(x, y)
    np.testing.assert_array_equal(y, x.sum(-1))


@pytest.mark.parametrize(("name", "dtype"), [("float16", "f2"), ("bfloat16", ml_dtypes.bfloat16)])
def test_half_precision_converts_as_numpy_does(name: str, dtype: str) -> None:
    codes = np.arange(65536, dtype="uint16").view(dtype)
    codes = codes[np.isfinite(codes.astype("float32"))]
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            codes.astype("float32"),
            rng.integers(0, 2**32, 20_000, dtype="uint32").view("float32"),
            np.float32([65519, 65520, 65536, np.inf, -np.inf, 2**-25, 3 * 2**-26, 0.0, -0.0]),
        ]
    )
    values = values[~np.isnan(values)]
    with CudaEmulation() as cuda:
        wide, narrow = np.zeros(len(codes), "float32"), np.zeros(len(values), dtype)
        cuda.build(cast(name, "float32"))(codes, wide)
        cuda.build(cast("float32", name))(values, narrow)
    np.testing.assert_array_equal(wide, codes.astype("float32"))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(narrow.view("u2"), values.astype(dtype).view("u2"))


def test_host_code_checks_arguments() -> None:
    with CudaEmulation() as cuda:
        kernel = cuda.build(neighbour_sums(with_barrier=True))
        with pytest.raises(ValueError, match=r"^Mismatched y\.shape\[0\] on argument #1"):
            kernel(np.zeros((3, 64), "float32"), np.zeros((2, 64), "float32"))


@needs_cpu_memory
def test_scheduled_model_runs_in_the_virtual_machine() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            self.norm = nn.RMSNorm(96, -1, 1e-5, bias=False)
            self.up = nn.Linear(96, 40, bias=False)

        def forward(self, x: nn.Tensor) -> nn.Tensor:
            return nn.op.softmax(nn.op.silu(self.up(self.norm(x))), axis=-1)

    rng = np.random.default_rng(0)
    x, norm, up = (rng.standard_normal(s).astype("float32") for s in ((3, 96), (96,), (40, 96)))
    module, _ = Block().export_tvm(spec={"forward": {"x": nn.spec.Tensor(["n", 96], "float32")}})
    with CudaEmulation("random") as cuda:
        with cuda.target:
            module = relax.get_pipeline("zero")(module)
            module = dlight.ApplyDefaultSchedule(
                dlight.gpu.GEMV(),
                dlight.gpu.Reduction(),
                dlight.gpu.GeneralReduction(),
                dlight.gpu.Fallback(),
            )(module)
            executable = tvm.compile(module, target=cuda.target)
        machine = relax.VirtualMachine(executable.mod, tvm.cuda())
        result = machine["forward"](*(cuda.tensor(array) for array in (x, norm, up))).numpy()
    x, norm, up = (array.astype("float64") for array in (x, norm, up))
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * norm @ up.T
    y = np.exp(y / (1 + np.exp(-y)))
    # The exponents are up to 20, and rounded to float32 before they are used.
    np.testing.assert_allclose(result, y / y.sum(-1, keepdims=True), rtol=2e-5)
