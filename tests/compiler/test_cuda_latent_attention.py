"""Multi-head latent attention on GPUs against float64 NumPy, run by the emulation."""

from collections.abc import Callable

import numpy as np
import pytest
import tvm

from relaxlm.compiler.cuda import cuda_compilation
from relaxlm.compiler.kernels import cuda_latent_attention
from relaxlm.compiler.kernels.attention import PAGE_SIZE
from relaxlm.compiler.kernels.cpu_latent_attention import LatentShape
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.groupwise import FLOAT_DTYPES
from relaxlm.quantization.kv_cache import KV_FORMATS
from tests import reference
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.test_cpu_latent_attention import PagedBatch
from tests.compiler.test_cuda import needs_nvcc

SMALL = LatentShape(heads=3, latent=48, rope=16, scale=0.11)
ODD = LatentShape(heads=6, latent=24, rope=8, scale=0.2)
PUBLISHED = LatentShape(heads=20, latent=512, rope=64, scale=192**-0.5)
# What rounding outputs, and weights before they meet values, costs, with some room.
ERROR = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3}
SHARED = {"sm_75": 64 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}


class LatentBatch(PagedBatch):
    """The same, appended and attended to by kernels for GPUs."""

    def round_to(self, dtype: str) -> None:
        """Let queries and cached values be what `dtype` can hold."""
        for values in (self.q, self.cached):
            values[:] = [x.astype(FLOAT_DTYPES[dtype]).astype(np.float32) for x in values]

    def run(self, append: Callable, attend: Callable, format: str, dtype: str) -> np.ndarray:
        """The new tokens' results, by these two kernels."""
        shape, numpy = self.shape, FLOAT_DTYPES[dtype]
        pages = np.full((self.total, PAGE_SIZE, shape.width), np.nan).astype(FLOAT_DTYPES[format])
        slots = [
            own[np.arange(n) // PAGE_SIZE] * PAGE_SIZE + np.arange(n) % PAGE_SIZE
            for n, own in zip(self.lengths, self.pages, strict=True)
        ]
        cached, q = (np.concatenate(x).astype(numpy) for x in (self.cached, self.q))
        parts = (cached[:, : shape.latent], cached[:, shape.latent :])
        append(*map(np.ascontiguousarray, parts), np.concatenate(slots).astype("int32"), pages)
        positions = [np.arange(n - m, n) for n, m in zip(self.lengths, self.new, strict=True)]
        out = np.full((len(q), shape.heads, shape.latent), np.nan, numpy)
        attend(
            np.ascontiguousarray(q[..., : shape.latent]),
            np.ascontiguousarray(q[..., shape.latent :]),
            np.concatenate(positions).astype("int32"),
            np.cumsum([0, *self.new]).astype("int32"),
            np.cumsum([0, *map(len, self.pages)]).astype("int32"),
            np.concatenate(self.pages).astype("int32"),
            np.array(self.lengths, "int32"),
            pages,
            out,
        )
        return out


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "dtype", "format", "arch", "order", "lengths", "new"),
    [
        # A prompt, the end of one, no new token, a single one; the last tile of rows has a rest.
        (SMALL, "float16", "float16", "sm_86", "random", [33, 70, 9, 1], [33, 7, 0, 1]),
        # Parts of the context, some of which are empty for the short one.
        (SMALL, "bfloat16", "bfloat16", "sm_90", "reverse", [600, 5], [1, 1]),
        (ODD, "float16", "float32", "sm_75", "forward", [300, 40], [2, 40]),
        (PUBLISHED, "float16", "float16", "sm_90", "random", [77], [4]),
        (PUBLISHED, "float16", "float16", "sm_75", "forward", [40, 300], [1, 1]),
        (SMALL, "float32", "float32", "sm_86", "random", [300, 33], [1, 33]),
        (LatentShape(4, 20, 12, 0.3), "float16", "float16", "sm_86", "reverse", [40], [9]),
    ],
    ids=["mixed", "parts", "odd", "published", "published-sm_75", "float32", "not-by-8"],
)
def test_matches_numpy(shape, dtype, format, arch, order, lengths, new) -> None:
    batch = LatentBatch(shape, lengths, new)
    batch.round_to(dtype)
    kv = KV_FORMATS[format]
    with CudaEmulation(order) as cuda:
        kernels = cuda.build_all(
            [
                cuda_latent_attention.append_kernel(shape, kv, dtype),
                cuda_latent_attention.attend_kernel(shape, kv, dtype, SHARED[arch]),
            ]
        )
        result = batch.run(*kernels, format, dtype)
    assert reference.relative_error(result, batch.expected()) < ERROR[dtype]


@needs_compiler
@pytest.mark.parametrize(("n", "dtype"), [(1, "float16"), (21, "bfloat16"), (40, "float32")])
def test_every_head_has_a_matrix_of_its_own(n: int, dtype: str) -> None:
    rng, heads, outputs, inputs = np.random.default_rng(2), 3, 40, 24
    x = rng.standard_normal((n, heads, inputs)).astype(FLOAT_DTYPES[dtype])
    weight = rng.standard_normal((heads, outputs, inputs)).astype(FLOAT_DTYPES[dtype])
    out = np.full((n, heads, outputs), np.nan, FLOAT_DTYPES[dtype])
    kernel = cuda_latent_attention.head_matmul_kernel(
        heads, outputs, inputs, dtype, dtype, SHARED["sm_86"]
    )
    with CudaEmulation("random") as cuda:
        cuda.build(kernel)(x, weight, out)
    expected = np.einsum("thi,hoi->tho", x.astype("float64"), weight.astype("float64"))
    assert reference.relative_error(out, expected) < ERROR[dtype]


@pytest.mark.parametrize("limit", SHARED.values())
@pytest.mark.parametrize("width", [64, 576])
def test_tiles_fit_into_shared_memory(width: int, limit: int) -> None:
    for rows in (1, 16, 20, 64, 1000):
        tile = cuda_latent_attention.latent_tile(width, rows, limit)
        assert tile.shared(width) <= limit
    assert cuda_latent_attention.latent_tile(576, 64, 227 << 10).rows == 64


@needs_nvcc
def test_kernels_compile_to_machine_code_in_registers() -> None:
    target = resolve_device("cuda", "sm_90")
    shape = LatentShape(heads=128, latent=512, rope=64, scale=192**-0.5)
    functions = {
        dtype: cuda_latent_attention.attend_kernel(
            shape, KV_FORMATS[dtype], dtype, target.shared_memory
        ).with_attr("global_symbol", dtype)
        for dtype in ("bfloat16", "float32")
    }
    with cuda_compilation(target.arch) as build:
        tvm.compile(tvm.IRModule(functions), target=target.tvm_target())
    assert len(build.reports) == 4
    assert [str(report) for report in build.reports if report.stack or report.spill_stores] == []
