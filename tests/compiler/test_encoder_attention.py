"""Attention of encoders against float64 NumPy: texts of any length in one step, on CPU and CUDA."""

import functools
from collections.abc import Iterator
from itertools import pairwise

import ml_dtypes  # noqa: F401  NumPy's bfloat16
import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels import (
    cpu_encoder_attention,
    cuda_encoder_attention,
    gpu_encoder_attention,
)
from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.target import resolve_device
from tests import reference
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.test_cpu_attention import PORTABLE, build, has_feature

# None, one token, full and partly filled pages, several rounds, and blocks of rows.
LENGTHS = [5, 1, 16, 0, 33, 200, 17]


def shape(q_heads: int, kv_heads: int, dim: int) -> AttentionShape:
    return AttentionShape(q_heads, kv_heads, dim, window=0, sinks=0, scale=0.9 * dim**-0.5)


def step(of: AttentionShape, lengths: list[int], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Queries, keys and values of texts, and where each text begins."""
    rng = np.random.default_rng(7)
    offsets = np.cumsum([0, *lengths]).astype("int32")
    qkv = rng.standard_normal((offsets[-1], of.q_heads + 2 * of.kv_heads, of.head_dim))
    return qkv.astype(dtype), offsets


def expected(of: AttentionShape, qkv: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Each text for itself; every token sees what its last one sees."""
    found = []
    for first, end in pairwise(offsets):
        q, k, v = np.split(
            qkv[first:end].astype("float32"), [of.q_heads, of.q_heads + of.kv_heads], axis=1
        )
        last = np.full(end - first, end - first - 1)
        found.append(reference.attention(q, k, v, last, of.scale))
    return np.concatenate(found).reshape(len(qkv), -1)


@functools.cache  # compiling takes a second
def on_cpu(of: AttentionShape, rounded: bool, target: tvm.target.Target):
    with target:
        kernel = cpu_encoder_attention.attend_kernel(of, "float32", rounded)
    return build(kernel, target)


def run(of: AttentionShape, lengths: list[int], rounded: bool, target: tvm.target.Target):
    qkv, offsets = step(of, lengths, "float32")
    out = tvm.runtime.tensor(np.full((len(qkv), of.q_heads * of.head_dim), 7, "float32"))
    on_cpu(of, rounded, target)(*map(tvm.runtime.tensor, (qkv, offsets)), out)
    return out.numpy(), expected(of, qkv, offsets)


@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 24), (2, 2, 64)])
@pytest.mark.parametrize("native", [False, True], ids=["portable", "native"])
def test_texts_of_a_step_on_cpus(heads: tuple[int, int, int], native: bool) -> None:
    target = resolve_device("cpu").tvm_target(2) if native else PORTABLE
    found, exact = run(shape(*heads), LENGTHS, False, target)
    assert reference.relative_error(found, exact) < 2e-6


def test_a_text_does_not_depend_on_the_others_of_its_step() -> None:
    of, target = shape(2, 2, 64), resolve_device("cpu").tvm_target(2)
    together, _ = run(of, [200, 33, 5], False, target)
    alone, _ = run(of, [200], False, target)  # the same random numbers
    np.testing.assert_array_equal(together[:200], alone)


def test_rounded_products_cost_their_rounding() -> None:
    target = resolve_device("cpu").tvm_target(2)
    if not has_feature("avx512bf16", target):
        pytest.skip("this CPU does not multiply bfloat16")
    found, exact = run(shape(2, 2, 64), LENGTHS, True, target)
    assert 1e-4 < reference.relative_error(found, exact) < 1e-2


@pytest.fixture(params=["random"])
def cuda(request: pytest.FixtureRequest) -> Iterator[CudaEmulation]:
    with CudaEmulation(request.param) as emulation:
        yield emulation


@needs_compiler
@pytest.mark.parametrize(
    ("heads", "dtype", "error", "cuda"),
    [
        ((4, 4, 24), "float32", 2e-6, "random"),
        ((6, 2, 64), "float16", 5e-4, "reverse"),
        ((2, 2, 160), "bfloat16", 4e-3, "forward"),
    ],
    ids=["f32", "gqa-f16", "wide-bf16"],
    indirect=["cuda"],
)
def test_texts_of_a_step_on_cuda(
    cuda: CudaEmulation, heads: tuple[int, int, int], dtype: str, error: float
) -> None:
    of = shape(*heads)
    qkv, offsets = step(of, [5, 1, 0, 17, 40], dtype)
    out = np.full((len(qkv), of.q_heads * of.head_dim), 7, dtype)
    cuda.build(cuda_encoder_attention.attend_kernel(of, dtype))(qkv, offsets, out)
    assert reference.relative_error(out.astype("float32"), expected(of, qkv, offsets)) < error


@needs_compiler
@pytest.mark.parametrize(
    ("heads", "dtype", "error", "cuda"),
    [
        ((4, 4, 24), "float32", 2e-6, "forward"),
        ((6, 2, 64), "float16", 5e-4, "reverse"),
        ((2, 1, 160), "float32", 2e-6, "random"),
    ],
    ids=["f32", "gqa-f16", "wide"],
    indirect=["cuda"],
)
def test_texts_of_a_step_on_plain_gpus(
    cuda: CudaEmulation, heads: tuple[int, int, int], dtype: str, error: float
) -> None:
    """Their kernels are loop nests that TVM also compiles for CUDA."""
    of = shape(*heads)
    # Several texts in a tile of queries, and a text in several tiles.
    qkv, offsets = step(of, [5, 1, 0, 17, 40, 3], dtype)
    qkv *= np.linspace(1, 6, len(qkv), dtype=dtype)[:, None, None]  # scores that keep on growing
    out = np.full((len(qkv), of.q_heads * of.head_dim), 7, dtype)
    view = np.full((len(qkv), 2), -1, "int32")
    see, attend = cuda.build_all(
        [gpu_encoder_attention.view_kernel(), gpu_encoder_attention.attend_kernel(of, dtype)]
    )
    see(offsets, view)
    attend(qkv, view, out)
    assert reference.relative_error(out.astype("float32"), expected(of, qkv, offsets)) < error
