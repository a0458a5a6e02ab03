"""The kernels of multi-head latent attention on CPUs against float64 NumPy, on scattered pages."""

import functools

import ml_dtypes
import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels import cpu_latent_attention
from relaxlm.compiler.kernels.attention import PAGE_SIZE
from relaxlm.compiler.kernels.cpu_latent_attention import PART, ROUND, LatentShape
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.kv_cache import KV_FORMATS

NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
PORTABLE = tvm.target.Target({"kind": "llvm"})
SHAPE = LatentShape(heads=3, latent=48, rope=16, scale=0.11)


@functools.cache
def build(make, *arguments, native: bool = True):
    target = resolve_device("cpu").tvm_target(2) if native else PORTABLE
    with target:
        function = make(*arguments).with_attr("global_symbol", "kernel")
    module = tvm.IRModule({"kernel": function})
    with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
        return tvm.compile(module, target=target)["kernel"]


def numpy_dtype(name: str) -> np.dtype:
    return NUMPY.get(name, np.dtype(name))


class PagedBatch:
    """Sequences whose last tokens are new, on pages in random order."""

    def __init__(self, shape: LatentShape, lengths: list[int], new: list[int]) -> None:
        rng = np.random.default_rng(11)
        self.shape, self.lengths, self.new = shape, lengths, new
        self.cached = [rng.standard_normal((n, shape.width)).astype("float32") for n in lengths]
        size = (shape.heads, shape.width)
        self.q = [2 * rng.standard_normal((n, *size)).astype("float32") for n in new]
        counts = [-(-n // PAGE_SIZE) for n in lengths]
        self.total = sum(counts) + 3
        numbers = rng.permutation(self.total).astype("int32")
        self.pages = np.split(numbers[: sum(counts)], np.cumsum(counts)[:-1])

    def attend(self, format: str = "float32", dtype: str = "float32", native: bool = True):
        """Append everything, then the new tokens' results [new tokens, heads, latent]."""
        shape, kv = self.shape, KV_FORMATS[format]
        # What was never written may be anything.
        pages = np.full((self.total, PAGE_SIZE, shape.width), np.nan).astype(numpy_dtype(format))
        pages = tvm.runtime.tensor(pages)
        slots = np.concatenate(
            [
                own[np.arange(n) // PAGE_SIZE] * PAGE_SIZE + np.arange(n) % PAGE_SIZE
                for n, own in zip(self.lengths, self.pages, strict=True)
            ]
        )
        cached = np.concatenate(self.cached).astype(dtype)
        build(cpu_latent_attention.append_kernel, shape, kv, dtype, native=native)(
            *map(
                tvm.runtime.tensor,
                (
                    np.ascontiguousarray(cached[:, : shape.latent]),
                    np.ascontiguousarray(cached[:, shape.latent :]),
                    slots.astype("int32"),
                ),
            ),
            pages,
        )
        q = np.concatenate(self.q).astype(dtype)
        positions = [np.arange(n - m, n) for n, m in zip(self.lengths, self.new, strict=True)]
        arrays = (
            np.ascontiguousarray(q[..., : shape.latent]),
            np.ascontiguousarray(q[..., shape.latent :]),
            np.concatenate(positions).astype("int32"),
            np.cumsum([0, *self.new]).astype("int32"),
            np.cumsum([0, *map(len, self.pages)]).astype("int32"),
            np.concatenate(self.pages).astype("int32"),
            np.array(self.lengths, "int32"),
        )
        out = tvm.runtime.tensor(np.full((len(q), shape.heads, shape.latent), 7, dtype))
        kernel = build(cpu_latent_attention.attend_kernel, shape, kv, dtype, native=native)
        kernel(*map(tvm.runtime.tensor, arrays), pages, out)
        return out.numpy()

    def expected(self, format: str = "float32") -> np.ndarray:
        results = []
        for cached, q, n in zip(self.cached, self.q, self.lengths, strict=True):
            stored = cached.astype(numpy_dtype(format)).astype("float64")
            scores = np.einsum("thd,sd->hts", q.astype("float64"), stored) * self.shape.scale
            visible = np.arange(n) <= np.arange(n - len(q), n)[:, None]
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            results.append(np.einsum("hts,sd->thd", weights, stored[:, : self.shape.latent]))
        return np.concatenate(results)


@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        ([1], [1]),
        ([PAGE_SIZE], [PAGE_SIZE]),
        ([PAGE_SIZE + 1, ROUND, 5], [1, 1, 5]),
        ([40, 3, 77, 33], [7, 1, 77, 2]),
        ([2 * PART + 9, 17, PART], [1, 1, 1]),
        ([2 * PART + 9], [PART + 21]),
        ([300, 250], [300, 11]),
    ],
)
def test_matches_numpy(lengths, new):
    batch = PagedBatch(SHAPE, lengths, new)
    np.testing.assert_allclose(batch.attend(), batch.expected(), rtol=2e-5, atol=2e-6)


def test_matches_numpy_on_any_cpu():
    batch = PagedBatch(SHAPE, [PART + 40, 19], [3, 19])
    out = batch.attend(native=False)
    np.testing.assert_allclose(out, batch.expected(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_reads_what_the_cache_keeps(format):
    batch = PagedBatch(SHAPE, [70, 21], [1, 21])
    out = batch.attend(format)
    np.testing.assert_allclose(out, batch.expected(format), rtol=2e-5, atol=2e-6)


def test_sizes_of_the_published_models():
    shape = LatentShape(heads=16, latent=512, rope=64, scale=192**-0.5)
    batch = PagedBatch(shape, [PART + 70, 30], [1, 2])
    np.testing.assert_allclose(batch.attend(), batch.expected(), rtol=5e-5, atol=5e-6)


def test_rows_do_not_depend_on_the_rest_of_the_step():
    whole = PagedBatch(SHAPE, [2 * PART + 30], [PART + 90])
    all_rows = whole.attend()
    last = PagedBatch(SHAPE, [2 * PART + 30], [PART + 90])
    last.new, last.q = [2], [last.q[0][-2:]]
    np.testing.assert_array_equal(last.attend(), all_rows[-2:])


@pytest.mark.parametrize(
    ("n", "heads", "outputs", "inputs", "stored"),
    [(1, 3, 48, 16, "float32"), (7, 2, 24, 64, "float16"), (6, 4, 130, 24, "bfloat16")],
)
def test_head_matmul(n, heads, outputs, inputs, stored):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((n, heads, inputs)).astype("float32")
    weight = rng.standard_normal((heads, outputs, inputs)).astype(numpy_dtype(stored))
    kernel = build(
        cpu_latent_attention.head_matmul_kernel, heads, outputs, inputs, stored, "float32"
    )
    out = tvm.runtime.tensor(np.full((n, heads, outputs), 7, "float32"))
    kernel(tvm.runtime.tensor(x), tvm.runtime.tensor(weight), out)
    expected = np.einsum("thi,hoi->tho", x.astype("float64"), weight.astype("float64"))
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-5)
