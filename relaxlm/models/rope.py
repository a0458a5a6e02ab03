"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their frequency scalings.

The frequencies follow `transformers/modeling_rope_utils.py`; they are computed here in NumPy
float32 with the same order of operations, because a position in the tens of thousands multiplies
any difference.
"""

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class _Rope(BaseModel):
    # A field of a scaling that is not read here would change the result: refuse it.
    model_config = ConfigDict(frozen=True, extra="forbid")

    rope_theta: PositiveFloat

    def inverse_frequencies(self, dim: int) -> np.ndarray:
        """Radians per position of each pair of features: [dim / 2] float32."""
        exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        return (np.float32(1) / np.power(np.float32(self.rope_theta), exponent)).astype(np.float32)


class DefaultRope(_Rope):
    rope_type: Literal["default"]


class LinearRope(_Rope):
    """Positions divided by a factor (`_compute_linear_scaling_rope_parameters`)."""

    rope_type: Literal["linear"]
    factor: PositiveFloat

    def inverse_frequencies(self, dim: int) -> np.ndarray:
        return super().inverse_frequencies(dim) / np.float32(self.factor)


class Llama3Rope(_Rope):
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended
    (`_compute_llama3_parameters`)."""

    rope_type: Literal["llama3"]
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt

    def inverse_frequencies(self, dim: int) -> np.ndarray:
        plain = super().inverse_frequencies(dim)
        stretched = plain / np.float32(self.factor)
        wavelength = np.float32(2 * math.pi) / plain
        original = self.original_max_position_embeddings
        blend = (original / wavelength - self.low_freq_factor) / np.float32(
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - blend) * stretched + blend * plain
        result = np.where(wavelength > original / self.low_freq_factor, stretched, blended)
        result = np.where(wavelength < original / self.high_freq_factor, plain, result)
        return result.astype(np.float32)


Rope = Annotated[DefaultRope | LinearRope | Llama3Rope, Field(discriminator="rope_type")]
