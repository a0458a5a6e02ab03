"""What a request may use of another one's work. This is the plainest kind: nothing.

The other kinds are the pages of any common beginning (`SharedPages`), and whole sequences, where
pages alone do not make one (`KeptSequences`).
"""

from __future__ import annotations

from dataclasses import dataclass

from relaxlm.engine.job import Branch
from relaxlm.runtime.sequence_table import PagedSequences


@dataclass(frozen=True)
class Found:
    """So many of a reply's first tokens, in these pages; not yet held for it."""

    tokens: int
    pages: list[int]


class Reuse:
    """Gives replies their sequences, and takes them back."""

    def __init__(self, sequences: PagedSequences) -> None:
        self.sequences = sequences

    def find(self, branch: Branch) -> Found | None:
        """What there is of a reply's tokens, the last one excepted, which has to run."""
        return None

    def begin(self, branch: Branch, found: Found | None) -> None:
        """Give a reply its sequence, with what has just been found."""
        branch.seq, branch.computed = self.sequences.add(), 0

    def fork(self, branch: Branch, other: Branch) -> None:
        """Give another reply of a job a sequence with what the first one has computed."""
        other.seq = self.sequences.fork(branch.sequence)
        other.computed = branch.computed

    def most(self, branch: Branch) -> int:
        """How many tokens of a reply one step may compute."""
        return branch.remaining

    def computed(self, branch: Branch) -> None:
        """A step has computed a reply's tokens up to `branch.computed`."""

    def release(self, branch: Branch, keep: bool, preempted: bool = False) -> None:
        """Take a reply's sequence back.

        Args:
            keep: whether what it has computed is as it should be.
            preempted: others need its pages now.
        """
        self.sequences.free(branch.sequence)
        branch.seq, branch.computed = None, 0

    def evictable(self, found: Found | None = None) -> int:
        """Pages that are held here and nowhere else, apart from what has been found for a reply."""
        return 0

    def evict(self, pages: int) -> None:
        """Let go of so many such pages, or of all if there are fewer, the least used first."""

    def clear(self) -> None:
        """Let go of everything."""

    def held_pages(self) -> list[int]:
        """Every hold on a page that is no sequence's."""
        return []

    def held_sequences(self) -> int:
        """How many sequences are no reply's."""
        return 0

    def check(self) -> None:
        """Assert what the class says of itself."""
