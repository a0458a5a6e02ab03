"""From products to queries and pages on GPUs, against float64 NumPy, run by the emulation."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from relaxlm.compiler.kernels.attention import AttentionShape, page_tensors
from relaxlm.compiler.kernels.cuda_rope import rope_append_kernel
from relaxlm.compiler.kernels.rope import RopeOptions
from relaxlm.quantization.kv_cache import get_kv_format
from tests.compiler.cuda_emulation import CudaEmulation, needs_compiler
from tests.compiler.test_cpu_elementwise import normed
from tests.compiler.test_cpu_rope import KV, Q, apart, joined, rotated

TOKENS, PAGES = 5, 4
CASES: dict[str, tuple[int, RopeOptions, str]] = {
    "whole": (64, joined(64, turned=64, dtype="float16"), "float16"),
    "whole, other pages": (256, joined(256, turned=256, dtype="bfloat16"), "float32"),
    "norm": (
        128,
        joined(128, turned=128, norm="bfloat16", eps=1e-5, dtype="bfloat16"),
        "bfloat16",
    ),
    "part": (80, joined(80, turned=32, dtype="float16"), "fp8"),
    "norm, odd part": (24, joined(24, turned=6, norm="float32", eps=1e-2), "fp8"),
    "pairs": (32, joined(32, turned=32, in_pairs=True, scaled=True), "float32"),
    "part in pairs": (40, joined(40, turned=12, in_pairs=True, dtype="float16"), "bfloat16"),
    "none": (20, joined(20, dtype="float16"), "fp8"),
    "apart": (32, apart(32, turned=32, norm="float16", eps=1e-3, scaled=True), "float16"),
}
# A step of rounding, relative.
STEP = {"float32": 2e-6, "float16": 6e-4, "bfloat16": 5e-3}


def as_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


@pytest.fixture(scope="module")
def kernels():
    with CudaEmulation("random") as cuda:
        built = cuda.build_all(
            [
                rope_append_kernel(
                    AttentionShape(Q, KV, dim, 0, 0, 0.0), get_kv_format(format), options
                )
                for dim, options, format in CASES.values()
            ]
        )
        yield dict(zip(CASES, built, strict=True))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_rope_and_append(kernels: dict[str, Callable[..., None]], name: str) -> None:
    check_rope(kernels[name], *CASES[name])


def check_rope(
    kernel: Callable[..., None],
    dim: int,
    options: RopeOptions,
    format_name: str,
    joined_tables: bool = False,
) -> None:
    """Compare what a kernel makes of random products with what float64 does.

    Args:
        joined_tables: it takes cosines and sines as one table.
    """
    format, rng = get_kv_format(format_name), np.random.default_rng(7)
    shape = AttentionShape(Q, KV, dim, 0, 0, 0.0)

    def random(*extents: int, dtype: str = "float32") -> np.ndarray:
        return (rng.standard_normal(extents) * 2 + 0.1).astype(as_dtype(dtype))

    products = [random(TOKENS, width, dtype=options.dtype) for width in options.widths]
    weights = [random(dim, dtype=options.norm) for _ in range(2)] if options.norm else []
    angles = random(TOKENS, options.turned // 2)
    tables = [np.cos(angles), np.sin(angles)] if options.turned else []
    factor = [random(TOKENS)] if options.scaled else []
    slots = rng.permutation(16 * PAGES)[:TOKENS].astype("int32")

    def heads_of(part: int, heads: int) -> np.ndarray:
        number, first = options.places[part]
        x = products[number][:, first : first + heads * dim].astype("float64")
        return x.reshape(TOKENS, heads, dim)

    q, k, v = heads_of(0, Q), heads_of(1, KV), heads_of(2, KV)
    if weights:
        q, k = normed(q, weights[0], options.eps), normed(k, weights[1], options.eps)
    if tables:
        q, k = (rotated(x, *tables, options.in_pairs) for x in (q, k))
    if factor:
        q = q * factor[0][:, None, None]

    # What nobody writes stays as it is.
    pages = [
        np.full((PAGES, *tensor.page_shape), 7, as_dtype(tensor.dtype))
        for tensor in page_tensors(shape, format)
    ]
    before = [tensor.copy() for tensor in pages]
    out = np.full((TOKENS, Q, dim), np.nan, as_dtype(options.dtype))
    if joined_tables and tables:
        tables = [np.concatenate(tables, axis=1)]
    kernel(*products, *weights, *tables, *factor, slots, *pages, out)
    np.testing.assert_allclose(
        out.astype("float64"), q, rtol=STEP[options.dtype], atol=STEP[options.dtype]
    )
    page, slot = slots // 16, slots % 16
    for index, new in enumerate((k, v)):
        codes, scales = format.quantize(new.astype("float32"))
        found = pages[index][page, :, slot]
        if scales is None:
            step = STEP[format.dtype]
            np.testing.assert_allclose(
                found.astype("float64"), codes.astype("float64"), rtol=2 * step, atol=step
            )
        else:  # neighbours of a rounding boundary may differ by a code
            assert np.abs(found.astype(int) - codes).max() <= 1
            np.testing.assert_allclose(pages[2 + index][page, :, slot], scales, rtol=2e-6)
    for tensor, old in zip(pages, before, strict=True):
        tensor[page, :, slot] = old[page, :, slot]
        np.testing.assert_array_equal(tensor.view("uint8"), old.view("uint8"))
