"""Multi-head latent attention of plain GPUs against float64 NumPy, by the emulation of CUDA.

That what TVM makes of it for other GPUs is right is shown by the models of `test_gpu_models.py`.
"""

import numpy as np
import pytest

from relaxlm.compiler.kernels import (
    cuda_latent_attention,
    gpu_attention,
    gpu_latent_attention,
)
from relaxlm.compiler.kernels.attention import PAGE_SIZE
from relaxlm.compiler.kernels.cpu_latent_attention import LatentShape
from relaxlm.quantization.groupwise import FLOAT_DTYPES
from relaxlm.quantization.kv_cache import KV_FORMATS
from tests import reference
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.test_cuda_latent_attention import ERROR, LatentBatch

pytestmark = needs_compiler
SMALL = LatentShape(heads=3, latent=48, rope=16, scale=0.11)
ODD = LatentShape(heads=6, latent=20, rope=12, scale=0.3)
PUBLISHED = LatentShape(heads=20, latent=512, rope=64, scale=192**-0.5)
# Of MiniCPM 3.
FORTY_HEADS = LatentShape(heads=40, latent=256, rope=32, scale=96**-0.5)


class Kernels:
    """A shape's kernels, built once; called with the arguments of `cuda_latent_attention`.

    Attributes:
        split: whether the last call of `attend` cut contexts into parts.
    """

    def __init__(self, gpu: CudaEmulation, shape: LatentShape, format: str, dtype: str) -> None:
        self.shape, kv = shape, KV_FORMATS[format]
        self.append, self._see, self._attend = gpu.build_all(
            [
                cuda_latent_attention.append_kernel(shape, kv, dtype),
                gpu_attention.view_kernel(0, 0, False, PAGE_SIZE),
                gpu_latent_attention.attend_kernel(shape, kv, dtype),
            ]
        )

    def attend(self, q_latent: np.ndarray, q_rope: np.ndarray, *rest: np.ndarray) -> None:
        positions, row_offsets, page_offsets, page_ids, kv_lengths, pages, out = rest
        view = np.full((len(q_latent), gpu_attention.VIEW_COLUMNS), -1, "int32")
        self._see(positions, row_offsets, page_offsets, kv_lengths, np.zeros_like(kv_lengths), view)
        partial = np.full(gpu_latent_attention.partial_shape(self.shape), np.nan, "float32")
        self._attend(q_latent, q_rope, view, page_ids, pages, out, partial)
        self.split = not np.isnan(partial).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "format", "order", "whole", "parts"),
    [
        # A prompt, the end of one, no new token, a single one; then parts of contexts, some empty.
        (
            SMALL,
            "float32",
            "float32",
            "random",
            ([33, 70, 9, 1], [33, 7, 0, 1]),
            ([600, 5], [1, 1]),
        ),
        (ODD, "float16", "float32", "forward", ([40, 5], [9, 5]), ([300], [2])),
        (PUBLISHED, "float16", "float16", "random", ([77, 20], [1, 1]), ([300, 40], [1, 1])),
        (FORTY_HEADS, "float32", "float16", "reverse", ([70, 3], [2, 3]), ([300], [1])),
    ],
    ids=["small", "odd", "published", "40-heads"],
)
def test_matches_numpy(shape, dtype, format, order, whole, parts) -> None:
    with CudaEmulation(order) as gpu:
        kernels = Kernels(gpu, shape, format, dtype)
        for lengths, new in (whole, parts):
            batch = LatentBatch(shape, lengths, new)
            batch.round_to(format if dtype == "float32" else dtype)
            result = batch.run(kernels.append, kernels.attend, format, dtype)
            assert reference.relative_error(result, batch.expected()) < ERROR[dtype]
            assert kernels.split == (lengths == parts[0])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_head_has_a_matrix_of_its_own(dtype: str) -> None:
    rng, heads, outputs, inputs = np.random.default_rng(2), 3, 140, 24
    weight = rng.standard_normal((heads, outputs, inputs)).astype(FLOAT_DTYPES[dtype])
    kernel = gpu_latent_attention.head_matmul_kernel(heads, outputs, inputs, dtype, dtype)
    with CudaEmulation("random") as gpu:
        run = gpu.build(kernel)
        for n in (1, 7, 40):  # each by another tile
            x = rng.standard_normal((n, heads, inputs)).astype(FLOAT_DTYPES[dtype])
            out = np.full((n, heads, outputs), np.nan, FLOAT_DTYPES[dtype])
            run(x, weight, out)
            expected = np.einsum("thi,hoi->tho", x.astype("float64"), weight.astype("float64"))
            assert reference.relative_error(out, expected) < ERROR[dtype]
