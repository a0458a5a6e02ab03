"""Group quantization: every `group` elements along a row share one scale.

    scale[n, g] = max |W[n, k in group g]| / max_int
    code[n, k]  = clip(round(W[n, k] / scale[n, k // group] + max_int), 0, 2 * max_int)
    W'[n, k]    = (code[n, k] - max_int) * scale[n, k // group]

Every operation rounds to the model's dtype, and `round` takes ties to even, as in the layouts that
the MLC ecosystem publishes. This file is the reference that kernels and the IR transform are
compared with, and the converter runs it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from relaxlm.errors import CheckpointError, UnsupportedError

Layout = Literal["NK", "KN"]

FLOAT_DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

# Rows are processed in blocks of about this many elements, so that the temporary arrays stay in
# the CPU's cache.
BLOCK_ELEMENTS = 1 << 17

_FLOAT16_MAX = 65504.0
_FLOAT16_SMALLEST_NORMAL = np.float32(2.0**-14)


@dataclass(frozen=True)
class GroupQuant:
    """One number format. `dtype` is the model's dtype and that of the scales.

    Layout "NK" stores [out, in] matrices row by row; "KN" stores the same arrays transposed.
    """

    bits: int
    group: int
    layout: Layout
    dtype: str

    def __post_init__(self) -> None:
        assert self.bits in (2, 3, 4, 8) and self.group % self.per_word == 0, self
        assert self.dtype in FLOAT_DTYPES, self

    @property
    def per_word(self) -> int:
        """Codes in one uint32; with 3 bits its top two bits are unused."""
        return 32 // self.bits

    @property
    def max_int(self) -> int:
        """The code of zero, and the largest magnitude in steps."""
        return 2 ** (self.bits - 1) - 1

    def groups(self, columns: int) -> int:
        """Groups in a row of `columns` elements; the last one may be partly filled."""
        return -(-columns // self.group)

    def storage(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of what a weight of `shape` is stored as.

        Args:
            shape: (N, K), or (experts, N, K) with layout "NK".

        Returns:
            q_weight: [..., N, words] uint32, words = groups * group / per_word.
            q_scale: [..., N, groups] in `dtype`. Layout "KN" swaps the two axes of both.

        Raises:
            UnsupportedError: layout "KN" and more than two dimensions.
        """
        if len(shape) < 2:
            raise ValueError(f"a quantized weight has at least two dimensions, not shape {shape}")
        *outer, rows, columns = shape
        groups = self.groups(columns)
        words = groups * (self.group // self.per_word)
        if self.layout == "KN":
            if outer:
                raise UnsupportedError(
                    f"the transposed layout holds matrices only, not a weight of shape {shape}; "
                    "use a preset that ends in _1, such as q4f16_1"
                )
            return {
                "q_weight": ((words, rows), "uint32"),
                "q_scale": ((groups, rows), self.dtype),
            }
        return {
            "q_weight": ((*outer, rows, words), "uint32"),
            "q_scale": ((*outer, rows, groups), self.dtype),
        }

    def empty(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Uninitialized arrays for `write_rows` to fill."""
        return {
            name: np.empty(stored, _dtype(dtype))
            for name, (stored, dtype) in self.storage(shape).items()
        }

    def quantize(self, weight: np.ndarray, name: str = "weight") -> dict[str, np.ndarray]:
        """Quantize one weight.

        Args:
            weight: [..., N, K] of any float dtype; it is first rounded to `dtype`.
            name: how error messages call the weight.

        Returns:
            q_weight: element i of a word in bits [i * bits, (i + 1) * bits), columns from K on 0.
            q_scale: 0 where a group is zero, or where its scale underflows `dtype`; such a group
                has the code of zero everywhere. Shapes as `storage` gives them.

        Raises:
            CheckpointError: `weight` has NaN, infinity, or a value beyond `dtype`.
        """
        arrays = self.empty(weight.shape)
        rows = weight.reshape(-1, weight.shape[-1])
        step = block_rows(rows.shape[1])
        for start in range(0, rows.shape[0], step):
            self.write_rows(arrays, start, rows[start : start + step], name)
        return arrays

    def write_rows(
        self, arrays: dict[str, np.ndarray], start: int, rows: np.ndarray, name: str = "weight"
    ) -> np.ndarray:
        """Quantize some rows into the arrays of the whole weight, rows counted over all outer axes.

        Args:
            arrays: as `empty` gives them.
            start: number of the first row.
            rows: [r, K] of any float dtype.

        Returns:
            [r, K] float32, what the stored rows stand for.
        """
        codes, scale = self._encode(rows, name)
        stop = start + rows.shape[0]
        words = self._pack(codes)
        if self.layout == "KN":
            arrays["q_weight"][:, start:stop] = words.T
            arrays["q_scale"][:, start:stop] = scale.T
        else:
            arrays["q_weight"].reshape(-1, words.shape[1])[start:stop] = words
            arrays["q_scale"].reshape(-1, scale.shape[1])[start:stop] = scale
        return self._decode(codes, scale)[:, : rows.shape[1]]

    def dequantize(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """What the stored arrays stand for: (code - max_int) * scale.

        Args:
            arrays: q_weight and q_scale as `storage(shape)` describes them.
            shape: of the weight, [..., N, K].

        Returns:
            [..., N, K] float32, not rounded to `dtype`.
        """
        stored = self.storage(shape)
        for key, (expected, _) in stored.items():
            if arrays[key].shape != expected:
                raise ValueError(f"{key} has shape {arrays[key].shape}, expected {expected}")
        words, scale = arrays["q_weight"], arrays["q_scale"]
        if self.layout == "KN":
            words, scale = words.T, scale.T
        words = words.reshape(-1, words.shape[-1])
        scale = scale.reshape(-1, scale.shape[-1])
        out = np.empty((words.shape[0], shape[-1]), np.float32)
        step = block_rows(shape[-1])
        for start in range(0, out.shape[0], step):
            block = slice(start, start + step)
            decoded = self._decode(self._unpack(words[block]), scale[block])
            out[block] = decoded[:, : shape[-1]]
        return out.reshape(shape)

    def _encode(self, rows: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Codes [r, groups * group] uint8 and scales [r, groups] of float rows [r, K]."""
        count, columns = rows.shape
        groups = self.groups(columns)
        padded = groups * self.group
        values = round_to(rows, self.dtype)
        if padded != columns:
            values = np.pad(values, ((0, 0), (0, padded - columns)))

        largest = _group_max(values.reshape(-1), self.group).reshape(count, groups)
        if not _fits(largest, self.dtype):
            raise _unstorable(rows, self.dtype, name)
        scale = (largest / np.float32(self.max_int)).astype(FLOAT_DTYPES[self.dtype])
        divisor = scale.astype(np.float32)
        divisor[divisor == 0] = 1  # 0 / 0 otherwise; the codes become those of zero

        grouped = values.reshape(count, groups, self.group)
        steps = grouped / divisor[:, :, None]
        _round_significand(steps, self.dtype)
        steps += np.float32(self.max_int)
        _round_significand(steps, self.dtype)
        np.rint(steps, out=steps)
        np.clip(steps, 0, 2 * self.max_int, out=steps)
        codes = steps.reshape(count, padded).astype(np.uint8)
        codes[:, columns:] = 0
        return codes, scale

    def _decode(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """[r, groups * group] float32 of codes uint8 and scales [r, groups]."""
        steps = codes.astype(np.float32)
        steps -= np.float32(self.max_int)
        grouped = steps.reshape(*scale.shape, self.group)
        grouped *= scale.astype(np.float32)[:, :, None]
        return steps

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """[r, groups * group] uint8 -> [r, words] uint32."""
        count = codes.shape[0]
        if self.bits == 8:
            return codes.view("<u4")
        if self.bits == 4:
            return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view("<u4")
        lanes = codes.reshape(count, -1, self.per_word)
        words = lanes[:, :, 0].astype(np.uint32)
        for i in range(1, self.per_word):
            words |= lanes[:, :, i].astype(np.uint32) << np.uint32(i * self.bits)
        return words

    def _unpack(self, words: np.ndarray) -> np.ndarray:
        """[r, words] uint32 -> [r, words * per_word] uint8."""
        codes = np.empty((*words.shape, self.per_word), np.uint8)
        for i in range(self.per_word):
            codes[:, :, i] = (words >> np.uint32(i * self.bits)) & np.uint32(2**self.bits - 1)
        return codes.reshape(words.shape[0], -1)


def block_rows(columns: int) -> int:
    """How many rows of `columns` elements to process at a time."""
    return max(1, BLOCK_ELEMENTS // max(1, columns))


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round a float array to `dtype`, nearest and ties to even.

    Returns:
        A float32 array with the same values as `values.astype(dtype)`, except that what is beyond
        float16's range stays finite and greater than 65504, that -0 may become 0, and that nothing
        is rounded where there is NaN or infinity. NumPy's own conversions to and from float16 take
        several times as long.
    """
    if dtype != "float16" or values.dtype == np.float16:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(FLOAT_DTYPES[dtype]).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float32)
    magnitude = np.abs(rounded)
    if not magnitude.max(initial=0) < np.inf:  # infinity or NaN, for the caller to refuse
        return rounded
    # Below the normal range float16 has a fixed step of 2**-24, which is float32's step at 0.75.
    tiny = np.nonzero(magnitude < _FLOAT16_SMALLEST_NORMAL)
    subnormal = (rounded[tiny] + np.float32(0.75)) - np.float32(0.75)
    if values.dtype != FLOAT_DTYPES["bfloat16"]:  # which has fewer significant bits than float16
        _round_significand(rounded, "float16")
    rounded[tiny] = subnormal
    return rounded


def cast(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Convert float values to the dtype in which they are stored unquantized.

    Raises:
        CheckpointError: there is NaN, infinity, or a value beyond `dtype`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        stored = values.astype(FLOAT_DTYPES[dtype])
    if not np.isfinite(stored).all():
        raise _unstorable(values, dtype, name)
    return stored


def _round_significand(values: np.ndarray, dtype: str) -> None:
    """Round finite float32 values in place to the significand of `dtype`, ties to even.

    In float16 this is exact for results from 2**-14 on. Smaller ones keep more bits than float16
    has; the only such values here are steps next to which `max_int` is added, and they vanish in
    that addition either way.
    """
    if dtype == "float32":
        return
    dropped = 13 if dtype == "float16" else 16
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(dropped)) & np.uint32(1)
    odd += np.uint32((1 << (dropped - 1)) - 1)
    bits += odd
    bits &= np.uint32(0xFFFFFFFF ^ ((1 << dropped) - 1))


def _group_max(values: np.ndarray, group: int) -> np.ndarray:
    """max |value| of every `group` consecutive elements of a flat array; NaN if one is NaN."""
    largest = np.abs(values)
    while group % 2 == 0:  # halving with strides is seven times as fast as max(axis=1)
        largest = np.maximum(largest[0::2], largest[1::2])
        group //= 2
    return largest.reshape(-1, group).max(axis=1) if group > 1 else largest


def _fits(magnitudes: np.ndarray, dtype: str) -> bool:
    limit = _FLOAT16_MAX if dtype == "float16" else float(ml_dtypes.finfo(FLOAT_DTYPES[dtype]).max)
    return bool((magnitudes <= np.float32(limit)).all())


def _unstorable(values: np.ndarray, dtype: str, name: str) -> CheckpointError:
    """The error for values of which at least one is NaN, infinite or beyond `dtype`."""
    if not np.isfinite(values).all():
        kind = "NaN" if np.isnan(values).any() else "infinity"
        return CheckpointError(
            f"{name}: contains {kind}; weights must be finite. "
            "Is the download damaged, or did training diverge?"
        )
    worst = float(np.abs(values.astype(np.float32)).max())
    return CheckpointError(
        f"{name}: a value of magnitude {worst:.6g} does not fit {dtype} "
        f"(largest {_largest(dtype)}); "
        "use a preset with a wider dtype: q4bf16_1, q4f32_1, q0bf16 or q0f32"
    )


def _largest(dtype: str) -> str:
    return f"{float(ml_dtypes.finfo(FLOAT_DTYPES[dtype]).max):.6g}"


def _dtype(name: str) -> np.dtype:
    return FLOAT_DTYPES[name] if name in FLOAT_DTYPES else np.dtype(name)
