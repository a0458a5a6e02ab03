import random
import re

import pytest

from relaxlm.errors import ContextOverflowError
from relaxlm.runtime.page_pool import PagePool


def state(pool: PagePool) -> tuple:
    return [pool.holders(page) for page in range(pool.total)], pool.free, list(pool._free)


def test_pages_come_in_order_and_return_when_the_last_holder_lets_go() -> None:
    pool = PagePool(4)
    assert pool.alloc(3) == [0, 1, 2]
    assert (pool.free, pool.used) == (1, 3)
    pool.retain([1, 1, 2])
    assert pool.release([0, 1, 2]) == [0]
    assert pool.release([1, 1]) == [1]
    assert [pool.holders(page) for page in range(4)] == [0, 0, 1, 0]
    assert pool.alloc(0) == []
    pool.check([2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda pool: pool.alloc(2),
            ContextOverflowError,
            "2 more pages are needed, 1 of 4 are free",
        ),
        (lambda pool: pool.alloc(-1), ValueError, "cannot allocate -1 pages"),
        (lambda pool: pool.retain([0, 3]), ValueError, "page 3 cannot be shared: it is not in use"),
        (
            lambda pool: pool.retain([0, -1]),
            ValueError,
            "page -1 cannot be shared: it is not in use",
        ),
        (
            lambda pool: pool.release([1, 3]),
            ValueError,
            "page 3 is released 1 times, but held 0 times",
        ),
        (
            lambda pool: pool.release([1, 4]),
            ValueError,
            "page 4 is released 1 times, but held 0 times",
        ),
        (
            lambda pool: pool.release([1, 0, 0]),
            ValueError,
            "page 0 is released 2 times, but held 1 times",
        ),
    ],
)
def test_a_failed_call_names_the_page_and_changes_nothing(call, error, message: str) -> None:
    pool = PagePool(4)
    pool.alloc(3)
    before = state(pool)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(pool)
    assert state(pool) == before
    pool.check([0, 1, 2])


def test_an_exhausted_pool_says_so_in_the_singular() -> None:
    pool = PagePool(1)
    pool.alloc(1)
    with pytest.raises(ContextOverflowError, match=r"^1 more page is needed, 0 of 1 are free$"):
        pool.alloc(1)


def test_a_pool_has_at_least_one_page() -> None:
    with pytest.raises(ValueError, match=r"^a page pool of 0 pages: expected at least 1$"):
        PagePool(0)


def test_check_finds_a_page_that_is_free_and_held() -> None:
    pool = PagePool(3)
    pool.alloc(1)
    pool._free.append(0)
    with pytest.raises(AssertionError, match="without holder"):
        pool.check()


def test_check_finds_a_forgotten_hold() -> None:
    pool = PagePool(3)
    pool.alloc(1)
    with pytest.raises(AssertionError, match=r"holders \[1, 0, 0\], expected \[0, 0, 0\]"):
        pool.check([])


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_keeps_every_page_in_one_place(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(17)
    holds: list[int] = []
    for _ in range(500):
        action = rng.choice(["alloc", "retain", "release"])
        if action == "alloc":
            count = rng.randint(0, 6)
            if count > pool.free:
                with pytest.raises(ContextOverflowError):
                    pool.alloc(count)
            else:
                pages = pool.alloc(count)
                assert not set(pages) & set(holds) and len(set(pages)) == count
                holds += pages
        elif holds:
            pages = rng.sample(holds, rng.randint(1, min(len(holds), 5)))
            if action == "retain":
                pool.retain(pages)
                holds += pages
            else:
                for page in pages:
                    holds.remove(page)
                assert set(pool.release(pages)) == set(pages) - set(holds)
        pool.check(holds)
        assert pool.used == len(set(holds))
