"""Kernels of batch_invariant=1: what each row gets does not depend on the others, bit by bit.

And it is right: compared with NumPy as tightly as the kernels that need not be invariant.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels import cpu_attention, cpu_rounded
from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.cpu_elementwise import round_kernel
from relaxlm.compiler.kernels.cpu_matmul import matmul_kernel
from relaxlm.compiler.kernels.isa import NEEDS, Isa
from relaxlm.compiler.kernels.rounding import Rounding
from relaxlm.compiler.kernels.stored import StoredMatrix
from relaxlm.compiler.target import resolve_device
from relaxlm.quantization.kv_cache import KV_FORMATS
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.cpu import missing_features
from tests import reference
from tests.compiler import aarch64_emulation
from tests.compiler.test_cpu_attention import PORTABLE, PagedBatch
from tests.compiler.test_cpu_attention import build as build_one
from tests.compiler.test_cpu_matmul import build, check, multiply, native_unit
from tests.compiler.test_packed import rounded

# One row, every kernel for few, and several tiles and tasks of many with a rest.
ROWS = (1, 2, 3, 7, 9, 16, 17, 70)


def invariant(products: Sequence[np.ndarray]) -> None:
    """Assert that products of the first rows of one matrix are the same in all of them."""
    for product in products[:-1]:
        np.testing.assert_array_equal(product, products[-1][: len(product)])


@pytest.mark.parametrize(
    ("isa", "scheme"),
    [
        ("amx", "q4f16_1"),
        ("avx512", "q4f32_1"),
        ("avxvnni", "q4f16_1"),
        ("avx2", "q4f32_1"),
        ("avx2", "q8f16_1"),
    ],
)
def test_products_with_rounded_activations(isa: Isa, scheme: str) -> None:
    if missing := missing_features(NEEDS[isa]):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    quant = get_scheme(scheme).linear
    assert quant is not None
    # Full lines of words, and several tasks; a rest of groups and of a panel's rows; of a group.
    shapes = [(300, 384), (35, 224), (50, 330)]
    kernels = {}
    for n, k in shapes:
        matrix = StoredMatrix(n, k, quant, quant.dtype)
        assert cpu_rounded.supports(matrix, isa, invariant=True)
        kernels[f"m{n}"] = cpu_rounded.rounded_matmul_kernel(matrix, isa, invariant=True)
        kernels[f"r{n}"] = round_kernel(Rounding(k, isa, invariant=True))
    library, rng = build(kernels), np.random.default_rng(4)
    for n, k in shapes:
        arrays = quant.quantize(rng.standard_normal((n, k)).astype(np.float32))
        weight = quant.dequantize(arrays, (n, k)).astype(np.float64)
        x = rng.standard_normal((max(ROWS), k)).astype(np.float32)
        codes, scales = rounded(x)
        kept = (codes * scales[..., None]).reshape(len(x), -1)[:, :k].astype(np.float64)
        products = []
        for m in ROWS:
            packed = np.zeros((m, Rounding(k, isa, invariant=True).row_words), np.int32)
            packed_x = tvm.runtime.tensor(packed)
            library[f"r{n}"](tvm.runtime.tensor(x[:m]), packed_x)
            out = tvm.runtime.tensor(np.full((m, n), np.nan, np.float32))
            stored = [tvm.runtime.tensor(array) for array in arrays.values()]
            library[f"m{n}"](packed_x, *stored, out)
            products.append(out.numpy())
        invariant(products)
        bound = 1e-6 * (np.abs(kept) @ np.abs(weight).T)
        assert (np.abs(products[-1] - kept @ weight.T) <= bound).all()


@aarch64_emulation.needs_emulator
@pytest.mark.parametrize("isa", ["dotprod", "i8mm"])
def test_products_with_rounded_activations_on_arm(isa: Isa) -> None:
    quant, n, k = get_scheme("q4f16_1").linear, 21, 224
    assert quant is not None
    matrix, rounding = StoredMatrix(n, k, quant, quant.dtype), Rounding(k, isa, invariant=True)
    kernels = {
        "multiply": cpu_rounded.rounded_matmul_kernel(matrix, isa, invariant=True),
        "round": round_kernel(rounding),
    }
    program, rng = aarch64_emulation.build(kernels, NEEDS[isa]), np.random.default_rng(4)
    arrays = quant.quantize(rng.standard_normal((n, k)).astype(np.float32))
    x = rng.standard_normal((max(ROWS), k)).astype(np.float32)
    products = []
    for m in ROWS:
        packed = np.zeros((m, rounding.row_words), np.int32)
        out = np.full((m, n), np.nan, np.float32)
        program.run("round", x[:m].copy(), packed)
        program.run("multiply", packed, *arrays.values(), out)
        products.append(out)
    invariant(products)
    expected = x @ quant.dequantize(arrays, (n, k)).T
    assert reference.relative_error(products[-1], expected) < 1e-2


@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f16_0", "q8f16_1", "q3f16_1", "q0f16", "q0f32"])
def test_exact_products(scheme: str) -> None:
    quant, dtype = get_scheme(scheme).linear, get_scheme(scheme).dtype
    # A row shorter than a vector; a rest of a group, and of a block of rows.
    shapes = [(7, 50), (36, 330)]
    kernels = {
        f"m{n}": matmul_kernel((n, k), quant, dtype, "float32", native_unit(), invariant=True)
        for n, k in shapes
    }
    library, rng = build(kernels), np.random.default_rng(4)
    for n, k in shapes:
        weight = rng.standard_normal((n, k)).astype(np.float32)
        x = rng.standard_normal((max(ROWS), k)).astype(np.float32)
        if quant is None:
            stored = [weight.astype(dtype)]
            kept = stored[0].astype(np.float64)
        else:
            arrays = quant.quantize(weight)
            stored, kept = list(arrays.values()), quant.dequantize(arrays, (n, k))
        products = [multiply(library[f"m{n}"], x[:m], stored, n, "float32") for m in ROWS]
        invariant(products)
        check(products[-1], x, kept)


class Attention:
    """An invariant kernel, and three sequences whose tokens are all on their pages."""

    LENGTHS = (1300, 700, 40)

    def __init__(
        self, shape: AttentionShape, format: str, rounded: bool, target: tvm.target.Target
    ) -> None:
        with target:
            kernel = cpu_attention.attend_kernel(
                shape, KV_FORMATS[format], "float32", rounded, invariant=True
            )
        self.kernel, self.shape = build_one(kernel, target), shape
        self.batch = PagedBatch(shape, KV_FORMATS[format], self.LENGTHS, self.LENGTHS)

    def attend(self, parts: Sequence[tuple[int, int, int]], most_dropped: int = 0) -> list:
        """Rows start .. end of some sequences, (sequence, start, end), in one step; by part.

        Of a window's sequences, up to `most_dropped` pages that no row sees are not in the tables.
        """
        shape, page = self.shape, self.shape.page_size
        sinks, tables, dropped = -(-shape.sinks // page), [], []
        for sequence, start, end in parts:
            pages = self.batch.pages[sequence][: -(-end // page)]
            hidden = max((start - shape.window + 1) // page - sinks, 0) if shape.window else 0
            hidden = min(hidden, most_dropped)
            tables.append(np.concatenate([pages[:sinks], pages[sinks + hidden :]]))
            dropped.append(hidden * page)
        q = np.concatenate([self.batch.q[sequence][start:end] for sequence, start, end in parts])
        rows = np.cumsum([0, *(end - start for _, start, end in parts)])
        inputs = [
            np.concatenate([np.arange(start, end) for _, start, end in parts]),
            rows,
            np.cumsum([0, *map(len, tables)]),
            np.concatenate(tables),
            np.array([end for _, _, end in parts]) - dropped,
            np.array(dropped),
        ]
        out = tvm.runtime.tensor(np.full(q.shape, 7, np.float32))
        self.kernel(
            tvm.runtime.tensor(q),
            *(tvm.runtime.tensor(array.astype(np.int32)) for array in inputs),
            *self.batch.tensors,
            *map(tvm.runtime.tensor, [*self.batch.sink_logits, *self.batch.slopes]),
            out,
        )
        return np.split(out.numpy(), rows[1:-1])


def native(without: str | None) -> tvm.target.Target:
    device = resolve_device("cpu")
    if without is None:
        return device.tvm_target()
    features = (name for name in device.cpu_features if not name.startswith(without))
    return replace(device, cpu_features=tuple(features)).tvm_target()


@pytest.mark.parametrize(
    ("window", "sinks", "variant", "format", "rounded", "without"),
    [
        (0, 0, {}, "float16", True, None),
        (0, 0, {"cap": 2.0}, "float8_e4m3", True, "amx"),
        (0, 0, {"sink_logits": True}, "float32", False, None),
        (0, 0, {}, "float8_e4m3", False, None),
        (300, 20, {"cap": 2.0, "sink_logits": True}, "float16", True, None),
        (300, 20, {"alibi": True}, "float16", False, None),
        (100, 0, {}, "float32", False, None),
    ],
    ids=str,
)
def test_attention(
    window: int, sinks: int, variant: dict, format: str, rounded: bool, without: str | None
) -> None:
    shape = AttentionShape(6, 2, 32, window, sinks, scale=0.2, **variant)
    attention = Attention(shape, format, rounded, native(without))
    length, rng = attention.LENGTHS[0], np.random.default_rng(3)
    (whole,) = attention.attend([(0, 0, length)])
    expected = attention.batch.expected()[:length]
    assert reference.relative_error(whole, expected) < (2.0**-7 if rounded else 1e-5)
    for trial in range(40):
        # One row, few and many; alone, in company, in company that leaves no part split.
        start = int(rng.integers(length))
        parts = [(0, start, min(start + int(rng.choice([1, 2, 5, 16, 17, 300])), length))]
        for _ in range([0, 2, 11][trial % 3]):
            other = int(rng.integers(3))
            at = int(rng.integers(attention.LENGTHS[other]))
            end = min(at + int(rng.choice([1, 1, 9, 60])), attention.LENGTHS[other])
            parts.insert(int(rng.integers(len(parts) + 1)), (other, at, end))
        found = attention.attend(parts, most_dropped=int(rng.integers(60)))
        for (sequence, start, end), rows in zip(parts, found, strict=True):
            if sequence == 0:
                np.testing.assert_array_equal(rows, whole[start:end])


def test_attention_on_any_cpu() -> None:
    attention = Attention(AttentionShape(4, 2, 16, 0, 0, scale=0.25), "float32", False, PORTABLE)
    # Tokens that a row does not see count nothing, not even as much as no sum would show.
    _, values = attention.batch.tensors
    zeroed, pages = values.numpy().copy(), attention.batch.pages[0]
    for token in range(40):
        zeroed[pages[token // 16], :, token % 16] = 0
    attention.batch.tensors[1] = tvm.runtime.tensor(zeroed)
    assert not attention.attend([(0, 39, 40)])[0].any()
    assert not attention.attend([(0, 0, 200)])[0][:40].any()
    (whole,) = attention.attend([(1, 0, 700)])
    for start in (0, 511, 512, 699):
        (row,) = attention.attend([(1, start, start + 1)])
        np.testing.assert_array_equal(row, whole[start : start + 1])


def test_the_workspace_covers_the_parts_of_long_contexts() -> None:
    shape = AttentionShape(14, 2, 64, window=0, sinks=0, scale=0.125)
    short, long = (
        cpu_attention.attend_workspace_bytes(
            shape, KV_FORMATS["float16"], 8, threads=2, target=PORTABLE, invariant_pages=pages
        )
        for pages in (64, 2048)
    )
    # 16 rows of each of 7 sequences, with 14 heads, for each 512 tokens.
    added = 7 * 16 * 14 * (64 + 16 + 1) * 4 * (2048 - 64) // 32
    assert abs(long - short - added) < 0.02 * added
