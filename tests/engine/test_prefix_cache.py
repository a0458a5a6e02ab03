"""The tree of cached pages against a list of all that was ever put into it."""

from array import array
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaxlm.engine.prefix_cache import PrefixCache
from relaxlm.runtime.page_pool import PagePool

SIZE = 2
TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def cached(cache: PrefixCache, text: list[int]) -> list[int]:
    """Put a text's pages into the cache, as a request that computed them would; the pages."""
    ids, node = array("i", text), cache.root
    pages = cache.pool.alloc(-(-len(text) // SIZE))
    for i, page in enumerate(pages):
        node = cache.insert(node, ids[i * SIZE : (i + 1) * SIZE], page)
    cache.pool.release(pages)
    return pages


def common(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@given(texts=st.lists(TEXTS, max_size=12), wanted=TEXTS, limit=st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_the_longest_cached_prefix_is_found(texts, wanted, limit):
    cache = PrefixCache(PagePool(64), SIZE)
    for text in texts:
        cached(cache, text)
        cache.check()
    limit = min(limit, len(wanted))
    match = cache.find(array("i", wanted), limit)
    assert match.tokens == max((common(wanted[:limit], text) for text in texts), default=0)
    assert len(match.pages) == -(-match.tokens // SIZE) == len(set(match.pages))
    cache.pool.check(cache.pages())


def test_a_page_that_is_cached_already_is_not_cached_twice():
    cache = PrefixCache(PagePool(8), SIZE)
    first, second = cached(cache, [1, 2, 3, 4]), cached(cache, [1, 2, 5, 6])
    assert cache.find(array("i", [1, 2, 5, 6]), 4).pages == [first[0], second[1]]
    assert len(cache) == 3 and cache.pool.used == 3


def test_a_page_with_more_of_the_same_tokens_takes_the_place_of_one_with_fewer():
    cache = PrefixCache(PagePool(8), SIZE)
    cached(cache, [1, 2, 3])
    longer = cached(cache, [1, 2, 3, 4])
    cached(cache, [1, 2, 3])
    assert len(cache) == 2
    assert cache.find(array("i", [1, 2, 3]), 3).pages[-1] == longer[1]


def test_eviction_takes_the_least_recently_used_leaves_that_no_one_holds():
    pool = PagePool(8)
    cache = PrefixCache(pool, SIZE)
    old, used, held = (cached(cache, [i, i, i, i]) for i in (1, 2, 3))
    pool.retain(held)
    cache.find(array("i", [2, 2, 2, 2]), 4)
    assert cache.evictable() == 4
    assert cache.evict(1) == 1  # the end of the oldest, not its beginning
    assert cache.find(array("i", [1, 1, 1, 1]), 4).pages == old[:1]
    cache.find(array("i", [2, 2, 2, 2]), 4)
    assert cache.evict(1) == 1
    assert cache.find(array("i", [1, 1]), 2).tokens == 0
    assert cache.find(array("i", [2, 2, 2, 2]), 4).pages == used
    assert cache.evict(10) == 2 and cache.pages() and set(cache.pages()) == set(held)
    cache.check()
    pool.check([*held, *held])


def test_a_removed_node_takes_no_more_pages():
    cache = PrefixCache(PagePool(8), SIZE)
    cached(cache, [1, 2])
    node = cache.find(array("i", [1, 2]), 2).node
    cache.clear()
    assert cache.pool.free == 8 and node.removed
    with pytest.raises(AssertionError):
        cache.insert(node, array("i", [3, 4]), cache.pool.alloc(1)[0])
