"""Choosing a token from a row of which sums of weights over blocks, and a few blocks, are here.

A GPU has the row, and gives for every block of `peaks.BLOCK` logits the largest and the sum of
exp((logit - reference) / temperature), in float32. The token is the one that all of the row gives
in float64; where the sums' error (`sampling_choice.ROUGH`) leaves more than one, there is none.
"""

from collections.abc import Callable

import numpy as np

from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.peaks import BLOCK
from relaxlm.runtime.sampling_choice import (
    ROUGH,
    draw_weighted,
    is_float32_enough,
    kept_of_nucleus,
    weigh,
)

# Blocks with the largest logits in which the tokens that reach top_p together are looked for.
NUCLEUS_BLOCKS = 32


class RowBlocks:
    """What is known of a row.

    Args:
        row: [vocab] float32, right in the blocks that are known.
        peaks, sums: [blocks] float32 of the row.
        reference: of the sums.
        known: [blocks] bool.
        fetch: makes blocks of the row right, given their numbers.
    """

    def __init__(
        self,
        row: np.ndarray,
        peaks: np.ndarray,
        sums: np.ndarray,
        reference: float,
        known: np.ndarray,
        fetch: Callable[[np.ndarray], None],
    ) -> None:
        self.row, self.peaks, self.sums, self.reference = row, peaks, sums, reference
        self.known, self._fetch = known, fetch

    def fetch(self, blocks: np.ndarray) -> None:
        missing = blocks[~self.known[blocks]]
        if len(missing):
            self._fetch(missing)
            self.known[missing] = True

    def complete(self) -> None:
        """Make all of the row right."""
        self.fetch(np.arange(len(self.known)))


def choose_by_blocks(blocks: RowBlocks, config: GenerationConfig, uniform: float) -> int | None:
    """Steps 3 to 7 of sampling, without top_k; None where all of the row has to be looked at."""
    sums = blocks.sums.astype(np.float64)
    total = float(sums.sum())
    if not is_float32_enough(blocks.reference, config.temperature) or not 0 < total < np.inf:
        return None
    if config.top_p < 1:
        return _from_nucleus(blocks, config, uniform, total)
    return _from_all(blocks, config.temperature, uniform, np.cumsum(sums))


def _from_nucleus(
    blocks: RowBlocks, config: GenerationConfig, uniform: float, total: float
) -> int | None:
    row, known = blocks.row, blocks.known
    # All logits above what is not known are known.
    bound = blocks.peaks[~known].max(initial=-np.inf)
    numbers = np.flatnonzero(known)
    ids = (numbers[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
    ids = ids[ids < len(row)]
    ids = ids[row[ids] > bound]
    values = row[ids]
    ordered = np.sort(values)[::-1]
    sums = np.cumsum(weigh(ordered, blocks.reference, config.temperature))
    target, slack = config.top_p * total, 2 * ROUGH * total
    first, place = np.searchsorted(sums, [target - slack, target + slack])
    if not first == place < len(sums):
        return None
    kept = kept_of_nucleus(values, ordered, int(place))
    return draw_weighted(ids[kept], values[kept], config, uniform)


def _from_all(
    blocks: RowBlocks, temperature: float, uniform: float, ends: np.ndarray
) -> int | None:
    total = float(ends[-1])
    target = uniform * total
    block = int(np.searchsorted(ends, target, side="right"))
    if block == len(ends):
        return None
    blocks.fetch(np.array([block]))
    before = float(ends[block - 1]) if block else 0.0
    first = block * BLOCK
    part = blocks.row[first : first + BLOCK]
    sums = np.cumsum(weigh(part, blocks.reference, temperature)) + before
    place = int(np.searchsorted(sums, target, side="right"))
    lower = float(sums[place - 1]) if place else before
    error = ROUGH * total
    if place < len(sums) and lower + error < target < sums[place] - error:
        return first + place
    return None
