"""The tables of one step, made from its sequences, and made again for the next one."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.state_slots import SequenceState, StateSlots

NO_NUMBERS = np.empty(0, np.int32)


class BatchTables(NamedTuple):
    """What a step over b sequences and n tokens needs to know, in `forward`'s order; all int32.

    Sequence i has the tokens row_offsets[i] .. row_offsets[i + 1] - 1 of the step and, counting
    them, kv_lengths[i] tokens in the pages page_ids[page_offsets[i] : page_offsets[i + 1]]. What
    recurrent layers keep of it is read from one slot of their tensors and written to one; without
    such layers, the two last tables are empty.

    Good until the next step's tables are made, which may overwrite these.
    """

    positions: np.ndarray  # [n] absolute position of each token
    slots: np.ndarray  # [n] where its K and V go: page * page_size + offset in the page
    row_offsets: np.ndarray  # [b + 1]
    page_offsets: np.ndarray  # [b + 1]
    page_ids: np.ndarray  # [page_offsets[b]]
    kv_lengths: np.ndarray  # [b] cached tokens after the step
    dropped: np.ndarray  # [b] tokens that left the table between sinks and window
    state_sources: np.ndarray = NO_NUMBERS  # [b]
    state_targets: np.ndarray = NO_NUMBERS  # [b]


class TextTables(NamedTuple):
    """The same for a step of an encoder over b whole texts; text i has the tokens
    row_offsets[i] .. row_offsets[i + 1] - 1 of the step."""

    positions: np.ndarray  # [n] place of each token in its text
    row_offsets: np.ndarray  # [b + 1]


def text_tables(lengths: Sequence[int]) -> TextTables:
    """Tables of a step over texts of so many tokens."""
    row_offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=row_offsets[1:])
    positions = np.arange(row_offsets[-1], dtype=np.int32)
    return TextTables(positions - np.repeat(row_offsets[:-1], lengths), row_offsets)


@dataclass(slots=True)
class PagedSequence:
    """What is known of one sequence; `PagedSequences` changes it."""

    length: int = 0  # tokens so far, the dropped ones included
    dropped: int = 0  # tokens, a multiple of page_size
    pages: array = field(default_factory=lambda: array("i"))
    state: SequenceState = field(default_factory=SequenceState)  # of recurrent layers, if any


def step_tables(sequences: list[PagedSequence], counts: list[int], size: int) -> BatchTables:
    """Tables of a step that has just given each sequence so many tokens; pages hold `size`."""
    ids = array("i")
    ends = [0]
    for sequence in sequences:
        ids.extend(sequence.pages)
        ends.append(len(ids))
    page_ids = np.frombuffer(ids, np.int32)
    page_offsets = np.array(ends, np.int32)
    dropped = np.array([sequence.dropped for sequence in sequences], np.int32)
    lengths = np.array([sequence.length for sequence in sequences], np.int32)
    kv_lengths = lengths - dropped
    if max(counts) == 1:  # decoding: each new token is the last of its sequence
        row_offsets = np.arange(len(counts) + 1, dtype=np.int32)
        positions = lengths - np.int32(1)
        pages = page_ids[page_offsets[1:] - 1]
        # Pages begin at multiples of page_size, and so does what is dropped.
        slots = pages * np.int32(size) + positions % np.int32(size)
    else:
        row_offsets = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=row_offsets[1:])
        # A token's position follows from its place in the step by its sequence's own shift.
        shift = np.repeat(lengths - row_offsets[1:], counts)
        positions = np.arange(row_offsets[-1], dtype=np.int32) + shift
        cached = positions - np.repeat(dropped, counts)
        pages = page_ids[np.repeat(page_offsets[:-1], counts) + cached // np.int32(size)]
        slots = pages * np.int32(size) + positions % np.int32(size)
    return BatchTables(positions, slots, row_offsets, page_offsets, page_ids, kv_lengths, dropped)


class Decoding:
    """A step that gave each of its sequences one token, kept to be repeated with the next one.

    As long as nobody's page is full, three columns of its tables count up and the others stay: the
    slots of recurrent states, too, as long as each is read and written at one place. What
    a step has to do is small, but finds nothing in the caches after the weights have been through
    them: so only plain integers are touched, and few.
    """

    def __init__(
        self,
        steps: Sequence[tuple[int, int]],
        sequences: list[PagedSequence],
        tables: BatchTables,
        again: int,
    ) -> None:
        """
        Args:
            again: how often, at most, the step can be repeated.
        """
        self.steps, self.sequences, self.tables, self.again = list(steps), sequences, tables, again
        self._columns = [c.data for c in (tables.positions, tables.slots, tables.kv_lengths)]

    def fits(
        self, steps: Sequence[tuple[int, int]], pool: PagePool, slots: StateSlots | None
    ) -> bool:
        """Whether such a step is this one again. Nobody else may read what it writes to."""
        if self.again < 1 or self.steps != steps:
            return False
        for sequence in self.sequences:
            if pool.holders(sequence.pages[-1]) > 1:
                return False
            if slots is not None and not slots.is_alone(sequence.state):
                return False
        return True

    def repeat(self) -> BatchTables:
        self.again -= 1
        positions, slots, kv_lengths = self._columns
        for i, sequence in enumerate(self.sequences):
            sequence.length += 1
            positions[i] += 1
            slots[i] += 1
            kv_lengths[i] += 1
        return self.tables
