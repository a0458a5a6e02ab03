"""Requests go on from sequences that earlier ones have left.

Pages alone do not make a sequence if a sliding window has dropped some, or if recurrent layers have
a state beside them. Then whole sequences are kept, each good for the requests that begin with all
of its tokens. There are few, so they are left where a later request is likely to go on:

1. Where a reply ends: the next turn of its conversation.
2. Shortly before the end of a prompt, in front of the reply's own beginning: another reply to it,
   or a next turn that repeats the last reply in other tokens or without its reasoning.
3. Where a prompt has turned out to differ from an earlier one, as behind a system message that
   requests have in common: the third of them goes on from there.

A sequence is kept by forking it, which takes no page and no slot. The least recently used one goes
first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from relaxlm.engine.job import Branch
from relaxlm.engine.reuse import Found, Reuse
from relaxlm.runtime.sequence_table import PagedSequences


@dataclass(eq=False, slots=True)
class _Kept:
    """A sequence that no reply has: its number, and its tokens [n] int32."""

    seq: int
    ids: np.ndarray


@dataclass(frozen=True)
class _InSequences(Found):
    """`kept` has these tokens and no others; `alike` of the reply's first ones are in some."""

    kept: _Kept | None
    alike: int


class KeptSequences(Reuse):
    """Up to `most` sequences that wait for a request to go on from.

    Args:
        tail: tokens at the end of a prompt that later ones may not share.
        worth: tokens between a place to keep and the one before it; fewer are soon computed again.
    """

    def __init__(
        self, sequences: PagedSequences, most: int, tail: int = 16, worth: int = 64
    ) -> None:
        super().__init__(sequences)
        self.most_kept, self.tail, self.worth = most, tail, worth
        self.kept: list[_Kept] = []  # the least recently used first

    def find(self, branch: Branch) -> Found:
        ids = np.array(branch.ids[:-1], np.int32)
        best, alike = None, 0
        for kept in self.kept:
            common = _common(kept.ids, ids)
            alike = max(alike, common)
            if common == len(kept.ids) and (best is None or common > len(best.ids)):
                best = kept
        if best is None:
            return _InSequences(0, [], None, alike)
        self._used(best)
        return _InSequences(len(best.ids), self.sequences.pages(best.seq), best, alike)

    def begin(self, branch: Branch, found: Found | None) -> None:
        if isinstance(found, _InSequences) and found.kept is not None:
            branch.seq, branch.computed = self.sequences.fork(found.kept.seq), found.tokens
        else:
            super().begin(branch, found)
        alike = found.alike if isinstance(found, _InSequences) else 0
        branch.marks = self._marks(sorted((alike, len(branch.ids) - self.tail)), branch.computed)

    def most(self, branch: Branch) -> int:
        return branch.marks[0] - branch.computed if branch.marks else branch.remaining

    def computed(self, branch: Branch) -> None:
        if branch.marks and branch.computed == branch.marks[0]:
            del branch.marks[0]
            self._keep(self.sequences.fork(branch.sequence), branch)

    def release(self, branch: Branch, keep: bool, preempted: bool = False) -> None:
        # A conversation goes on with the first of several replies.
        if keep and not preempted and branch.index == 0 and branch.computed >= self.worth:
            self._keep(branch.sequence, branch)
            branch.seq, branch.computed = None, 0
        else:
            super().release(branch, keep, preempted)
        branch.marks = []

    def evictable(self, found: Found | None = None) -> int:
        wanted = set() if found is None else set(found.pages)
        holds = Counter(page for kept in self.kept for page in self.sequences.pages(kept.seq))
        pool = self.sequences.pool
        return sum(
            pool.holders(page) == count for page, count in holds.items() if page not in wanted
        )

    def evict(self, pages: int) -> None:
        pool = self.sequences.pool
        wanted = pool.free + pages
        while self.kept and pool.free < wanted:
            self.sequences.free(self.kept.pop(0).seq)

    def clear(self) -> None:
        while self.kept:
            self.sequences.free(self.kept.pop().seq)

    def held_sequences(self) -> int:
        return len(self.kept)

    def check(self) -> None:
        assert len(self.kept) <= self.most_kept
        for kept in self.kept:
            assert self.sequences.length(kept.seq) == len(kept.ids) > 0
        texts = {kept.ids.tobytes() for kept in self.kept}
        assert len(texts) == len(self.kept), "a sequence is kept twice"

    def _marks(self, places: list[int], computed: int) -> list[int]:
        marks: list[int] = []
        for place in places:
            if place - (marks[-1] if marks else computed) >= self.worth:
                marks.append(place)
        return marks

    def _keep(self, seq: int, branch: Branch) -> None:
        """Keep a sequence, which has the reply's tokens up to `computed`."""
        ids = np.array(branch.ids[: branch.computed], np.int32)
        for kept in self.kept:
            if np.array_equal(kept.ids, ids):
                self._used(kept)
                self.sequences.free(seq)
                return
        self.kept.append(_Kept(seq, ids))
        if len(self.kept) > self.most_kept:
            self.sequences.free(self.kept.pop(0).seq)

    def _used(self, kept: _Kept) -> None:
        self.kept.remove(kept)
        self.kept.append(kept)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many of the first tokens are the same."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
