"""Steps in which every sequence has one token, recorded as CUDA graphs.

A library that was compiled with `--opt cuda_graph=1` has a function `decode` for them, with buffers
of its own. What it launches depends on two numbers: the sequences, and the length of the table of
pages, from which attention takes the number of parts that it cuts contexts into. So that length is
rounded up to a power of two, and with few keys everything that a step needs is known from its key.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from relaxlm.runtime.cuda_graphs import CudaGraphs
from relaxlm.runtime.metadata import LibraryMetadata
from relaxlm.runtime.step_inputs import SharedInputs
from relaxlm.runtime.step_tables import BatchTables

# The function's name; `decode_storage` makes its buffers.
DECODE = "decode"
# With more sequences kernels take longer, so that launching them counts for less, and the buffer of
# logits is large.
_MOST_SEQUENCES = 64
# The shortest table of pages: of contexts that attention does not cut in any case.
LEAST_PAGES = 16
# Among a step's arrays, behind the token ids.
_ROW_OFFSETS = 1 + BatchTables._fields.index("row_offsets")
_PAGE_IDS = 1 + BatchTables._fields.index("page_ids")


def most_sequences(max_batch_size: int) -> int:
    """Of a step that can be a graph, for a library of that limit."""
    return min(max_batch_size, _MOST_SEQUENCES)


class DecodeSteps:
    """Runs `decode` of a library, by graphs where that is possible.

    Args:
        machine: the library's functions by name.
        rest: the arguments behind the step's arrays: cache, states, parameters.

    Attributes:
        by_graphs: whether graphs are made and used; without, logits are the same bit by bit.
    """

    def __init__(
        self, machine: Any, metadata: LibraryMetadata, device: Any, rest: Sequence[Any]
    ) -> None:
        limits = metadata.limits
        self._run = machine[DECODE]
        self._rest = (*rest, machine[f"{DECODE}_storage"]())
        self._most = most_sequences(limits.max_batch_size)
        self._most_pages = self._most * -(
            -limits.context_window_size // metadata.kv_cache.page_size
        )
        longest = [self._most + 1] * (len(BatchTables._fields) + 2) + [self._most_pages]
        self._inputs = SharedInputs(device, SharedInputs.needed(longest))
        self.graphs = CudaGraphs(device)
        self.by_graphs = True

    def can_run(self, arrays: Sequence[np.ndarray]) -> bool:
        """Whether a step has one token, and one row of logits, for each of not too many sequences.

        Args:
            arrays: as for `logits`.
        """
        sequences = len(arrays[_ROW_OFFSETS]) - 1
        return len(arrays[0]) == len(arrays[-1]) == sequences <= self._most

    def logits(self, arrays: Sequence[np.ndarray]) -> Any:
        """Run one step.

        Args:
            arrays: token ids [b], the tables of the step, and the rows of the logits [b].

        Returns:
            The logits [b, vocab] float32 on the device, good until the next step.
        """
        padded = list(arrays)
        padded[_PAGE_IDS] = self._padded(arrays[_PAGE_IDS])
        inputs = self._inputs.fill(padded)
        if not self.by_graphs:
            return self._run(*inputs, *self._rest)
        key = len(arrays[0]), len(padded[_PAGE_IDS])
        return self.graphs.run(key, lambda: self._run(*inputs, *self._rest))

    def _padded(self, page_ids: np.ndarray) -> np.ndarray:
        """[p] with page 0, which nobody reads, up to a power of two or the longest table."""
        count = len(page_ids)
        length = min(max(LEAST_PAGES, 1 << (count - 1).bit_length()), self._most_pages)
        padded = np.zeros(max(length, count), np.int32)
        padded[:count] = page_ids
        return padded
