"""Who holds which page of the KV cache."""

from collections import Counter
from collections.abc import Iterable, Sequence

from relaxlm.errors import ContextOverflowError


class PagePool:
    """Hands out page numbers 0 .. total - 1; a page comes back when its last holder lets go of it.

    A page is a place for some tokens of every layer; what is in it is not known here. A page is
    either free or has at least one holder. Counts are in pages. A failed call changes nothing.
    """

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a page pool of {total} pages: expected at least 1")
        self.total = total
        self._holders = [0] * total
        self._free = list(range(total - 1, -1, -1))  # taken from the end: low numbers first

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def alloc(self, count: int) -> list[int]:
        """Take `count` free pages, with one holder each: all of them or none.

        Raises:
            ContextOverflowError: fewer than `count` pages are free.
        """
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages")
        if count > len(self._free):
            raise ContextOverflowError(
                f"{count} more {_pages(count)} needed, {len(self._free)} of {self.total} are free"
            )
        first = len(self._free) - count
        pages = self._free[first:]
        del self._free[first:]
        pages.reverse()
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """Add one holder to each page (twice if it is listed twice); each must have one already.

        Raises:
            ValueError: a page is free.
        """
        for page in pages:
            if not self._is_held(page):
                raise ValueError(f"page {page} cannot be shared: it is not in use")
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> list[int]:
        """Remove one holder from each page (two if it is listed twice).

        Returns:
            The pages that lost their last holder, now free again.

        Raises:
            ValueError: a page has fewer holders than that.
        """
        for page, times in Counter(pages).items():
            if not self._is_held(page) or self._holders[page] < times:
                held = self._holders[page] if self._is_held(page) else 0
                raise ValueError(f"page {page} is released {times} times, but held {held} times")
        freed = []
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                freed.append(page)
        self._free.extend(reversed(freed))
        return freed

    def check(self, holds: Iterable[int] | None = None) -> None:
        """Assert that every page is either free or held.

        Args:
            holds: every hold that there should be, one page number each; not checked if None.
        """
        assert len(set(self._free)) == len(self._free), f"a page is free twice: {self._free}"
        free = {page for page, holders in enumerate(self._holders) if holders == 0}
        assert set(self._free) == free, (
            f"free pages {sorted(self._free)}, without holder {sorted(free)}"
        )
        assert all(holders >= 0 for holders in self._holders), f"holders {self._holders}"
        if holds is not None:
            counted = Counter(holds)
            expected = [counted[page] for page in range(self.total)]
            assert self._holders == expected, f"holders {self._holders}, expected {expected}"

    def _is_held(self, page: int) -> bool:
        return 0 <= page < self.total and self._holders[page] > 0


def _pages(count: int) -> str:
    return "page is" if count == 1 else "pages are"
