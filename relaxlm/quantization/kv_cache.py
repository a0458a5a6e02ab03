"""Number formats of the KV cache: what is stored for each key and value.

The float formats store the vector of a head as it is. `fp8` stores it as e4m3 (Micikevicius et al.
2022, arXiv:2209.05433: 4 exponent and 3 mantissa bits, bias 7, largest value 448, no infinities)
with one float32 scale per token and head, so that the largest element of a vector becomes 448.

A format is chosen when a model is compiled; `compiler/passes/lower_paged_attention.py` turns the
models' abstract attention into kernels for it. The functions here are the reference of those
kernels.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from relaxlm.errors import ConfigError

E4M3_MAX = 448.0


@dataclass(frozen=True)
class KVFormat:
    """One way to store keys and values.

    `dtype` is that of the page tensors; e4m3 codes are kept as uint8, because TVM's own casts of
    float8 are wrong for subnormals on CPUs. `scaled` adds a float32 tensor of scales.
    """

    name: str
    dtype: str
    scaled: bool = False

    def bytes_per_token(self, heads: int, head_dim: int) -> int:
        """Bytes that one layer keeps for one token, keys and values together."""
        item = 1 if self.dtype == "uint8" else np.dtype(_numpy_dtype(self.dtype)).itemsize
        return 2 * heads * (head_dim * item + (4 if self.scaled else 0))

    def quantize(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Store vectors [..., head_dim] float32.

        Returns:
            codes: [..., head_dim] in `dtype`.
            scales: [...] float32, or None for a float format.
        """
        if not self.scaled:
            return x.astype(_numpy_dtype(self.dtype)), None
        # The floor keeps a vector of zeros at zero instead of 0 / 0.
        scale = np.maximum(np.abs(x).max(-1), np.float32(1e-20)) * np.float32(1 / E4M3_MAX)
        codes = (x / scale[..., None]).astype(ml_dtypes.float8_e4m3fn)
        return codes.view(np.uint8), scale.astype(np.float32)

    def dequantize(self, codes: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        """The float32 vectors [..., head_dim] that attention reads."""
        if scales is None:
            return codes.astype(np.float32)
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[..., None]


KV_FORMATS = {
    format.name: format
    for format in (
        KVFormat("float32", "float32"),
        KVFormat("float16", "float16"),
        KVFormat("bfloat16", "bfloat16"),
        KVFormat("float8_e4m3", "uint8", scaled=True),
    )
}
ALIASES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3",
    "e4m3": "float8_e4m3",
    "fp8_e4m3": "float8_e4m3",
    "float8_e4m3fn": "float8_e4m3",
}


def get_kv_format(name: str) -> KVFormat:
    """The format called `name`, short spellings included.

    Raises:
        ConfigError: there is no such format.
    """
    full = ALIASES.get(name, name)
    if full not in KV_FORMATS:
        raise ConfigError(
            f"kv_cache_dtype = {name!r} is not a KV-cache format. Known: {', '.join(KV_FORMATS)} "
            f"(short: {', '.join(list(ALIASES)[:4])})"
        )
    return KV_FORMATS[full]


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
