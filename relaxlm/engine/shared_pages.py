"""Requests share the pages of their common beginnings."""

from __future__ import annotations

from dataclasses import dataclass

from relaxlm.engine.job import Branch
from relaxlm.engine.prefix_cache import Node, PrefixCache
from relaxlm.engine.reuse import Found, Reuse
from relaxlm.runtime.sequence_table import PagedSequences


@dataclass(frozen=True)
class _InTree(Found):
    """`node`: of the last page that is matched as a whole."""

    node: Node


class SharedPages(Reuse):
    """Puts pages into a `PrefixCache`: full ones once computed, the last when a reply ends.

    Needs sequences that are made of their pages: no sliding window, no recurrent layers.
    """

    def __init__(self, sequences: PagedSequences) -> None:
        super().__init__(sequences)
        assert not sequences.window and sequences.states is None
        self.cache = PrefixCache(sequences.pool, sequences.page_size)

    def find(self, branch: Branch) -> Found | None:
        match = self.cache.find(branch.ids, len(branch.ids) - 1)
        return _InTree(match.tokens, match.pages, match.node) if match.tokens else None

    def begin(self, branch: Branch, found: Found | None) -> None:
        if found is None:
            super().begin(branch, found)
            return
        assert isinstance(found, _InTree)
        branch.seq, branch.computed = self.sequences.adopt(found.pages, found.tokens), found.tokens
        branch.node, branch.registered = found.node, found.tokens // self.sequences.page_size

    def fork(self, branch: Branch, other: Branch) -> None:
        super().fork(branch, other)
        other.node, other.registered = branch.node, branch.registered

    def computed(self, branch: Branch) -> None:
        if branch.computed // self.sequences.page_size > branch.registered:
            self._register(branch)

    def release(self, branch: Branch, keep: bool, preempted: bool = False) -> None:
        if keep:
            self._register(branch)
            rest = branch.ids[branch.registered * self.sequences.page_size : branch.computed]
            if rest:
                assert branch.node is not None
                page = self.sequences.pages(branch.sequence)[branch.registered]
                self.cache.insert(branch.node, rest, page)
        super().release(branch, keep, preempted)
        branch.node, branch.registered = None, 0

    def evictable(self, found: Found | None = None) -> int:
        pool, wanted = self.sequences.pool, [] if found is None else found.pages
        return self.cache.evictable() - sum(pool.holders(page) == 1 for page in wanted)

    def evict(self, pages: int) -> None:
        self.cache.evict(pages)

    def clear(self) -> None:
        self.cache.clear()

    def held_pages(self) -> list[int]:
        return self.cache.pages()

    def check(self) -> None:
        self.cache.check()

    def _register(self, branch: Branch) -> None:
        """Share the pages that are full."""
        size, pages = self.sequences.page_size, self.sequences.pages(branch.sequence)
        if branch.node is None or branch.node.removed:
            branch.node, branch.registered = self.cache.root, 0
        full = branch.computed // size
        for page in range(branch.registered, full):
            tokens = branch.ids[page * size : (page + 1) * size]
            branch.node = self.cache.insert(branch.node, tokens, pages[page])
        branch.registered = full
