"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their frequency scalings.

The frequencies follow `transformers/modeling_rope_utils.py`; they are computed here in NumPy
float32 with the same order of operations, because a position in the tens of thousands multiplies
any difference.

Two kinds depend on how long the text is: "dynamic" and "longrope". Keys stay in the cache as they
were rotated, so one table has to do for a whole text: it is chosen by the context window that the
library is compiled for.
"""

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class _Rope(BaseModel):
    """`partial_rotary_factor` is the share of each head's features, the first ones, that turn."""

    # A field of a scaling that is not read here would change the result: refuse it.
    model_config = ConfigDict(frozen=True, extra="forbid")

    rope_theta: PositiveFloat
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """How many features of a head turn."""
        return int(head_dim * self.partial_rotary_factor)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each pair of features: [rotary_dim / 2] float32."""
        return (np.float32(1) / self._wavelengths(self.rotary_dim(head_dim))).astype(np.float32)

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied by."""
        return 1.0

    def for_context(self, context: int) -> "_Rope":
        """The table for texts of up to `context` tokens."""
        return self

    def _wavelengths(self, dim: int, base: float | None = None) -> np.ndarray:
        """Of each pair of features, over 2 pi: [dim / 2] float32."""
        exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        return np.power(np.float32(self.rope_theta if base is None else base), exponent)


class DefaultRope(_Rope):
    rope_type: Literal["default"]


class LinearRope(_Rope):
    """Positions divided by a factor."""

    rope_type: Literal["linear"]
    factor: PositiveFloat

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        return super().inverse_frequencies(head_dim) / np.float32(self.factor)


class ProportionalRope(_Rope):
    """All features are paired, and only the first share of the pairs turns (Gemma 4)."""

    rope_type: Literal["proportional"]
    factor: PositiveFloat = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        return head_dim

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        turning = int(self.partial_rotary_factor * head_dim // 2)
        frequencies = np.float32(1) / self._wavelengths(head_dim)
        frequencies[turning:] = 0
        return (frequencies / np.float32(self.factor)).astype(np.float32)


class DynamicRope(_Rope):
    """A larger base for texts longer than the trained ones ("NTK-aware" scaling)."""

    rope_type: Literal["dynamic"]
    factor: PositiveFloat
    max_position_embeddings: PositiveInt
    context: int = 0

    def for_context(self, context: int) -> "DynamicRope":
        return self.model_copy(update={"context": context})

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        dim, trained = self.rotary_dim(head_dim), self.max_position_embeddings
        length = max(self.context, trained)
        stretch = (self.factor * length / trained) - (self.factor - 1)
        base = self.rope_theta * stretch ** (dim / (dim - 2))
        return (np.float32(1) / self._wavelengths(dim, base)).astype(np.float32)


class AlphaRope(_Rope):
    """A larger base, whatever the length of the text (Hunyuan)."""

    rope_type: Literal["ntk_alpha"]
    alpha: PositiveFloat

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        dim = self.rotary_dim(head_dim)
        base = self.rope_theta * self.alpha ** (dim / (dim - 2))
        return (np.float32(1) / self._wavelengths(dim, base)).astype(np.float32)


class Llama3Rope(_Rope):
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""

    rope_type: Literal["llama3"]
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        plain = super().inverse_frequencies(head_dim)
        stretched = plain / np.float32(self.factor)
        wavelength = np.float32(2 * math.pi) / plain
        original = self.original_max_position_embeddings
        long = wavelength > original / self.low_freq_factor
        short = wavelength < original / self.high_freq_factor
        result = np.where(long, stretched, plain)
        between = ~long & ~short
        if between.any():  # Llama 4's two factors are one
            blend = (original / wavelength[between] - self.low_freq_factor) / np.float32(
                self.high_freq_factor - self.low_freq_factor
            )
            result[between] = (1 - blend) * stretched[between] + blend * plain[between]
        return result.astype(np.float32)


class YarnRope(_Rope):
    """Features that turn often in a trained text keep their frequency, those that turn less than
    once are stretched by `factor`, and a ramp lies between (Peng et al. 2023, arXiv:2309.00071).
    """

    rope_type: Literal["yarn"]
    factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt
    max_position_embeddings: PositiveInt
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    # Read under another name, because `attention_factor` is what follows from it.
    given_attention_factor: float | None = Field(default=None, alias="attention_factor")

    @property
    def scale(self) -> float:
        """How much longer than the trained texts."""
        if self.factor is not None:
            return self.factor
        return self.max_position_embeddings / self.original_max_position_embeddings

    @property
    def attention_factor(self) -> float:
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.scale, self.mscale) / yarn_mscale(
                self.scale, self.mscale_all_dim
            )
        return yarn_mscale(self.scale, 1.0)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        dim = self.rotary_dim(head_dim)
        wavelengths = self._wavelengths(dim)
        low, high = (
            self._feature(self.beta_fast or 32, dim),
            self._feature(self.beta_slow or 1, dim),
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0
        ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        kept = np.float32(1) - np.clip(ramp, 0, 1)
        plain = np.float32(1) / wavelengths
        stretched = np.float32(1) / (np.float32(self.scale) * wavelengths)
        return (stretched * (np.float32(1) - kept) + plain * kept).astype(np.float32)

    def _feature(self, turns: float, dim: int) -> float:
        """Which pair of features turns so often in a text of the trained length."""
        length = self.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))


class LongRope(_Rope):
    """A factor for every pair of features, found by search, for short texts and for long ones
    (Ding et al. 2024, arXiv:2402.13753).
    """

    rope_type: Literal["longrope"]
    short_factor: tuple[PositiveFloat, ...]
    long_factor: tuple[PositiveFloat, ...]
    factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt
    max_position_embeddings: PositiveInt
    given_attention_factor: float | None = Field(default=None, alias="attention_factor")
    # Factors of attention for short and for long texts (Phi-3.5-MoE), in place of that.
    short_mscale: PositiveFloat | None = None
    long_mscale: PositiveFloat | None = None
    context: int = 0

    @model_validator(mode="after")
    def _same_length(self) -> "LongRope":
        if len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                f"{len(self.short_factor)} short and {len(self.long_factor)} long factors: "
                "expected as many of both"
            )
        if (self.short_mscale is None) != (self.long_mscale is None):
            raise ValueError("expected both of short_mscale and long_mscale, or none")
        return self

    @property
    def is_long(self) -> bool:
        return self.context > self.original_max_position_embeddings

    @property
    def attention_factor(self) -> float:
        if self.short_mscale is not None and self.long_mscale is not None:
            return self.long_mscale if self.is_long else self.short_mscale
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        original = self.original_max_position_embeddings
        factor = self.factor or self.max_position_embeddings / original
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    def for_context(self, context: int) -> "LongRope":
        return self.model_copy(update={"context": context})

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        factors = np.array(self.long_factor if self.is_long else self.short_factor, np.float32)
        wavelengths = self._wavelengths(self.rotary_dim(head_dim))
        if len(factors) != len(wavelengths):
            raise ValueError(f"{len(factors)} factors of longrope for {len(wavelengths)} pairs")
        return (np.float32(1) / (factors * wavelengths)).astype(np.float32)


def yarn_mscale(scale: float, mscale: float) -> float:
    """How much more the attention of stretched positions is concentrated (equation 22)."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


Rope = Annotated[
    DefaultRope | LinearRope | ProportionalRope | DynamicRope | Llama3Rope | YarnRope | LongRope,
    Field(discriminator="rope_type"),
]
ROPE_TYPES = ("default", "linear", "proportional", "dynamic", "llama3", "yarn", "longrope")

# Kinds that ask for the model's own lengths, which config.json gives outside of them.
ROPE_LENGTHS: dict[str, tuple[str, ...]] = {
    "dynamic": ("max_position_embeddings",),
    "llama3": ("original_max_position_embeddings",),
    "yarn": ("original_max_position_embeddings", "max_position_embeddings"),
    "longrope": ("original_max_position_embeddings", "max_position_embeddings"),
}
