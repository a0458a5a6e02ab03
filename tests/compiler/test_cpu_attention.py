"""The CPU attention kernels against float64 NumPy, on pages scattered at random."""

import functools

import ml_dtypes
import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels import cpu_attention
from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.cpu_float8 import decode_e4m3, encode_e4m3
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.kv_cache import KV_FORMATS, KVFormat
from tests import reference

NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


PORTABLE = tvm.target.Target({"kind": "llvm"})


def has_feature(name: str, target: tvm.target.Target) -> bool:
    return bool(tvm.target.codegen.target_has_features(name, target))


def build(function: tvm.tirx.PrimFunc, target: tvm.target.Target = PORTABLE):
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    # The pass finds nothing to shrink in our kernels, and takes longer than all others together.
    with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
        return tvm.compile(module, target=target)["kernel"]


@functools.cache  # compiling takes a second
def build_append(heads: int, head_dim: int, format: KVFormat, dtype: str):
    shape = AttentionShape(heads, heads, head_dim, window=0, sinks=0, scale=0.0)
    return build(cpu_attention.append_kernel(shape, format, dtype))


@functools.cache
def build_attend(
    shape: AttentionShape, format: KVFormat, dtype: str, rounded: bool, target: tvm.target.Target
):
    with target:
        kernel = cpu_attention.attend_kernel(shape, format, dtype, rounded)
    return build(kernel, target)


class PagedBatch:
    """Sequences whose last tokens are new, laid out on pages in random order as a runtime would."""

    def __init__(self, shape: AttentionShape, format: KVFormat, lengths, new, dtype="float32"):
        rng = np.random.default_rng(7)
        self.shape, self.format, page = shape, format, shape.page_size
        heads, dim = shape.kv_heads, shape.head_dim
        self.k = [rng.standard_normal((n, heads, dim)).astype("float32") for n in lengths]
        self.v = [rng.standard_normal((n, heads, dim)).astype("float32") for n in lengths]
        self.q = [rng.standard_normal((n, shape.q_heads, dim)).astype("float32") for n in new]
        self.positions = [np.arange(n - m, n) for n, m in zip(lengths, new, strict=True)]
        counts = [-(-n // page) for n in lengths]
        pages = rng.permutation(sum(counts) + 3).astype("int32")
        self.pages = [pages[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
        self.tensors = []
        for tensor in cpu_attention.page_tensors(shape, format):
            dtype_ = NUMPY.get(tensor.dtype, tensor.dtype)
            # Garbage in what was never written must not matter, short of NaN.
            garbage = rng.integers(1, 100, (sum(counts) + 3, *tensor.page_shape)).astype(dtype_)
            self.tensors.append(tvm.runtime.tensor(garbage))
        append = build_append(heads, dim, format, dtype)
        slots = np.concatenate(
            [
                pages[np.arange(n) // page] * page + np.arange(n) % page
                for n, pages in zip(lengths, self.pages, strict=True)
            ]
        ).astype("int32")
        append(
            *(tvm.runtime.tensor(np.concatenate(x).astype(dtype)) for x in (self.k, self.v)),
            tvm.runtime.tensor(slots),
            *self.tensors,
        )
        # From nothing at all to more than all tokens together.
        logits = rng.permutation(np.linspace(-9, 9, shape.q_heads)).astype("float32")
        self.sink_logits = [logits] if shape.sink_logits else []
        # From what hides all but neighbours to what hardly shows.
        slopes = rng.permutation(np.geomspace(0.9, 2e-3, shape.q_heads)).astype("float32")
        self.slopes = [slopes] if shape.alibi else []

    def attend(
        self,
        dropped_pages: int = 0,
        dtype: str = "float32",
        target: tvm.target.Target = PORTABLE,
        rounded: bool = False,
    ) -> np.ndarray:
        """Run the kernel, leaving `dropped_pages` between sinks and window out of every table."""
        page = self.shape.page_size
        sink_pages = -(-self.shape.sinks // page)
        tables = [
            np.concatenate([pages[:sink_pages], pages[sink_pages + dropped_pages :]])
            for pages in self.pages
        ]
        offsets = lambda parts: np.cumsum([0, *map(len, parts)]).astype("int32")  # noqa: E731
        lengths = [len(k) - dropped_pages * page for k in self.k]
        q = np.concatenate(self.q).astype(dtype)
        out = tvm.runtime.tensor(np.full(q.shape, 7, dtype))
        build_attend(self.shape, self.format, dtype, rounded, target)(
            *(
                tvm.runtime.tensor(array)
                for array in (
                    q,
                    np.concatenate(self.positions).astype("int32"),
                    offsets(self.q),
                    offsets(tables),
                    np.concatenate(tables).astype("int32"),
                    np.array(lengths, "int32"),
                    np.full(len(lengths), dropped_pages * page, "int32"),
                )
            ),
            *self.tensors,
            *map(tvm.runtime.tensor, [*self.sink_logits, *self.slopes]),
            out,
        )
        return out.numpy()

    def expected(self) -> np.ndarray:
        """float64 attention over what the format keeps of keys and values."""
        keep = lambda x: self.format.dequantize(*self.format.quantize(x))  # noqa: E731
        shape = self.shape
        logits = self.sink_logits[0] if self.sink_logits else None
        slopes = self.slopes[0] if self.slopes else None
        return np.concatenate(
            [
                reference.attention(
                    q,
                    keep(k),
                    keep(v),
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


@pytest.mark.parametrize(
    ("heads", "format"),
    [
        ((4, 4), "float32"),
        ((6, 2), "float16"),
        ((3, 1), "bfloat16"),
        ((6, 2), "float8_e4m3"),
    ],
    ids=str,
)
def test_attention_over_pages(heads: tuple[int, int], format: str) -> None:
    shape = AttentionShape(*heads, head_dim=24, window=0, sinks=0, scale=0.21)
    batch = PagedBatch(shape, KV_FORMATS[format], [1, 16, 17, 70, 33], [1, 16, 1, 40, 3])
    np.testing.assert_allclose(batch.attend(), batch.expected(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("head_dim", [8, 20])
def test_head_sizes(head_dim: int) -> None:
    shape = AttentionShape(4, 2, head_dim, window=0, sinks=0, scale=head_dim**-0.5)
    batch = PagedBatch(shape, KV_FORMATS["float32"], lengths=[37, 5], new=[20, 5])
    np.testing.assert_allclose(batch.attend(), batch.expected(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("heads", "head_dim", "format", "native"),
    [
        ((14, 2), 64, "float16", True),
        ((15, 3), 20, "float32", False),
        ((17, 1), 80, "bfloat16", True),  # more heads than fit into registers at once
        ((17, 1), 16, "bfloat16", False),
        ((4, 4), 128, "float8_e4m3", True),
    ],
    ids=str,
)
def test_decodes_and_prompts_in_one_step(
    heads: tuple[int, int], head_dim: int, format: str, native: bool
) -> None:
    target = resolve_device("cpu").tvm_target() if native else PORTABLE
    shape = AttentionShape(*heads, head_dim, window=0, sinks=0, scale=head_dim**-0.5)
    # Contexts of one part and of many; prompts around a whole number of blocks, and in the middle.
    lengths, new = [1, 300, 131, 97, 255, 1100, 2], [1, 1, 13, 97, 1, 1, 2]
    batch = PagedBatch(shape, KV_FORMATS[format], lengths, new)
    np.testing.assert_allclose(batch.attend(target=target), batch.expected(), rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize(
    ("features", "bound"),
    [(("amx-tile", "amx-bf16", "avx512bf16"), 4e-3), (("avx512bf16",), 4e-3)],
    ids=["tiles", "pairs"],
)
@pytest.mark.parametrize(
    ("heads", "head_dim", "format", "window", "sinks"),
    [((14, 2), 64, "float16", 0, 0), ((6, 2), 32, "float8_e4m3", 40, 20)],
    ids=str,
)
def test_rounded_prompts(features, bound, heads, head_dim, format, window, sinks) -> None:
    device = resolve_device("cpu")
    missing = [name for name in features if not has_feature(name, device.tvm_target())]
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    target = device.tvm_target()
    if "amx-tile" not in features:
        target = tvm.target.Target({"kind": "llvm", "mcpu": "znver4"})
    q_heads, kv_heads = heads
    shape = AttentionShape(q_heads, kv_heads, head_dim, window, sinks, head_dim**-0.5)
    # Single rows, few rows over a context in parts, several tasks of many, a whole short prompt.
    batch = PagedBatch(shape, KV_FORMATS[format], [400, 600, 700, 33], [1, 5, 300, 33])
    found, expected = batch.attend(target=target, rounded=True), batch.expected()
    # A rounding to bfloat16 is up to 2 ** -9, of q, keys, values and weights; they average out.
    assert reference.relative_error(found, expected) < bound
    assert np.abs(found - expected).max() < 4 * bound * np.abs(expected).max()
    assert reference.relative_error(found[:1], expected[:1]) < 1e-5
    if window == 0:
        assert not np.array_equal(found[1:], batch.attend(target=target)[1:])


@pytest.mark.parametrize(
    ("features", "format", "window", "change"),
    [
        ((), "float32", 0, {"cap": 1.5}),
        ((), "float8_e4m3", 0, {"sink_logits": True}),
        ((), "float16", 40, {"cap": 3.0, "sink_logits": True}),
        (("amx-tile", "amx-bf16", "avx512bf16"), "float16", 0, {"cap": 2.0, "sink_logits": True}),
        (("avx512bf16",), "float8_e4m3", 40, {"cap": 2.0, "sink_logits": True}),
    ],
    ids=str,
)
def test_capped_scores_and_sink_logits(features, format, window, change) -> None:
    native = resolve_device("cpu").tvm_target()
    if missing := [name for name in features if not has_feature(name, native)]:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    target = native if "amx-tile" in features else PORTABLE
    if features == ("avx512bf16",):
        target = tvm.target.Target({"kind": "llvm", "mcpu": "znver4"})
    shape = AttentionShape(6, 2, 32, window, 0, scale=0.5, **change)
    # One part and many, single rows and several, prompts of one block and of more.
    batch = PagedBatch(shape, KV_FORMATS[format], [1, 900, 700, 33], [1, 1, 5, 33])
    # Scores far beyond the cap, and beyond what an exponential takes.
    batch.q[3][:4] *= np.array([5, 50, 500, -500], "float32")[:, None, None]
    found = batch.attend(target=target, rounded=bool(features))
    expected = batch.expected()
    if not features:
        np.testing.assert_allclose(found, expected, rtol=5e-5, atol=5e-6)
        return
    np.testing.assert_allclose(found[:2], expected[:2], rtol=5e-5, atol=5e-6)
    assert reference.relative_error(found, expected) < 4e-3


@pytest.mark.parametrize(
    ("features", "heads", "format", "window", "change"),
    [
        ((), (6, 2), "float16", 0, {}),
        ((), (7, 1), "float8_e4m3", 40, {"sinks": 20}),
        ((), (3, 3), "float32", 128, {"chunked": True, "sink_logits": True}),
        (("amx-tile", "amx-bf16", "avx512bf16"), (6, 2), "float16", 0, {}),
        (("avx512bf16",), (6, 2), "float8_e4m3", 40, {"sinks": 20}),
    ],
    ids=str,
)
def test_biases_by_distance(features, heads, format, window, change) -> None:
    native = resolve_device("cpu").tvm_target()
    if missing := [name for name in features if not has_feature(name, native)]:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    target = native if "amx-tile" in features else PORTABLE
    if features == ("avx512bf16",):
        target = tvm.target.Target({"kind": "llvm", "mcpu": "znver4"})
    change = {"sinks": 0, **change}
    shape = AttentionShape(*heads, 32, window, scale=0.2, alibi=True, **change)
    # One part and many, single rows and several, prompts of one block and of more.
    batch = PagedBatch(shape, KV_FORMATS[format], [1, 900, 700, 333], [1, 1, 5, 333])
    found = batch.attend(target=target, rounded=bool(features))
    expected = batch.expected()
    if features:
        assert reference.relative_error(found, expected) < 4e-3
        return
    np.testing.assert_allclose(found, expected, rtol=5e-5, atol=5e-6)
    if window == 40:  # tokens behind those that are gone keep their distances
        late = PagedBatch(shape, KV_FORMATS[format], [300, 700], [1, 5])
        np.testing.assert_allclose(late.attend(12), late.expected(), rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("new", [1, 2, 16], ids=str)
@pytest.mark.parametrize("sink_logits", [False, True], ids=["plain", "sink"])
def test_one_long_context_in_parts(new: int, sink_logits: bool) -> None:
    shape = AttentionShape(4, 2, 16, 0, 0, scale=0.25, sink_logits=sink_logits)
    batch = PagedBatch(shape, KV_FORMATS["float32"], lengths=[2500], new=[new])
    # Scores of growing size: every part has to be rescaled when parts are merged.
    batch.q = [q * np.linspace(1, 8, 4, dtype="float32")[None, :, None] for q in batch.q]
    np.testing.assert_allclose(batch.attend(), batch.expected(), rtol=3e-5, atol=3e-6)


def test_the_workspace_covers_what_the_kernel_declares() -> None:
    shape = AttentionShape(14, 2, 64, window=0, sinks=0, scale=0.125)
    exact, rounded, batched = (
        cpu_attention.attend_workspace_bytes(
            shape, KV_FORMATS["float16"], batch=batch, threads=2, rounded=flag, target=target
        )
        for batch, flag, target in (
            (1, False, PORTABLE),
            (1, True, tvm.target.Target({"kind": "llvm", "mcpu": "sapphirerapids"})),
            (8, False, PORTABLE),
        )
    )
    # q, sums and panels of one task, at least; and no more than a small model's activations.
    assert 2 * 2 * 448 * 64 * 4 < exact < batched < 8e6
    assert 2 * 448 * 64 * 6 < rounded < 8e6


def test_a_lone_first_token_sees_itself() -> None:
    shape = AttentionShape(6, 2, 16, window=0, sinks=0, scale=0.3)
    batch = PagedBatch(shape, KV_FORMATS["float32"], lengths=[1], new=[1])
    np.testing.assert_allclose(
        batch.attend()[0], np.repeat(batch.v[0][0], 3, axis=0), rtol=1e-6, atol=1e-7
    )


def test_a_window_shorter_than_the_parts_of_a_long_context() -> None:
    # Some parts, and rounds of prompts, have no visible token at all.
    shape = AttentionShape(4, 2, 16, window=100, sinks=20, scale=0.25)
    batch = PagedBatch(shape, KV_FORMATS["float32"], lengths=[1200, 700], new=[1, 33])
    np.testing.assert_allclose(batch.attend(), batch.expected(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("chunk", [5, 100, 512])
def test_chunks(chunk: int) -> None:
    # Prompts that begin within a chunk and end some chunks later; single tokens in the middle of
    # one, at its start and at its end; a context whose chunk is the second half of it.
    shape = AttentionShape(4, 2, 16, window=chunk, sinks=0, scale=0.25, chunked=True)
    lengths = [1200, 700, 1 + 2 * chunk, 2 * chunk, chunk]
    batch = PagedBatch(shape, KV_FORMATS["float32"], lengths, [1, 333, 1, 2, chunk])
    np.testing.assert_allclose(batch.attend(), batch.expected(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("window", "sinks"), [(5, 0), (40, 0), (33, 20)])
def test_sliding_window_with_sinks(window: int, sinks: int) -> None:
    shape = AttentionShape(4, 2, 16, window, sinks, scale=0.25)
    batch = PagedBatch(shape, KV_FORMATS["float32"], lengths=[150, 131], new=[6, 1])
    expected = batch.expected()
    np.testing.assert_allclose(batch.attend(), expected, rtol=2e-5, atol=2e-6)
    # Leaving out pages that no query can see any more changes nothing.
    np.testing.assert_allclose(batch.attend(dropped_pages=3), expected, rtol=2e-5, atol=2e-6)


def test_half_precision_activations() -> None:
    shape = AttentionShape(4, 2, 32, window=0, sinks=0, scale=0.2)
    batch = PagedBatch(shape, KV_FORMATS["float16"], [60, 20], [8, 20], dtype="float16")
    assert reference.relative_error(batch.attend(dtype="float16"), batch.expected()) < 1e-3


def test_all_e4m3_codes_decode_and_encode() -> None:
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[~np.isnan(codes.view(ml_dtypes.float8_e4m3fn).astype("float32"))]
    values = codes.view(ml_dtypes.float8_e4m3fn).astype("float32")
    n = len(codes)

    from tvm import te

    def run(build_value, array: np.ndarray, dtype: str) -> np.ndarray:
        x = te.placeholder((len(array),), str(array.dtype))
        y = te.compute((len(array),), lambda i: build_value(x[i]))
        out = tvm.runtime.tensor(np.zeros(len(array), dtype))
        build(te.create_prim_func([x, y]))(tvm.runtime.tensor(array), out)
        return out.numpy()

    decoded = run(lambda c: decode_e4m3(c, 1), codes, "float32")
    np.testing.assert_array_equal(decoded, values)
    np.testing.assert_array_equal(run(encode_e4m3, values, "uint8"), codes)
    # Between the codes: as ml_dtypes rounds, ties to even included.
    ordered = np.unique(values)
    between = np.concatenate(
        [(ordered[1:] + ordered[:-1]) / 2, np.random.default_rng(0).uniform(-448, 448, 50 * n)]
    ).astype("float32")
    rounded = between.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(run(encode_e4m3, between, "uint8"), rounded)
