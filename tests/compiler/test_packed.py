"""The int8 form of activations against NumPy."""

import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels.isa import Isa, dot_products
from relaxlm.compiler.kernels.packed import (
    FEW,
    PackedRow,
    pack_kernel,
    row_words,
    weaves,
    woven_rows,
)
from relaxlm.compiler.target import resolve_device
from relaxlm.runtime.cpu import missing_features
from tests.compiler.test_cpu_matmul import build

# Whole blocks of 128; a rest of groups; of elements, in every power of two.
LENGTHS = [128, 256 + 64, 128 + 31, 5]


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What int8 keeps of x [m, K], K padded with zeros to G groups of 32.

    Returns:
        codes: [m, G, 32] float32, whole numbers from -127 to 127.
        scales: [m, G] float32.
    """
    groups = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    largest = np.maximum(np.abs(groups).max(-1), np.float32(1e-20))
    codes = np.rint(groups * (np.float32(127) / largest)[..., None])
    return codes, largest * np.float32(1 / 127)


def pack(kernel, x: np.ndarray) -> np.ndarray:
    """[m, row_words(K)] int32, as the kernel packs x [m, K]."""
    # What the kernel leaves out must show.
    packed = tvm.runtime.tensor(np.full((len(x), row_words(x.shape[1])), 0x55555555, np.int32))
    kernel(tvm.runtime.tensor(x), packed)
    return packed.numpy()


def check(packed: np.ndarray, x: np.ndarray, isa: Isa) -> None:
    row, m = PackedRow(x.shape[1]), len(x)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 128)))
    codes, scales = rounded(padded)
    # [m, block, group, half, word, byte]
    expected = codes.reshape(m, row.blocks, 4, 16, 2).swapaxes(3, 4)
    expected = expected.reshape(m, row.blocks, 4, 2, 4, 4)
    sums = codes.sum(-1)
    if weaves(isa) and m == 1:
        blocks = packed[0, : row.blocks * 64].reshape(row.blocks, 64)
        bytes_ = np.ascontiguousarray(blocks[:, :32]).view(np.int8).reshape(row.blocks, 2, 4, 4, 4)
        np.testing.assert_array_equal(bytes_, expected[0].swapaxes(1, 2))
        of_lanes = np.ascontiguousarray(blocks[:, 32:48]).view(np.float32)
        np.testing.assert_array_equal(of_lanes.ravel(), np.repeat(scales, 4))
        starts = blocks[:, 48:].reshape(-1, 4)
        np.testing.assert_array_equal(starts[:, 0], -7 * sums[0])
        assert not starts[:, 1:].any()
        return
    if weaves(isa) and m <= woven_rows(x.shape[1], isa):
        expected = expected.transpose(0, 1, 3, 4, 2, 5)
    bytes_ = np.ascontiguousarray(packed[:, : row.scales]).view(np.int8)
    np.testing.assert_array_equal(bytes_, expected.reshape(m, -1))
    of_groups = np.ascontiguousarray(packed[:, row.scales : row.sums]).view(np.float32)
    np.testing.assert_array_equal(of_groups, scales)
    np.testing.assert_array_equal(packed[:, row.sums : row.starts], sums)
    np.testing.assert_array_equal(packed[:, row.starts :][:, : row.blocks * 4], -7 * sums)


@pytest.mark.parametrize("arch", ["native", "x86-64-v3"])
def test_rows_are_packed(arch: str) -> None:
    device = resolve_device("cpu", arch)
    if missing := missing_features(device.cpu_features):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    isa = dot_products(device.tvm_target())
    if isa is None:
        pytest.skip("no kernels for rounded activations on this CPU")
    rng = np.random.default_rng(1)
    library = build({f"p{k}": pack_kernel(k, isa) for k in LENGTHS}, arch)
    for k in LENGTHS:
        for m in (1, 3, FEW, FEW + 1, 300):
            x = rng.standard_normal((m, k), np.float32) * 10 ** rng.uniform(-6, 6, (m, 1))
            x = x.astype(np.float32)
            x[m // 2, : min(k, 32)] = 0
            check(pack(library[f"p{k}"], x), x, isa)


def test_rows_do_not_share_cache_sets() -> None:
    for k in (1, 32, 896, 2048, 4864, 8192, 2944):
        row = PackedRow(k)
        assert row.words >= row.starts + row.blocks * 4
        assert row.words % 16 == 0
        assert row.words % 1024
