"""Tensors of quantized checkpoints that stand for float ones, decoded as they are read.

    name            in the file                                     stands for
    X               X float8_e4m3fn [..., N, K],                    X float32 [..., N, K]
                    X_scale_inv [..., N / 128, K / 128]
    X               X_blocks uint8 [E, N, K / 32, 16],              X float32 [E, K, N]
                    X_scales uint8 [E, N, K / 32]

The first is FP8 with a scale for every block of a matrix (DeepSeek-AI 2024, arXiv:2412.19437),
whose size config.json gives. The second is MXFP4 of the OCP Microscaling Formats specification 1.0
as in checkpoints of gpt-oss: codes e2m1, the earlier one in the low half of a byte, and for 32 of
them a power of two, e8m0. Its float tensor is transposed, as in checkpoints that are not quantized.

Products of codes and scales are exact in MXFP4, and rounded once, to float32, in FP8.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from relaxlm.errors import CheckpointError
from relaxlm.files import read_json_object
from relaxlm.quantization.stored_tensor import StoredTensor

# The value of each code.
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = np.array(_MAGNITUDES + [-value for value in _MAGNITUDES], np.float32)
E8M0 = np.array([2.0 ** (code - 127) for code in range(255)] + [math.nan], np.float32)
# Both codes of a byte.
_PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=1)

# Codes that share a scale in MXFP4.
_MX_GROUP = 32
# What the names of scales end with: behind a weight's name, and in place of `_blocks`.
_FP8_SCALE, _MX_BLOCKS, _MX_SCALES = "_scale_inv", "_blocks", "_scales"


@dataclass(frozen=True, kw_only=True)
class BlockScaled(StoredTensor):
    """An FP8 matrix, or several, with a scale for every block of rows and columns.

    The inherited fields are those of the float tensor; `codes` and `scales` are in the file.
    """

    codes: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop = self.size if stop is None else stop
        *_, rows, columns = self.shape
        first, last = start // columns, -(-stop // columns)
        codes = self.codes.read_bits(first * columns, last * columns)
        values = E4M3[codes.reshape(last - first, columns)]
        scales = _read_scales(self.scales).reshape(-1, self.scales.shape[-1])
        # Matrices of experts follow each other, each with its own blocks of rows.
        row = np.arange(first, last)
        row = row // rows * self.scales.shape[-2] + row % rows // self.block[0]
        column = np.arange(columns) // self.block[1]
        values *= scales[row][:, column]
        return values.reshape(-1)[start - first * columns : stop - first * columns]


@dataclass(frozen=True, kw_only=True)
class Microscaled(StoredTensor):
    """Matrices of experts in MXFP4; `shape` is [E, K, N], and the file has them as [E, N, K]."""

    codes: StoredTensor
    scales: StoredTensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def part(self, index: int) -> np.ndarray:
        """The matrix of an expert, [K, N]: a view, whose columns are contiguous."""
        _, columns, rows = self.shape
        size, groups = rows * columns, columns // _MX_GROUP
        codes = self.codes.read_bits(index * size // 2, (index + 1) * size // 2)
        scales = self.scales.read_bits(index * rows * groups, (index + 1) * rows * groups)
        values = _PAIRS[codes].reshape(rows * groups, _MX_GROUP)
        with np.errstate(over="ignore"):  # infinity, for the caller to refuse
            values *= E8M0[scales][:, None]
        return values.reshape(rows, columns).T

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop = self.size if stop is None else stop
        each = math.prod(self.shape[1:])
        first, last = start // each, -(-stop // each)
        parts = [self.part(i).reshape(-1) for i in range(first, last)]
        return np.concatenate(parts)[start - first * each : stop - first * each]


def _read_scales(scales: StoredTensor) -> np.ndarray:
    """Of an FP8 tensor, float32: stored as floats or as powers of two."""
    if scales.dtype in ("F8_E8M0", "uint8"):
        return E8M0[scales.read_bits()]
    return scales.read().astype(np.float32)


def decode_tensors(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A checkpoint's tensors with the float ones in place of codes and scales, in the same order.

    What is of no format known here stays as it is.

    Raises:
        CheckpointError: codes without scales, or of shapes that do not fit each other.
    """
    block = _block_size(folder / "config.json")
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_FP8_SCALE) and name.removesuffix(_FP8_SCALE) in tensors:
            continue
        scales = tensors.get(name + _FP8_SCALE)
        if tensor.dtype == "float8_e4m3fn" and scales is not None and block is not None:
            found[name] = _block_scaled(tensor, scales, block)
            continue
        stem = name.removesuffix(_MX_BLOCKS)
        if name.endswith(_MX_SCALES) and name.removesuffix(_MX_SCALES) + _MX_BLOCKS in tensors:
            continue
        scales = tensors.get(stem + _MX_SCALES)
        if stem != name and scales is not None and tensor.dtype == "uint8":
            found[stem] = _microscaled(stem, tensor, scales)
            continue
        found[name] = tensor
    return found


def _block_size(config: Path) -> tuple[int, int] | None:
    """Rows and columns of a block of FP8, as config.json gives them."""
    fields = read_json_object(config, CheckpointError) if config.is_file() else {}
    for place in (fields, fields.get("text_config")):
        settings: Any = place.get("quantization_config") if isinstance(place, dict) else None
        size = settings.get("weight_block_size") if isinstance(settings, dict) else None
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size):
            return size[0], size[1]
    return None


def _block_scaled(
    codes: StoredTensor, scales: StoredTensor, block: tuple[int, int]
) -> StoredTensor:
    *outer, rows, columns = codes.shape if len(codes.shape) > 1 else (1, *codes.shape)
    expected = (*outer, -(-rows // block[0]), -(-columns // block[1]))
    if scales.shape != expected or len(codes.shape) < 2:
        raise CheckpointError(
            f"{scales.file}: tensor {scales.name} has shape {list(scales.shape)}, expected "
            f"{list(expected)}: a scale for every {block[0]} x {block[1]} weights of {codes.name} "
            f"{list(codes.shape)}, as config.json says (weight_block_size)"
        )
    place = (codes.name, codes.shape, "float32", codes.file, codes.offset)
    return BlockScaled(*place, codes=codes, scales=scales, block=block)


def _microscaled(name: str, codes: StoredTensor, scales: StoredTensor) -> StoredTensor:
    if (
        len(codes.shape) != 4
        or codes.shape[3] * 2 != _MX_GROUP
        or scales.shape != codes.shape[:3]
        or scales.dtype != "uint8"
    ):
        raise CheckpointError(
            f"{codes.file}: tensors {codes.name} {list(codes.shape)} and {scales.name} "
            f"{scales.dtype} {list(scales.shape)} do not fit each other: expected uint8 [E, N, G, "
            f"{_MX_GROUP // 2}] and [E, N, G]"
        )
    experts, rows, groups, _ = codes.shape
    shape = (experts, groups * _MX_GROUP, rows)
    place = (name, shape, "float32", codes.file, codes.offset)
    return Microscaled(*place, codes=codes, scales=scales)
