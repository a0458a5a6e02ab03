"""Linear biases in place of positions (ALiBi: Press, Smith and Lewis 2021, arXiv:2108.12409).

The score of a key loses a slope of its query head for every token that it lies behind the query.
The difference of two positions is all that counts, so texts may go on beyond the trained length.
"""

import math
from typing import Any

from relaxlm.models.config import DecoderConfig


def slopes(heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """What scores of each query head lose per token of distance, [heads].

    Powers of 2 with exponents in equal steps down to -bias_max. Where the number of heads is no
    power of 2, every second one of those for the next power comes first, then the others.
    """
    power = 2 ** math.ceil(math.log2(heads))
    steps = [2.0 ** (-bias_max * (i + 1) / power) for i in range(power)]
    return tuple(steps if power == heads else (steps[1::2] + steps[::2])[:heads])


class AlibiConfig(DecoderConfig):
    """A decoder that knows distances by ALiBi, unless it has rotary embeddings."""

    rope: Any = None

    @property
    def alibi_slopes(self) -> tuple[float, ...] | None:
        return slopes(self.num_attention_heads) if self.rope is None else None

    def for_context(self, context: int) -> "DecoderConfig":
        return self if self.rope is None else super().for_context(context)
