"""The logits of a step, of which a CPU fetches from a GPU what choosing tokens looks at.

A row of 150 000 logits is 600 KB. So the library finds the peaks of rows on the GPU (`peaks.py`);
these come first, 2.4 KB of each row, then as many sums of weights where all tokens' weights count,
and the blocks of 1 KB that a request's sampling looks into (`sampling.blocks_read`). `sample` sees
them where they are in the row, and chooses the token that it would choose if all had come.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from relaxlm.runtime.generation import SamplingState
from relaxlm.runtime.peaks import BLOCK, of_row
from relaxlm.runtime.sampling import BlocksRead, blocks_read
from relaxlm.runtime.sampling_by_blocks import RowBlocks
from relaxlm.runtime.sampling_choice import weigh

# So many logits are looked at in less time than the library's function takes to begin: with 4 096,
# greedy, 2 us to 7, and with 32 000 4 us to 9.
_FEW = 1 << 15


class Seen(NamedTuple):
    """What `sample` is given beside states: see there."""

    logits: np.ndarray
    peaks: np.ndarray | None
    blocks: list[RowBlocks | None] | None = None


class StepLogits:
    """Rows of logits [m, vocab] float32 in the memory that `sample` reads.

    Args:
        peaks: gives those of the rows, [m, blocks] float32; None where there are none.
    """

    def __init__(self, rows: np.ndarray, peaks: Callable[[], np.ndarray] | None = None) -> None:
        self._rows, self._find_peaks = rows, peaks
        self._peaks: np.ndarray | None = None

    def all(self) -> np.ndarray:
        """[m, vocab] float32, good until the next step."""
        return self._rows

    def seen_by(self, picked: Sequence[int], states: Sequence[SamplingState]) -> Seen:
        """What `sample` needs to choose a token for each state.

        Args:
            picked: the row for each state.

        Returns:
            Logits, of which only what the states' sampling looks at is sure to be right, and what
            is known of them besides.
        """
        where = _slice_of(picked)
        if len(picked) * self._rows.shape[1] <= _FEW:
            return Seen(self._rows[where], None)
        peaks = self.peaks()
        return Seen(self._rows[where], None if peaks is None else peaks[where])

    def peaks(self) -> np.ndarray | None:
        """[m, blocks] float32, computed when they are first asked for."""
        if self._peaks is None and self._find_peaks is not None:
            self._peaks = self._find_peaks()
        return self._peaks


class DeviceLogits(StepLogits):
    """Rows that a GPU has.

    Args:
        vocab: logits of a row.
        download: gives all rows, [m, vocab] float32.
        peaks: gives their peaks, [m, blocks] float32.
        gather: gives blocks, [k, BLOCK] float32, by their places [k] int32: i * blocks + j for
            block j of row i.
        weigh: gives sums of exp((logit - reference) factor) over blocks, [k, blocks] float32, from
            rows [k] int32, references and factors [k] float32.
    """

    def __init__(
        self,
        vocab: int,
        download: Callable[[], np.ndarray],
        peaks: Callable[[], np.ndarray],
        gather: Callable[[np.ndarray], np.ndarray],
        weigh: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        self._vocab, self._download, self._gather, self._weigh = vocab, download, gather, weigh
        self._find_peaks: Callable[[], np.ndarray] | None = peaks
        self._peaks: np.ndarray | None = None
        self._whole: np.ndarray | None = None

    def all(self) -> np.ndarray:
        if self._whole is None:
            self._whole = self._download()
        return self._whole

    def seen_by(self, picked: Sequence[int], states: Sequence[SamplingState]) -> Seen:
        peaks = self.peaks()
        assert peaks is not None
        peaks = peaks[list(picked)]
        count = -(-self._vocab // BLOCK)
        read = [blocks_read(row, state) for row, state in zip(peaks, states, strict=True)]
        every = np.arange(count)
        wanted = [every if some is None else some.blocks for some in read]
        # Many rows in full come faster without a detour.
        if self._whole is not None or sum(map(len, wanted)) * 2 > len(peaks) * count:
            return Seen(self.all()[list(picked)], peaks)
        rows = _unset(len(picked), count, BLOCK)

        def fetch(some: list[tuple[int, np.ndarray]]) -> None:
            sources = np.concatenate([picked[i] * count + blocks for i, blocks in some])
            targets = np.concatenate([i * count + blocks for i, blocks in some])
            rows.reshape(-1, BLOCK)[targets] = self._gather(sources.astype(np.int32))

        def fetch_one(i: int, blocks: np.ndarray) -> None:
            fetch([(i, blocks)])

        fetch(list(enumerate(wanted)))
        logits = rows.reshape(len(picked), -1)[:, : self._vocab]
        known: list[RowBlocks | None] = [None] * len(picked)
        for i, sums in self._sums(picked, states, read):
            some, temperature = read[i], states[i].config.temperature
            assert some is not None
            row = logits[i, : states[i].vocab_size]
            known[i] = _row_blocks(row, peaks[i], sums, some, temperature, partial(fetch_one, i))
        return Seen(logits, peaks, known)

    def _sums(
        self,
        picked: Sequence[int],
        states: Sequence[SamplingState],
        read: Sequence[BlocksRead | None],
    ) -> list[tuple[int, np.ndarray]]:
        """Of those that are drawn from by them: places in `picked`, and sums [blocks] float32."""
        drawn, given = [], []
        for i, some in enumerate(read):
            if some is not None and some.reference is not None:
                drawn.append(i)
                given.append(some.reference)
        if not drawn:
            return []
        references = np.array(given, np.float32)
        with np.errstate(over="ignore", divide="ignore"):  # then sums are not used
            factors = np.array([1 / states[i].config.temperature for i in drawn], np.float32)
        rows = np.array([picked[i] for i in drawn], np.int32)
        return list(zip(drawn, self._weigh(rows, references, factors), strict=True))


def _row_blocks(
    row: np.ndarray,
    peaks: np.ndarray,
    sums: np.ndarray,
    read: BlocksRead,
    temperature: float,
    fetch: Callable[[np.ndarray], None],
) -> RowBlocks:
    """What is known of a row without its padding."""
    assert read.reference is not None
    whole, rest = divmod(len(row), BLOCK)
    sums = sums[: whole + (rest > 0)].copy()
    if rest:
        with np.errstate(over="ignore"):
            sums[whole] = weigh(row[whole * BLOCK :], read.reference, temperature).sum()
    known = np.zeros(len(sums), bool)
    known[read.blocks] = True
    return RowBlocks(row, of_row(peaks, row), sums, read.reference, known, fetch)


def _unset(*shape: int) -> np.ndarray:
    """Float32 that is only read where it has been written."""
    return np.empty(shape, np.float32)


def _slice_of(picked: Sequence[int]) -> slice | list[int]:
    """The same rows without copying them, where they follow each other."""
    first = picked[0]
    if list(picked) == list(range(first, first + len(picked))):
        return slice(first, first + len(picked))
    return list(picked)
