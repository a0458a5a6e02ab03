"""Pages of the KV cache by the tokens that they hold, so that requests share their prompts' work.

A tree. A node stands for one page and is found from its parent by the page's tokens, so the way
from the root to a node spells a prefix. Every node but a leaf has a full page; a leaf may have a
page that is partly filled. The tree holds each of its pages once (`PagePool.retain`), and so a
page stays when the request that computed it has ended, until it is evicted: least recently used
leaves first, and none that a sequence holds, too.

A prefix may end within a page: the sequence then shares the page up to there, and gets a copy of
it when it appends (`PagedSequences`).

The idea is SGLang's RadixAttention (Zheng et al. 2024, section 3), with pages for edges.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import islice

from relaxlm.runtime.page_pool import PagePool

# How many of a node's children, the latest first, are compared for a prefix that ends within a
# page. More would cost time with thousands of unrelated prompts, and gain less than one page.
_COMPARED = 16
_BYTES = array("i").itemsize


@dataclass(eq=False, slots=True)
class Node:
    """A page and its place in the tree; the root has no page (-1)."""

    parent: Node | None
    key: bytes  # the page's tokens, int32
    page: int
    used: int = 0  # when it was last used: the cache's own count
    removed: bool = False
    children: dict[bytes, Node] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return len(self.key) // _BYTES


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache holds of a prompt.

    Attributes:
        tokens: how many of its first tokens.
        pages: where, the last possibly only in part; not yet held for the caller.
        node: of the last page that is matched as a whole (the root if none is).
    """

    tokens: int
    pages: list[int]
    node: Node


class PrefixCache:
    """The tree over one pool. Token ids are `array("i")`. Not thread-safe."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool, self.page_size = pool, page_size
        self.root = Node(None, b"", -1)
        self._count = 0
        self._clock = 0

    def __len__(self) -> int:
        """Pages that the tree holds."""
        return self._count

    def find(self, ids: array, limit: int) -> Match:
        """The longest prefix of ids[:limit] that is cached."""
        self._clock += 1
        size, node, at = self.page_size, self.root, 0
        pages: list[int] = []
        while at + size <= limit:
            child = node.children.get(ids[at : at + size].tobytes())
            if child is None:
                break
            child.used = self._clock
            pages.append(child.page)
            node, at = child, at + size
        rest = ids[at : min(limit, at + size)]
        closest, common = None, 0
        if rest:
            for child in islice(reversed(node.children.values()), _COMPARED):
                length = _common(child.key, rest)
                if length > common:
                    closest, common = child, length
        if closest is not None:
            closest.used = self._clock
            pages.append(closest.page)
        return Match(at + common, pages, node)

    def insert(self, parent: Node, tokens: array, page: int) -> Node:
        """Put a page behind another one, unless one with the same tokens is there; that is kept.

        Args:
            parent: the root, or a node with a full page that has not been removed.
            tokens: of the page, computed, at least one.

        Returns:
            The node with these tokens.
        """
        assert 0 < len(tokens) <= self.page_size and not parent.removed
        assert parent is self.root or parent.tokens == self.page_size
        self._clock += 1
        key = tokens.tobytes()
        node = parent.children.get(key)
        if node is None:
            covered = len(tokens) < self.page_size and any(
                other.startswith(key) for other in parent.children
            )
            if covered:  # a page with these tokens and more is there
                return parent
            for other in [other for other in parent.children.values() if key.startswith(other.key)]:
                self._remove(other)  # a leaf with fewer of these tokens
            self.pool.retain([page])
            node = parent.children[key] = Node(parent, key, page)
            self._count += 1
        node.used = self._clock
        return node

    def evictable(self) -> int:
        """Pages that no one else holds."""
        return sum(self.pool.holders(node.page) == 1 for node in self._nodes())

    def evict(self, pages: int) -> int:
        """Let go of at least that many pages that no one else holds, or of all of them.

        Returns:
            How many are free now that were not before.
        """
        # A search through the tree costs the same for one page as for many.
        wanted = max(pages, self._count // 32)
        leaves = [(node.used, id(node), node) for node in self._nodes() if self._is_removable(node)]
        heapify(leaves)
        freed = 0
        while leaves and freed < wanted:
            _, _, node = heappop(leaves)
            parent = node.parent
            assert parent is not None
            self._remove(node)
            freed += 1
            if parent is not self.root and self._is_removable(parent):
                heappush(leaves, (parent.used, id(parent), parent))
        return freed

    def clear(self) -> None:
        """Let go of all pages."""
        nodes = list(self._nodes())
        self.pool.release([node.page for node in nodes])
        for node in nodes:
            node.removed = True
        self.root.children.clear()
        self._count = 0

    def pages(self) -> list[int]:
        """All pages that the tree holds, for `PagedSequences.check`."""
        return [node.page for node in self._nodes()]

    def check(self) -> None:
        """Assert that the tree is what the module says."""
        nodes = list(self._nodes())
        assert len(nodes) == self._count, f"{len(nodes)} nodes, counted {self._count}"
        pages = [node.page for node in nodes]
        assert len(set(pages)) == len(pages), f"a page is twice in the tree: {pages}"
        for node in nodes:
            assert node.parent is not None and node.parent.children[node.key] is node
            assert not node.children or node.tokens == self.page_size
            assert self.pool.holders(node.page) >= 1

    def _nodes(self) -> Iterator[Node]:
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def _is_removable(self, node: Node) -> bool:
        return not node.children and self.pool.holders(node.page) == 1

    def _remove(self, node: Node) -> None:
        assert node.parent is not None and not node.children
        del node.parent.children[node.key]
        node.removed = True
        self.pool.release([node.page])
        self._count -= 1


def _common(key: bytes, tokens: array) -> int:
    """How many of the first tokens are the same."""
    other = array("i", key)
    return next(
        (i for i, (a, b) in enumerate(zip(other, tokens, strict=False)) if a != b),
        min(len(other), len(tokens)),
    )
