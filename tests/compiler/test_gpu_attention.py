"""The attention kernels of plain GPUs against NumPy, as CUDA kernels run by the emulation.

They are loop nests that TVM also compiles for CUDA; that what it makes of them for other GPUs is
right is shown by the models of `test_gpu_models.py` and `tests/web`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from relaxlm.compiler.kernels import gpu_attention
from relaxlm.compiler.kernels.attention import AttentionShape, copy_kernel
from relaxlm.quantization.kv_cache import KV_FORMATS
from tests import reference
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.test_cuda_attention import ERROR, PAGE, Batch, as_dtype

pytestmark = needs_compiler


@pytest.fixture(params=["forward", "reverse", "random"])
def gpu(request: pytest.FixtureRequest) -> Iterator[CudaEmulation]:
    """The order in which the threads of a workgroup run between two barriers."""
    with CudaEmulation(request.param) as emulation:
        yield emulation


def attend(gpu: CudaEmulation, shape: AttentionShape, format: str, dtype: str) -> Callable:
    """A kernel with the arguments of `cuda_attention.attend_kernel`, of the two that there are."""
    see = gpu.build(gpu_attention.view_kernel(shape.window, shape.sinks, PAGE))
    attend = gpu.build(gpu_attention.attend_kernel(shape, KV_FORMATS[format], dtype))

    def kernel(q: np.ndarray, positions: np.ndarray, *rest: np.ndarray) -> None:
        row_offsets, page_offsets, page_ids, kv_lengths, dropped, *pages_and_out = rest
        view = np.full((len(q), 4), -1, "int32")
        see(positions, row_offsets, page_offsets, kv_lengths, dropped, view)
        attend(q, view, page_ids, *pages_and_out)

    return kernel


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "format", "gpu"),
    [
        ((6, 2), 64, "float16", "float16", "reverse"),
        ((4, 4), 24, "float32", "float32", "random"),
        ((3, 1), 8, "float32", "float16", "forward"),
        ((2, 1), 256, "float16", "float16", "random"),
        ((40, 2), 128, "float32", "float32", "forward"),  # 20 heads per KV head: several groups
    ],
    ids=["gqa", "mha-24", "3-heads", "256", "large-group"],
    indirect=["gpu"],
)
def test_attention_over_pages(
    gpu: CudaEmulation, heads: tuple[int, int], head_dim: int, dtype: str, format: str
) -> None:
    shape = AttentionShape(*heads, head_dim, window=0, sinks=0, scale=0.9 * head_dim**-0.5)
    # A sequence without new tokens, a whole prompt, single tokens, and the end of a prompt.
    lengths, new = [1, 17, 20, 150, 33], [1, 17, 0, 1, 5]
    batch = Batch(shape, KV_FORMATS[format], lengths, new)
    result = batch.attend(attend(gpu, shape, format, dtype), dtype)
    assert reference.relative_error(result, batch.expected(dtype)) < ERROR[dtype]


@pytest.mark.parametrize(
    "change",
    [{"cap": 1.5}, {"sink_logits": True}, {"cap": 3.0, "sink_logits": True, "window": 20}],
    ids=["cap", "sink", "both-window"],
)
@pytest.mark.parametrize("gpu", ["random"], indirect=True)
def test_capped_scores_and_sink_logits(gpu: CudaEmulation, change: dict) -> None:
    shape = replace(AttentionShape(6, 2, 16, window=0, sinks=0, scale=0.5), **change)
    batch = Batch(shape, KV_FORMATS["float32"], lengths=[1, 70, 9], new=[1, 3, 9])
    # Scores far beyond the cap, and beyond what an exponential takes.
    batch.q[2][:4] *= np.array([5, 50, 500, -500], "float32")[:, None, None]
    result = batch.attend(attend(gpu, shape, "float32", "float32"), "float32")
    assert reference.relative_error(result, batch.expected("float32")) < 4e-6


@pytest.mark.parametrize(("window", "sinks"), [(5, 0), (20, 4), (33, 20)])
@pytest.mark.parametrize("gpu", ["random"], indirect=True)
def test_sliding_window_with_sinks(gpu: CudaEmulation, window: int, sinks: int) -> None:
    shape = AttentionShape(4, 2, 16, window, sinks, scale=0.25)
    batch = Batch(shape, KV_FORMATS["float32"], lengths=[150, 131, 3, 30], new=[6, 1, 3, 2])
    kernel = attend(gpu, shape, "float32", "float32")
    expected = batch.expected("float32")
    assert reference.relative_error(batch.attend(kernel, "float32"), expected) < 2e-6
    # Leaving out pages that no query can see any more changes nothing.
    for part in ("k", "v", "q", "positions", "pages"):
        setattr(batch, part, getattr(batch, part)[:2])
    batch.slots = batch.slots[: 150 + 131]
    result = batch.attend(kernel, "float32", dropped_pages=3)
    assert reference.relative_error(result, expected[: 6 + 1]) < 2e-6


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float16"), (24, "float32")])
@pytest.mark.parametrize("gpu", ["reverse"], indirect=True)
def test_append_stores_what_the_reference_stores(
    gpu: CudaEmulation, head_dim: int, dtype: str
) -> None:
    shape, format = AttentionShape(4, 2, head_dim, 0, 0, scale=1.0), KV_FORMATS["float16"]
    batch = Batch(shape, format, lengths=[19, 5], new=[19, 5])
    expected = batch.stored(dtype)
    k, v = (np.concatenate(x).astype(as_dtype(dtype)) for x in (batch.k, batch.v))
    kernel = gpu.build(gpu_attention.append_kernel(shape, format, dtype))
    kernel(k, v, batch.slots, *batch.tensors)
    for ours, theirs in zip(batch.tensors, expected, strict=True):
        np.testing.assert_array_equal(ours.view("uint16"), theirs.view("uint16"))


@pytest.mark.parametrize("gpu", ["forward"], indirect=True)
def test_pages_are_copied_whole(gpu: CudaEmulation) -> None:
    pages = np.random.default_rng(0).standard_normal((7, 3, PAGE, 5)).astype("float32")
    expected = pages.copy()
    expected[[1, 4]] = pages[[6, 0]]
    kernel = gpu.build(copy_kernel((3, PAGE, 5), "float32", "gpu"))
    kernel(pages, np.array([6, 0], "int32"), np.array([1, 4], "int32"))
    np.testing.assert_array_equal(pages, expected)


def test_a_kernel_reads_at_most_eight_buffers() -> None:
    shape = AttentionShape(4, 2, 64, 128, 4, 1.0, sink_logits=True)
    kernels = [
        gpu_attention.attend_kernel(shape, KV_FORMATS["float16"], "float16"),
        gpu_attention.append_kernel(shape, KV_FORMATS["float16"], "float16"),
        gpu_attention.view_kernel(128, 4, PAGE),
    ]
    assert all(len(kernel.params) <= 8 for kernel in kernels)
