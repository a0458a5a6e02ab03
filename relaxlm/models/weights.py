"""Which checkpoint tensors make up which parameter."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["linear", "embedding", "lm_head", "vector"]


@dataclass(frozen=True)
class Source:
    """One tensor of the Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the compiled model, and where its values come from.

    `shape` is [out, in] for matrices. `sources` are concatenated along axis 0 in the order
    given. `role` decides how a quantization scheme stores it; a "vector" (norm, bias) is never
    quantized.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[Source, ...]
