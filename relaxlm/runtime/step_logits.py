"""The logits of a step, of which a CPU fetches from a GPU what choosing tokens looks at.

A row of 150 000 logits is 600 KB. So the library finds the peaks of rows on the GPU (`peaks.py`);
these come first, 2.4 KB of each row, and then the blocks of 1 KB that a request's sampling looks
into (`sampling.blocks_read`). `sample` sees them where they are in the row, and chooses the token
that it would choose if all had come.
"""

from collections.abc import Callable, Sequence

import numpy as np

from relaxlm.runtime.generation import SamplingState
from relaxlm.runtime.peaks import BLOCK
from relaxlm.runtime.sampling import blocks_read


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

    def seen_by(
        self, picked: Sequence[int], states: Sequence[SamplingState]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """What `sample` needs to choose a token for each state.

        Args:
            picked: the row for each state.

        Returns:
            [k, vocab] float32, of which only what the states' sampling looks at needs to be right,
            and the peaks [k, blocks] float32, or None.
        """
        where = _slice_of(picked)
        peaks = self.peaks()
        return self._rows[where], None if peaks is None else peaks[where]

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
    """

    def __init__(
        self,
        vocab: int,
        download: Callable[[], np.ndarray],
        peaks: Callable[[], np.ndarray],
        gather: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self._vocab, self._download, self._gather = vocab, download, gather
        self._find_peaks: Callable[[], np.ndarray] | None = peaks
        self._peaks: np.ndarray | None = None
        self._whole: np.ndarray | None = None

    def all(self) -> np.ndarray:
        if self._whole is None:
            self._whole = self._download()
        return self._whole

    def seen_by(
        self, picked: Sequence[int], states: Sequence[SamplingState]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        peaks = self.peaks()
        assert peaks is not None
        peaks = peaks[list(picked)]
        blocks = -(-self._vocab // BLOCK)
        every = np.arange(blocks)
        found = [blocks_read(row, state) for row, state in zip(peaks, states, strict=True)]
        read = [every if some is None else some for some in found]
        # Many rows in full come faster without a detour.
        if self._whole is not None or sum(map(len, read)) * 2 > len(peaks) * blocks:
            return self.all()[list(picked)], peaks
        rows = _unset(len(picked), blocks, BLOCK)
        targets = np.concatenate([i * blocks + some for i, some in enumerate(read)])
        sources = np.concatenate([i * blocks + some for i, some in zip(picked, read, strict=True)])
        rows.reshape(-1, BLOCK)[targets] = self._gather(sources.astype(np.int32))
        return rows.reshape(len(picked), -1)[:, : self._vocab], peaks


def _unset(*shape: int) -> np.ndarray:
    """Float32 that is only read where it has been written."""
    return np.empty(shape, np.float32)


def _slice_of(picked: Sequence[int]) -> slice | list[int]:
    """The same rows without copying them, where they follow each other."""
    first = picked[0]
    if list(picked) == list(range(first, first + len(picked))):
        return slice(first, first + len(picked))
    return list(picked)
