"""The CUDA attention kernels against NumPy, run by the emulation, and compiled by nvcc."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from relaxlm.compiler.cuda import check_device_code, cuda_compilation
from relaxlm.compiler.kernels import cuda_attention, cuda_rope
from relaxlm.compiler.kernels.attention import AttentionShape, page_tensors
from relaxlm.compiler.link import export_library
from relaxlm.compiler.target import resolve_device
from relaxlm.errors import UnsupportedError
from relaxlm.quantization.kv_cache import KV_FORMATS, KVFormat
from tests import reference
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler, needs_cpu_memory
from tests.compiler.test_cuda import needs_nvcc

BF16 = np.dtype(ml_dtypes.bfloat16)
PAGE = 16


def as_dtype(name: str) -> np.dtype:
    return BF16 if name == "bfloat16" else np.dtype(name)


def attend_kernel(shape: AttentionShape, format: KVFormat, dtype: str) -> tirx.PrimFunc:
    return cuda_attention.attend_kernel(shape, format, dtype, 99 << 10)


def offsets(parts: list) -> np.ndarray:
    return np.cumsum([0, *map(len, parts)]).astype("int32")


class Batch:
    """Sequences whose last tokens are new, on pages in random order; other slots hold NaN."""

    def __init__(
        self, shape: AttentionShape, format: KVFormat, lengths: list[int], new: list[int]
    ) -> None:
        rng = np.random.default_rng(11)
        self.shape, self.format = shape, format
        normal = lambda n, heads: rng.standard_normal((n, heads, shape.head_dim)).astype("float32")  # noqa: E731
        self.k = [normal(n, shape.kv_heads) for n in lengths]
        self.v = [normal(n, shape.kv_heads) for n in lengths]
        self.q = [normal(n, shape.q_heads) for n in new]
        self.positions = [np.arange(n - m, n) for n, m in zip(lengths, new, strict=True)]
        counts = [-(-n // PAGE) for n in lengths]
        order = rng.permutation(sum(counts) + 3).astype("int32")
        self.pages = np.split(order[: sum(counts)], np.cumsum(counts)[:-1])
        self.slots = np.concatenate(
            [
                pages[np.arange(n) // PAGE] * PAGE + np.arange(n) % PAGE
                for n, pages in zip(lengths, self.pages, strict=True)
            ]
        ).astype("int32")
        self.tensors = [
            np.full((len(order), *tensor.page_shape), 0x7F)
            if tensor.dtype == "uint8"
            else np.full((len(order), *tensor.page_shape), np.nan)
            for tensor in page_tensors(shape, format)
        ]
        self.tensors = [
            tensor.astype(as_dtype(kind.dtype))
            for tensor, kind in zip(self.tensors, page_tensors(shape, format), strict=True)
        ]
        # From nothing at all to more than all tokens together.
        logits = rng.permutation(np.linspace(-9, 9, shape.q_heads)).astype("float32")
        self.sink_logits = [logits] if shape.sink_logits else []
        # From what hides all but neighbours to what hardly shows.
        slopes = rng.permutation(np.geomspace(0.9, 2e-3, shape.q_heads)).astype("float32")
        self.slopes = [slopes] if shape.alibi else []

    def stored(self, dtype: str) -> list[np.ndarray]:
        """The page tensors as they should be after appending everything, computed in NumPy."""
        tensors = [tensor.copy() for tensor in self.tensors]
        page, slot = self.slots // PAGE, self.slots % PAGE
        for index, new in enumerate((self.k, self.v)):
            values = np.concatenate(new).astype(as_dtype(dtype)).astype("float32")
            codes, scales = self.format.quantize(values)
            tensors[index][page, :, slot] = codes
            if scales is not None:
                tensors[2 + index][page, :, slot] = scales
        return tensors

    def attend(self, kernel, dtype: str, dropped_pages: int = 0) -> np.ndarray:
        """Run a kernel, leaving `dropped_pages` between sinks and window out of every table."""
        sink_pages = -(-self.shape.sinks // PAGE)
        tables = [
            np.concatenate([pages[:sink_pages], pages[sink_pages + dropped_pages :]])
            for pages in self.pages
        ]
        q = np.concatenate(self.q).astype(as_dtype(dtype))
        out = np.full(q.shape, np.nan, q.dtype)
        kernel(
            q,
            np.concatenate(self.positions).astype("int32"),
            offsets(self.q),
            offsets(tables),
            np.concatenate(tables),
            np.array([len(k) - dropped_pages * PAGE for k in self.k], "int32"),
            np.full(len(self.k), dropped_pages * PAGE, "int32"),
            *self.stored(dtype),
            *self.sink_logits,
            *self.slopes,
            out,
        )
        return out.astype("float32")

    def expected(self, dtype: str) -> np.ndarray:
        """float64 attention over what the format keeps of keys and values."""

        def rounded(x: np.ndarray) -> np.ndarray:
            return x.astype(as_dtype(dtype)).astype("float32")

        def kept(x: np.ndarray) -> np.ndarray:
            return self.format.dequantize(*self.format.quantize(rounded(x)))

        shape = self.shape
        logits = self.sink_logits[0] if self.sink_logits else None
        slopes = self.slopes[0] if self.slopes else None
        return np.concatenate(
            [
                reference.attention(
                    rounded(q),
                    kept(k),
                    kept(v),
                    at,
                    shape.scale,
                    shape.window,
                    shape.sinks,
                    shape.cap,
                    logits,
                    shape.chunked,
                    slopes,
                )
                for q, k, v, at in zip(self.q, self.k, self.v, self.positions, strict=True)
            ]
        )


@pytest.fixture(params=["forward"])
def cuda(request: pytest.FixtureRequest) -> Iterator[CudaEmulation]:
    with CudaEmulation(request.param) as emulation:
        yield emulation


# What the output's own rounding costs, with some room.
ERROR = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}


@needs_compiler
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "format", "cuda"),
    [
        ((6, 2), 64, "float16", "float16", "reverse"),
        ((4, 4), 24, "float32", "float32", "random"),
        ((3, 1), 8, "bfloat16", "bfloat16", "forward"),
        ((6, 2), 64, "float16", "float8_e4m3", "random"),
        ((4, 2), 80, "float32", "float16", "forward"),
        ((4, 4), 96, "float16", "float16", "reverse"),
        ((4, 1), 80, "bfloat16", "bfloat16", "random"),
        ((2, 1), 256, "float16", "float16", "forward"),
        ((40, 2), 128, "float32", "float32", "forward"),  # 20 heads per KV head: several blocks
    ],
    ids=["gqa", "mha-24", "mqa-bf16", "fp8", "f32-on-f16", "96", "80", "256", "large-group"],
    indirect=["cuda"],
)
def test_attention_over_pages(
    cuda: CudaEmulation, heads: tuple[int, int], head_dim: int, dtype: str, format: str
) -> None:
    shape = AttentionShape(*heads, head_dim, window=0, sinks=0, scale=0.9 * head_dim**-0.5)
    # A sequence without new tokens, a whole prompt, single tokens, and the end of a prompt.
    batch = Batch(shape, KV_FORMATS[format], lengths=[1, 17, 20, 70, 33], new=[1, 17, 0, 1, 5])
    kernel = cuda.build(attend_kernel(shape, KV_FORMATS[format], dtype))
    result = batch.attend(kernel, dtype)
    assert np.isfinite(result).all()
    assert reference.relative_error(result, batch.expected(dtype)) < ERROR[dtype]


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "format", "change", "cuda"),
    [
        ("float16", "float16", {}, "random"),
        ("bfloat16", "float8_e4m3", {"sink_logits": True}, "reverse"),
        ("float16", "float32", {"window": 200, "sinks": 20, "cap": 2.0}, "forward"),
        ("float32", "float32", {"sink_logits": True}, "random"),
        ("float16", "float16", {"window": 128, "chunked": True}, "forward"),
        ("float16", "float8_e4m3", {"alibi": True}, "random"),
    ],
    ids=["plain", "fp8-sink", "window-cap", "float32", "chunked", "alibi"],
    indirect=["cuda"],
)
def test_single_tokens_share_out_long_contexts(
    cuda: CudaEmulation, dtype: str, format: str, change: dict
) -> None:
    shape = replace(AttentionShape(6, 2, 32, window=0, sinks=0, scale=0.4), **change)
    # Parts that are longer than the shortest context: some have nothing to do.
    batch = Batch(shape, KV_FORMATS[format], lengths=[500, 3, 270], new=[1, 1, 1])
    kernel = cuda.build(attend_kernel(shape, KV_FORMATS[format], dtype))
    result = batch.attend(kernel, dtype)
    expected = batch.expected(dtype)
    for row in range(3):
        assert reference.relative_error(result[row], expected[row]) < ERROR[dtype]


@needs_compiler
@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("float16", {"cap": 1.5}),
        ("float8_e4m3", {"sink_logits": True}),
        ("float32", {"cap": 3.0, "sink_logits": True, "window": 20}),
    ],
    ids=["cap", "sink", "both-window"],
)
def test_capped_scores_and_sink_logits(cuda: CudaEmulation, format: str, change: dict) -> None:
    shape = replace(AttentionShape(6, 2, 16, window=0, sinks=0, scale=0.5), **change)
    batch = Batch(shape, KV_FORMATS[format], lengths=[1, 70, 9], new=[1, 3, 9])
    # Scores far beyond the cap, and beyond what an exponential takes.
    batch.q[2][:4] *= np.array([5, 50, 500, -500], "float32")[:, None, None]
    kernel = cuda.build(attend_kernel(shape, KV_FORMATS[format], "float32"))
    result = batch.attend(kernel, "float32")
    assert reference.relative_error(result, batch.expected("float32")) < 4e-6


@needs_compiler
@pytest.mark.parametrize(
    ("heads", "dtype", "format", "change"),
    [
        ((6, 2), "float16", "float16", {}),
        ((6, 1), "float16", "float8_e4m3", {"window": 33, "sinks": 20}),
        ((6, 2), "float32", "float16", {"window": 33, "sinks": 20}),
        ((3, 3), "float32", "float32", {}),
    ],
    ids=["half", "half-window", "float32-window", "float32"],
)
def test_biases_by_distance(
    cuda: CudaEmulation, heads: tuple[int, int], dtype: str, format: str, change: dict
) -> None:
    shape = AttentionShape(*heads, 32, window=0, sinks=0, scale=0.3, alibi=True)
    shape = replace(shape, **change)
    # Tokens behind those that are gone keep their distances.
    batch = Batch(shape, KV_FORMATS[format], lengths=[90, 100], new=[1, 19])
    kernel = cuda.build(attend_kernel(shape, KV_FORMATS[format], dtype))
    result = batch.attend(kernel, dtype, dropped_pages=1 if shape.window else 0)
    assert reference.relative_error(result, batch.expected(dtype)) < ERROR[dtype]


@needs_compiler
@pytest.mark.parametrize(
    ("window", "sinks", "dtype"),
    [
        *((5, 0, "float32"), (20, 4, "float32"), (33, 20, "float32")),
        *((20, 4, "float16"), (33, 20, "float16")),
    ],
)
def test_sliding_window_with_sinks(
    cuda: CudaEmulation, window: int, sinks: int, dtype: str
) -> None:
    shape = AttentionShape(4, 2, 16, window, sinks, scale=0.25)
    batch = Batch(shape, KV_FORMATS["float32"], lengths=[150, 131, 3, 30], new=[6, 1, 3, 2])
    kernel = cuda.build(attend_kernel(shape, KV_FORMATS["float32"], dtype))
    expected = batch.expected(dtype)
    assert reference.relative_error(batch.attend(kernel, dtype), expected) < ERROR[dtype]
    # Leaving out pages that no query can see any more changes nothing.
    for part in ("k", "v", "q", "positions", "pages"):
        setattr(batch, part, getattr(batch, part)[:2])
    batch.slots = batch.slots[: 150 + 131]
    result = batch.attend(kernel, dtype, dropped_pages=3)
    assert reference.relative_error(result, expected[: 6 + 1]) < ERROR[dtype]


@needs_compiler
@pytest.mark.parametrize(
    ("head_dim", "dtype", "format", "cuda"),
    [
        (64, "float16", "float16", "forward"),
        (24, "float32", "float16", "reverse"),
        (40, "float32", "float8_e4m3", "random"),
        (128, "bfloat16", "float8_e4m3", "forward"),
    ],
    indirect=["cuda"],
)
def test_append_stores_what_the_reference_stores(
    cuda: CudaEmulation, head_dim: int, dtype: str, format: str
) -> None:
    shape = AttentionShape(4, 2, head_dim, window=0, sinks=0, scale=1.0)
    batch = Batch(shape, KV_FORMATS[format], lengths=[19, 5], new=[19, 5])
    batch.k[0][3] = 0  # a vector of zeros has no scale of its own
    expected = batch.stored(dtype)
    k, v = (np.concatenate(x).astype(as_dtype(dtype)) for x in (batch.k, batch.v))
    kernel = cuda.build(cuda_rope.append_kernel(shape, KV_FORMATS[format], dtype))
    kernel(k, v, batch.slots, *batch.tensors)
    for ours, theirs in zip(batch.tensors, expected, strict=True):
        np.testing.assert_array_equal(
            ours.view(f"uint{8 * ours.itemsize}"), theirs.view(f"uint{8 * theirs.itemsize}")
        )


@needs_compiler
@needs_cpu_memory
def test_kernels_from_relax_write_pages_in_place(cuda: CudaEmulation) -> None:
    shape = AttentionShape(4, 2, 32, window=0, sinks=0, scale=0.2)
    format, dtype = KV_FORMATS["float16"], "float16"
    batch = Batch(shape, format, lengths=[21, 40], new=[21, 40])
    builder = relax.BlockBuilder()
    n, b, p, pages = (tirx.Var(name, "int64") for name in ("n", "b", "p", "pages"))
    page = relax.TensorType((pages, 2, PAGE, 32), dtype)
    types = {
        "q": relax.TensorType((n, 4, 32), dtype),
        "k": relax.TensorType((n, 2, 32), dtype),
        "v": relax.TensorType((n, 2, 32), dtype),
        "positions": relax.TensorType((n,), "int32"),
        "slots": relax.TensorType((n,), "int32"),
        "row_offsets": relax.TensorType((b + 1,), "int32"),
        "page_offsets": relax.TensorType((b + 1,), "int32"),
        "page_ids": relax.TensorType((p,), "int32"),
        "kv_lengths": relax.TensorType((b,), "int32"),
        "dropped": relax.TensorType((b,), "int32"),
        "k_pages": page,
        "v_pages": page,
    }
    at = {name: relax.Var(name, type) for name, type in types.items()}
    append = builder.add_func(cuda_rope.append_kernel(shape, format, dtype), "append")
    attend = builder.add_func(attend_kernel(shape, format, dtype), "attend")
    with builder.function("main", list(at.values())):
        with builder.dataflow():
            stored = builder.emit(
                relax.call_tir_inplace(
                    append,
                    [at["k"], at["v"], at["slots"], at["k_pages"], at["v_pages"]],
                    [3, 4],
                    [page, page],
                )
            )
            k_pages = builder.emit(relax.TupleGetItem(stored, 0))
            v_pages = builder.emit(relax.TupleGetItem(stored, 1))
            tables = [at[name] for name in list(types)[5:10]]
            out = builder.emit_output(
                relax.call_tir(
                    attend,
                    [at["q"], at["positions"], *tables, k_pages, v_pages],
                    relax.TensorType((n, 4, 32), dtype),
                )
            )
        builder.emit_func_output(out)

    module = tvm.compile(builder.finalize(), target=cuda.target).mod
    machine = relax.VirtualMachine(module, tvm.cuda())
    caches = [cuda.tensor(tensor) for tensor in batch.tensors]
    result = machine["main"](
        *(cuda.tensor(np.concatenate(x).astype("float16")) for x in (batch.q, batch.k, batch.v)),
        cuda.tensor(np.concatenate(batch.positions).astype("int32")),
        cuda.tensor(batch.slots),
        cuda.tensor(offsets(batch.q)),
        cuda.tensor(offsets(list(batch.pages))),
        cuda.tensor(np.concatenate(batch.pages)),
        cuda.tensor(np.array([21, 40], "int32")),
        cuda.tensor(np.zeros(2, "int32")),
        *caches,
    )
    assert reference.relative_error(result.numpy(), batch.expected(dtype)) < ERROR[dtype]
    for cache, expected in zip(caches, batch.stored(dtype), strict=True):
        np.testing.assert_array_equal(cache.numpy(), expected)


@needs_nvcc
def test_kernels_compile_to_machine_code_in_registers(tmp_path: Path) -> None:
    target = resolve_device("cuda", "sm_80")
    functions = {}
    for dtype, format, alibi in [
        ("float16", "float16", False),
        ("bfloat16", "float8_e4m3", False),
        ("float32", "float32", False),
        ("float16", "float16", True),
        ("float32", "float32", True),
    ]:
        shape = AttentionShape(32, 8, 128, window=64, sinks=4, scale=0.1, alibi=alibi)
        for kind in (attend_kernel,) if alibi else (cuda_rope.append_kernel, attend_kernel):
            name = f"{kind.__name__}_{dtype}_{alibi}"
            functions[name] = kind(shape, KV_FORMATS[format], dtype).with_attr(
                "global_symbol", name
            )
    with cuda_compilation(target.arch) as build:
        executable = tvm.compile(tvm.IRModule(functions), target=target.tvm_target())
    library = tmp_path / "kernels.so"
    export_library(executable, library)
    check_device_code(library, target.arch)
    # Of each dtype: append; few and many rows, each with what merges parts, or one such pair.
    assert len(build.reports) == 3 + 4 + 4 + 2 + 4 + 2
    assert [str(report) for report in build.reports if report.stack or report.spill_stores] == []


@pytest.mark.parametrize("limit", [64 << 10, 99 << 10, 227 << 10])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 136, 256])
def test_tiles_fit_into_shared_memory(head_dim: int, limit: int) -> None:
    shape = AttentionShape(8, 2, head_dim, window=0, sinks=0, scale=1.0)
    for format in KV_FORMATS.values():
        for tile in cuda_attention.tiles(shape, format, limit):
            assert tile.shared(head_dim, format.scaled) <= limit


def test_shapes_that_the_kernels_do_not_take() -> None:
    with pytest.raises(UnsupportedError) as refused:
        cuda_attention.check_shape(AttentionShape(8, 8, 288, 0, 0, 1.0))
    assert str(refused.value) == (
        "head_dim = 288 is not supported on cuda: its attention kernels go up to 256"
    )
    with pytest.raises(UnsupportedError) as refused:
        cuda_attention.check_shape(AttentionShape(7, 2, 64, 0, 0, 1.0))
    assert str(refused.value) == (
        "num_attention_heads = 7 is not a multiple of num_key_value_heads = 2"
    )
