"""How large a library's cache has to be, and the sequences over a cache of that size."""

from dataclasses import dataclass
from typing import NamedTuple

from relaxlm.runtime.metadata import LibraryMetadata
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.state_slots import MOST_KEPT, StateSlots


class CacheMemory(NamedTuple):
    """Bytes."""

    kv_cache: int
    states: int


@dataclass(frozen=True)
class CacheSize:
    """What sequences have of the device's memory.

    Attributes:
        pages: of the KV cache.
        state_slots: of recurrent layers; 0 if there are none.
    """

    pages: int
    state_slots: int = 0

    @staticmethod
    def of(info: LibraryMetadata, pages: int, sequences: int, kept: int = 0) -> "CacheSize":
        """With states for so many sequences.

        Args:
            kept: earlier states of all sequences together.
        """
        return CacheSize(pages, slots_for(sequences, kept) if info.state.tensors else 0)

    def nbytes(self, info: LibraryMetadata) -> CacheMemory:
        """What a cache of this size takes at most."""
        cache = info.kv_cache
        return CacheMemory(
            self.pages * cache.page_size * cache.bytes_per_token,
            self.state_slots * info.state.bytes_per_sequence,
        )

    def sequences(self, info: LibraryMetadata) -> PagedSequences:
        """The page tables and slots of a library's sequences."""
        limits = info.limits
        return PagedSequences(
            PagePool(self.pages),
            info.kv_cache.page_size,
            limits.sliding_window_size,
            limits.attention_sink_size,
            states=StateSlots(PagePool(self.state_slots), MOST_KEPT) if self.state_slots else None,
        )


def pages_for(info: LibraryMetadata, tokens: int, chunk: int | None = None) -> int:
    """The most pages that one sequence of a library ever holds.

    Args:
        tokens: its length at the end.
        chunk: the most tokens of one step; None for as many as the library takes.
    """
    limits = info.limits
    return pages_per_sequence(
        tokens,
        chunk or limits.prefill_chunk_size,
        info.kv_cache.page_size,
        limits.sliding_window_size,
        limits.attention_sink_size,
    )


def pages_per_sequence(
    tokens: int, chunk: int, page_size: int, window: int = 0, sinks: int = 0
) -> int:
    """The most pages that one sequence ever holds.

    Args:
        tokens: its length at the end.
        chunk: the most tokens that one step appends to it.
    """
    pages = -(-tokens // page_size)
    if not window:
        return pages
    # At worst the oldest visible token is the last of its page, and a whole chunk is appended.
    sliding = -(-sinks // page_size) + -(-(page_size - 1 + window - 1 + chunk) // page_size)
    return min(pages, sliding)


def slots_for(sequences: int, kept: int = 0) -> int:
    """Slots with which no step of so many sequences lacks one.

    Args:
        kept: earlier states of all sequences together.
    """
    # Each is written to one of its own. A slot that is only read was shared by two at least.
    return sequences + sequences // 2 + kept
