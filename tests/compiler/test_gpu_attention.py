"""The attention kernels of plain GPUs against NumPy, as CUDA kernels run by the emulation.

They are loop nests that TVM also compiles for CUDA; that what it makes of them for other GPUs is
right is shown by the models of `test_gpu_models.py` and `tests/web`.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from relaxlm.compiler.kernels import gpu_attention
from relaxlm.compiler.kernels.attention import AttentionShape, copy_kernel
from relaxlm.compiler.kernels.gpu_tiles import CHUNK, Tile
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


class Attention:
    """The attention kernel of a shape, built once.

    Attributes:
        split: whether its last call cut contexts into parts.
    """

    def __init__(self, gpu: CudaEmulation, shape: AttentionShape, format: str, dtype: str) -> None:
        self.shape, self.format, self.dtype = shape, KV_FORMATS[format], dtype
        self._see, self._attend = gpu.build_all(
            [
                gpu_attention.view_kernel(shape.window, shape.sinks, shape.chunked, PAGE),
                gpu_attention.attend_kernel(shape, self.format, dtype),
            ]
        )

    def __call__(self, q: np.ndarray, positions: np.ndarray, *rest: np.ndarray) -> None:
        """Takes the arguments of `cuda_attention.attend_kernel`."""
        row_offsets, page_offsets, page_ids, kv_lengths, dropped, *pages, out = rest
        view = np.full((len(q), gpu_attention.VIEW_COLUMNS), -1, "int32")
        self._see(positions, row_offsets, page_offsets, kv_lengths, dropped, view)
        partial = np.full(gpu_attention.partial_shape(self.shape), np.nan, "float32")
        self._attend(q, view, row_offsets, page_ids, *pages, out, partial)
        self.split = not np.isnan(partial).all()

    def check(self, batch: Batch, tolerance: float | None = None, dropped_pages: int = 0) -> None:
        result = batch.attend(self, self.dtype, dropped_pages)
        tolerance = ERROR[self.dtype] if tolerance is None else tolerance
        assert reference.relative_error(result, batch.expected(self.dtype)) < tolerance

    def check_ways(self, tolerance: float | None = None) -> None:
        """The ways to share out the work: by tokens, by parts of contexts, and by rows."""
        for way, (lengths, new) in WAYS.items():
            n, batch = sum(new), len(new)
            group = self.shape.q_heads // self.shape.kv_heads
            many = (
                n >= gpu_attention.MANY_TOKENS * batch
                and n * group >= gpu_attention.FEW_ROWS * batch
            )
            assert many == (way == "rows")
            seen = PAGE * sum(-(-length // PAGE) for length in lengths)
            if self.shape.window:
                seen = min(seen, self.shape.window + self.shape.sinks)
            self.check(Batch(self.shape, self.format, lengths, new), tolerance)
            assert self.split == (not many and seen > gpu_attention.PART_TOKENS)


# Cached tokens, and how many of them are new. Among them a sequence without new tokens, a whole
# prompt, single tokens, the ends of prompts; and contexts so short that some parts are empty.
WAYS = {
    "tokens": ([1, 17, 20, 39], [1, 2, 0, 1]),
    "parts": ([600, 5, 40], [1, 1, 2]),
    "rows": ([1, 17, 20, 150, 33], [1, 17, 0, 70, 5]),
}


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "format", "gpu"),
    [
        ((6, 2), 64, "float16", "float16", "reverse"),
        ((4, 4), 24, "float32", "float32", "random"),
        ((3, 1), 8, "float32", "float16", "forward"),
        ((2, 1), 256, "float16", "float16", "random"),
        ((40, 2), 80, "float32", "float32", "forward"),  # 20 heads per KV head: several groups
        ((9, 1), 512, "float32", "float32", "random"),  # 256 threads
    ],
    ids=["gqa", "mha-24", "3-heads", "256", "large-group", "512"],
    indirect=["gpu"],
)
def test_attention_over_pages(
    gpu: CudaEmulation, heads: tuple[int, int], head_dim: int, dtype: str, format: str
) -> None:
    shape = AttentionShape(*heads, head_dim, window=0, sinks=0, scale=0.9 * head_dim**-0.5)
    Attention(gpu, shape, format, dtype).check_ways()


@pytest.mark.parametrize(
    "change",
    [{"sink_logits": True}, {"cap": 3.0, "sink_logits": True, "window": 20}],
    ids=["sink", "both-window"],
)
@pytest.mark.parametrize("gpu", ["random"], indirect=True)
def test_capped_scores_and_sink_logits(gpu: CudaEmulation, change: dict) -> None:
    shape = replace(AttentionShape(8, 2, 16, window=0, sinks=0, scale=0.5), **change)
    attention = Attention(gpu, shape, "float32", "float32")
    attention.check_ways(4e-6)
    if shape.cap:
        # Scores far beyond the cap, and beyond what an exponential takes.
        batch = Batch(shape, KV_FORMATS["float32"], lengths=[1, 70, 9], new=[1, 3, 9])
        batch.q[2][:4] *= np.array([5, 50, 500, -500], "float32")[:, None, None]
        attention.check(batch, 4e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"window": 5},
        {"window": 33, "sinks": 20, "alibi": True},
        {"window": 24, "chunked": True},
    ],
    ids=["window", "sinks-alibi", "chunked"],
)
@pytest.mark.parametrize("gpu", ["random"], indirect=True)
def test_windows_chunks_and_distances(
    gpu: CudaEmulation, monkeypatch: pytest.MonkeyPatch, change: dict
) -> None:
    # Even windows are cut into parts.
    monkeypatch.setattr(gpu_attention, "PART_TOKENS", 16)
    shape = AttentionShape(8, 2, 16, **{"window": 0, "sinks": 0, "scale": 0.25, **change})
    attention = Attention(gpu, shape, "float32", "float32")
    attention.check_ways()
    if shape.window:
        # Leaving out pages that no query can see any more changes nothing.
        for new in ([6, 1], [1, 1], [17, 9]):
            batch = Batch(shape, KV_FORMATS["float32"], lengths=[150, 131], new=new)
            attention.check(batch, dropped_pages=3)


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


@pytest.mark.parametrize(
    "size", [2, 8, 20, 64, 72, 80, 96, 112, 120, 128, 192, 256, 512, 576, 1024]
)
def test_tiles_of_all_sizes_fit(size: int) -> None:
    """Threads share out all of the work, in registers, and in 16 KB of workgroup memory."""
    rows = [gpu_attention.few_rows(heads, size) for heads in range(1, 130)]
    for heads, (tile, count) in enumerate(rows, 1):
        assert (count - 1) * tile.rows < heads <= count * tile.rows
    many = Tile.of(min(gpu_attention.MANY_ROWS, Tile.most_rows(size)), size)
    for tile in {*(tile for tile, _ in rows), many}:
        products, results = tile.products, tile.rows_each * tile.features_each
        assert products.rows_each * products.columns_each * tile.threads == tile.rows * tile.tokens
        assert tile.lanes * tile.slices * (tile.rows // tile.rows_each) == tile.threads <= 256
        assert tile.lanes * tile.features_each >= size and results <= 50
        assert tile.tokens % tile.slices == tile.tokens % tile.pieces == 0
        staged = CHUNK * tile.rows + (CHUNK + 1) * tile.tokens
        scores = tile.rows * (tile.tokens + 1 + tile.pieces + 2)
        assert 4 * (staged + scores + tile.tokens) <= 16384
