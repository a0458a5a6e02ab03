"""The page tables of the sequences in the paged KV cache.

A sequence's cached tokens lie in pages of `page_size` tokens, all full but the last. Full pages are
shared between a sequence and its forks. A page that is shared is never written: the first holder
that appends to a shared, partly filled page gets a copy of it.

Sliding window: a query at position q sees a key at position k iff k <= q and (window == 0 or
q - k < window or k < sinks). Pages between the ones that hold the sinks and the window leave the
table, whole, at the start of the first step in which no query can see any of their tokens. Then
`dropped` counts the tokens that left, and the cached token with index j has the absolute position

    j              for j < sink_pages * page_size, where sink_pages = ceil(sinks / page_size)
    j + dropped    otherwise

Recurrent layers keep a state of each sequence beside the pages, or in their place. `StateSlots`
says in which slot; a sequence can go back only to a state that has been kept.

Only numbers are kept here. They are ahead of the tensors by one step: whoever calls `append` or
`batch` must perform the copies from `take_copies` and then run the step.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from relaxlm.errors import ContextOverflowError, RequestError
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.state_slots import StateSlots
from relaxlm.runtime.step_tables import (
    NO_NUMBERS,
    BatchTables,
    Decoding,
    PagedSequence,
    step_tables,
)


class _Plan(NamedTuple):
    """What a step changes in the tables."""

    sequences: list[PagedSequence]
    changes: list[
        tuple[PagedSequence, int, bool, int]
    ]  # sequence, pages to drop, a copy, pages to add
    dropping: list[int]  # pages, once for each sequence that lets go of it
    needed: int  # pages


class PagedSequences:
    """Sequences of tokens over a pool of pages, and the tables of a step.

    Counts are in tokens unless the name says pages. A failed call changes nothing.

    Args:
        pool: the pages; may serve other holders too.
        page_size: tokens per page.
        window: tokens that a query sees, itself included; 0 for all of them.
        sinks: first tokens of a sequence that stay visible when the window has moved on.
        max_sequences: the most that may exist at a time; None for no limit.
        states: the slots of recurrent layers; None if there are no such layers.
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        window: int = 0,
        sinks: int = 0,
        max_sequences: int | None = None,
        states: StateSlots | None = None,
    ) -> None:
        if page_size < 1 or window < 0 or sinks < 0:
            raise ValueError(
                f"page_size {page_size}, window {window}, sinks {sinks}: "
                "expected at least 1, 0 and 0"
            )
        if pool.total * page_size > 2**31:
            raise ValueError(
                f"{pool.total} pages of {page_size} tokens: more slots than an int32 can number"
            )
        self.pool = pool
        self.page_size = page_size
        self.window = window
        self.sinks = sinks
        self.sink_pages = -(-sinks // page_size)
        self.max_sequences = max_sequences
        self.states = states
        self._sequences: dict[int, PagedSequence] = {}
        self._next_id = 0
        # Target page -> source page. The copy holds the source in place of the sequence that let
        # go of it, so that no other sequence can get and overwrite the page before it is read.
        self._copies: dict[int, int] = {}
        self._decoding: Decoding | None = None  # None, too, when its sequences are cut or freed

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, seq: object) -> bool:
        return seq in self._sequences

    def length(self, seq: int) -> int:
        """Tokens appended so far, including those that have left the window."""
        return self._get(seq).length

    def cached(self, seq: int) -> int:
        """Tokens that are in pages."""
        sequence = self._get(seq)
        return sequence.length - sequence.dropped

    def pages(self, seq: int) -> list[int]:
        return list(self._get(seq).pages)

    def add(self) -> int:
        """Start an empty sequence.

        Returns:
            Its number, never given out again.

        Raises:
            RequestError: `max_sequences` exist already.
        """
        return self._open(PagedSequence())

    def free(self, seq: int) -> None:
        """End a sequence and let go of its pages, and of its states."""
        self._decoding = None
        sequence = self._get(seq)
        self._release(sequence.pages)
        if self.states is not None:
            self.states.release(sequence.state)
        del self._sequences[seq]

    def longest_prefix(self, seq: int, length: int) -> int:
        """The most of the first `length` tokens that `truncate` can go back to."""
        kept = [] if self.states is None else self._get(seq).state.kept
        lengths = [length, *(tokens for tokens, _ in reversed(kept) if tokens < length), 0]
        return next(tokens for tokens in lengths if self.can_truncate(seq, tokens))

    def fork(self, seq: int, length: int | None = None) -> int:
        """Start a sequence with the first `length` tokens of another (default: all); takes no page.

        Raises:
            RequestError: `max_sequences` exist already, or what is needed is not there any more
                (see `can_truncate`).
        """
        parent = self._get(seq)
        length = parent.length if length is None else length
        count, dropped = self._rolled_back(seq, parent, length)
        shared = parent.pages[:count]
        new = self._open(PagedSequence(length, dropped, shared))
        self.pool.retain(shared)
        if self.states is not None:
            self._sequences[new].state = self.states.fork(parent.state, parent.length, length)
        return new

    def adopt(self, pages: Sequence[int], length: int) -> int:
        """Start a sequence from pages that someone else holds, such as a cache of prefixes.

        They are shared from now on: whoever appends to the last one, partly filled, gets a copy.

        Args:
            pages: of the pool, in order. Their first `length` tokens were written by steps that
                have run, so that no copy into these pages is waiting.

        Raises:
            RequestError: `max_sequences` exist already.
            ValueError: not the number of pages that `length` tokens take, a page that is twice or
                free, or pages that are not all that a sequence needs (see `can_adopt`).
        """
        if length < 0 or len(pages) != -(-length // self.page_size):
            raise ValueError(
                f"{len(pages)} pages of {self.page_size} tokens for a sequence of {length}: "
                f"expected {-(-length // self.page_size)}"
            )
        if len(set(pages)) != len(pages):
            raise ValueError(f"a page is twice in one sequence: {list(pages)}")
        if length and self.states is not None:
            raise ValueError(f"a sequence of {length} tokens needs a state beside its pages")
        if not self.can_adopt(length):
            raise ValueError(
                f"a sequence of {length} tokens has dropped some of them: its window is "
                f"{self.window}"
            )
        assert not self._copies.keys() & set(pages), f"still to be filled: {self._copies}"
        self.pool.retain(pages)
        try:
            return self._open(PagedSequence(length, pages=array("i", pages)))
        except RequestError:
            self.pool.release(pages)
            raise

    def can_adopt(self, length: int) -> bool:
        """Whether a sequence of this length has all in its pages that its next step needs."""
        if self.states is not None and length:
            return False
        return not self.window or self._pages_to_drop(PagedSequence(length)) == 0

    def keep_state(self, seq: int) -> None:
        """Keep the state of now, so that `truncate` and `fork` can come back to this length.

        Without recurrent layers they can anyway, and nothing happens.
        """
        if self.states is not None:
            sequence = self._get(seq)
            self.states.keep(sequence.state, sequence.length)

    def truncate(self, seq: int, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            RequestError: what is needed is not there any more (see `can_truncate`).
        """
        sequence = self._get(seq)
        count, dropped = self._rolled_back(seq, sequence, length)
        self._decoding = None
        if self.states is not None:
            self.states.cut(sequence.state, sequence.length, length)
        self._release(sequence.pages[count:])
        del sequence.pages[count:]
        sequence.length, sequence.dropped = length, dropped

    def can_truncate(self, seq: int, length: int) -> bool:
        """Whether the pages still hold every token that a query at position `length` sees, and
        recurrent layers the state before it.

        Always so without a sliding window and recurrent layers, and before the window has dropped
        any page. Of states there are that of now, those that were kept, and that of no token.
        """
        sequence = self._get(seq)
        if self.states is not None and not self.states.can_cut(
            sequence.state, sequence.length, length
        ):
            return False
        kept = self.sink_pages * self.page_size
        return (
            sequence.dropped == 0
            or length <= kept
            or length - self.window + 1 >= kept + sequence.dropped
        )

    def append(self, seq: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Make room for n more tokens.

        Returns:
            slots: [n] int32, page * page_size + offset in the page.
            positions: [n] int32, absolute.

        Raises:
            ContextOverflowError: too few pages are free.
        """
        tables = self.batch([(seq, n)])
        return tables.slots, tables.positions

    def batch(self, steps: Sequence[tuple[int, int]]) -> BatchTables:
        """Make room for the tokens of one step: for each (sequence, n), n more tokens.

        Raises:
            ContextOverflowError: too few pages, or slots of states, are free for all of them;
                nothing has changed.
            ValueError: no step at all, a sequence twice, or n < 1.
        """
        if self._decoding is not None and self._decoding.fits(steps, self.pool, self.states):
            return self._decoding.repeat()
        plan = self._plan(steps)  # nothing changes before it is known that the pages suffice
        if plan.needed:
            self._require(plan, steps)
        states = [sequence.state for sequence in plan.sequences]
        if self.states is not None:
            self.states.require(states)

        # Pages that leave the window go first: this step may need them.
        if plan.dropping:
            self._release(plan.dropping)
        fresh = iter(self.pool.alloc(plan.needed)) if plan.needed else iter(())
        for sequence, drop, copy, grow in plan.changes:
            if drop:
                del sequence.pages[self.sink_pages : self.sink_pages + drop]
                sequence.dropped += drop * self.page_size
            if copy:
                target = next(fresh)
                self._copy_on_write(sequence.pages[-1], target)
                sequence.pages[-1] = target
            for _ in range(grow):
                sequence.pages.append(next(fresh))
        for sequence, (_, n) in zip(plan.sequences, steps, strict=True):
            sequence.length += n
        counts = [n for _, n in steps]
        tables = step_tables(plan.sequences, counts, self.page_size)
        in_place = True
        if self.states is not None:
            sources, targets = self.states.step(states)
            tables = tables._replace(state_sources=sources, state_targets=targets)
            in_place = bool((sources == targets).all())
        self._decoding = None
        if in_place and max(counts) == 1:
            again = min(self._steps_until_change(sequence) for sequence in plan.sequences)
            self._decoding = Decoding(steps, plan.sequences, tables, again)
        return tables

    def pages_needed(self, steps: Sequence[tuple[int, int]]) -> int:
        """How many pages must be free in the pool for `batch(steps)`; changes nothing.

        Pages to grow into and to copy into, less those that leave a window with this step.

        Raises:
            ValueError: as `batch`.
        """
        if self._decoding is not None and self._decoding.fits(steps, self.pool, self.states):
            return 0
        plan = self._plan(steps)
        return max(0, plan.needed - self._freed(plan.dropping)) if plan.needed else 0

    def take_copies(self) -> tuple[np.ndarray, np.ndarray]:
        """The page copies to perform now, before the step that `append` or `batch` prepared.

        No page is both a source and a target, and no target comes twice: any order will do.

        Returns:
            sources: [k] int32 page numbers.
            targets: [k] int32 page numbers.
        """
        if not self._copies:
            return NO_NUMBERS, NO_NUMBERS
        targets = np.fromiter(self._copies.keys(), np.int32, len(self._copies))
        sources = np.fromiter(self._copies.values(), np.int32, len(self._copies))
        held = list(self._copies.values())
        self._copies.clear()
        self.pool.release(held)
        return sources, targets

    def check(self, other_holds: Sequence[int] = ()) -> None:
        """Assert that tables, pool and waiting copies agree.

        Args:
            other_holds: pages of the pool that others hold, once per hold.
        """
        size, sinks = self.page_size, self.sink_pages
        for seq, s in self._sequences.items():
            cached = s.length - s.dropped
            assert s.length >= 0 and s.dropped >= 0 and s.dropped % size == 0, f"{seq}: {s}"
            assert len(s.pages) == -(-cached // size), (
                f"{seq}: {cached} tokens in {len(s.pages)} pages"
            )
            assert len(set(s.pages)) == len(s.pages), f"sequence {seq} has a page twice: {s.pages}"
            if s.dropped:
                assert self.window, f"sequence {seq} dropped {s.dropped} tokens without a window"
                assert len(s.pages) >= sinks, f"sequence {seq} has lost its sinks: {s.pages}"
                first = sinks * size + s.dropped  # of the positions after the gap
                assert first <= s.length - self.window + 1, (
                    f"sequence {seq} dropped a visible token"
                )
        holds = [page for s in self._sequences.values() for page in s.pages]
        holds += self._copies.values()
        holds += other_holds
        self.pool.check(holds)
        assert not self._copies.keys() & set(self._copies.values()), f"chained: {self._copies}"
        tables = {page for s in self._sequences.values() for page in s.pages}
        assert self._copies.keys() <= tables, f"copies into pages of no sequence: {self._copies}"
        if self.states is not None:
            self.states.check((s.length, s.state) for s in self._sequences.values())
        if self.max_sequences is not None:
            assert len(self._sequences) <= self.max_sequences

    def _get(self, seq: int) -> PagedSequence:
        try:
            return self._sequences[seq]
        except KeyError:
            raise ValueError(f"there is no sequence {seq}: never added, or freed") from None

    def _open(self, sequence: PagedSequence) -> int:
        if self.max_sequences is not None and len(self._sequences) >= self.max_sequences:
            raise RequestError(
                f"{len(self._sequences)} of {self.max_sequences} sequences are in use: "
                "finish one first, or make the KV cache for more"
            )
        seq = self._next_id
        self._next_id += 1
        self._sequences[seq] = sequence
        return seq

    def _pages_to_drop(self, sequence: PagedSequence) -> int:
        """Pages after the sinks of which no query from position `length` on sees a token."""
        oldest_visible = sequence.length - self.window + 1
        invisible = oldest_visible // self.page_size - self.sink_pages
        return max(0, invisible - sequence.dropped // self.page_size)

    def _steps_until_change(self, sequence: PagedSequence) -> int:
        """How many steps of one token leave the sequence's pages the same ones."""
        steps = -sequence.length % self.page_size
        if self.window:
            oldest_kept = self.sink_pages * self.page_size + sequence.dropped
            oldest_visible = sequence.length - self.window + 1
            steps = min(steps, oldest_kept + self.page_size - oldest_visible)
        return steps

    def _is_shared(self, page: int, leaving: int) -> bool:
        """Whether two sequences hold the page when `leaving` of its holders have got a copy."""
        waiting = sum(source == page for source in self._copies.values()) if self._copies else 0
        return self.pool.holders(page) - waiting - leaving > 1

    def _plan(self, steps: Sequence[tuple[int, int]]) -> _Plan:
        size = self.page_size
        if not steps:
            raise ValueError("a step needs at least one sequence")
        if len({seq for seq, _ in steps}) != len(steps):
            raise ValueError(f"a sequence is twice in one step: {[seq for seq, _ in steps]}")
        sequences: list[PagedSequence] = []
        changes: list[tuple[PagedSequence, int, bool, int]] = []
        dropping: list[int] = []
        copied: dict[int, int] = {}  # shared page -> sequences of this step that get a copy of it
        needed = 0
        for seq, n in steps:
            sequence = self._get(seq)
            if n < 1:
                raise ValueError(f"sequence {seq}: cannot append {n} tokens, expected at least 1")
            sequences.append(sequence)
            cached = sequence.length - sequence.dropped
            grow = -(-(cached + n) // size) - len(sequence.pages)
            drop = self._pages_to_drop(sequence) if self.window else 0
            copy = False
            if cached % size:
                last = sequence.pages[-1]
                if self.pool.holders(last) > 1 and self._is_shared(last, copied.get(last, 0)):
                    copied[last] = copied.get(last, 0) + 1
                    copy = True
            if grow or drop or copy:
                dropping += sequence.pages[self.sink_pages : self.sink_pages + drop]
                needed += grow + copy
                changes.append((sequence, drop, copy, grow))
        return _Plan(sequences, changes, dropping, needed)

    def _freed(self, dropping: list[int]) -> int:
        """Of the pages that sequences let go of, once for each: how many have no other holder."""
        return sum(self.pool.holders(page) == n for page, n in Counter(dropping).items())

    def _require(self, plan: _Plan, steps: Sequence[tuple[int, int]]) -> None:
        needed, free = plan.needed, self.pool.free
        if needed <= free:
            return
        free += self._freed(plan.dropping)
        if needed <= free:
            return
        tokens = sum(n for _, n in steps)
        who = f"sequence {steps[0][0]} needs"
        if len(steps) > 1:
            who = f"{len(steps)} sequences need"
        raise ContextOverflowError(
            f"{who} {needed} more {'page' if needed == 1 else 'pages'} for {tokens} "
            f"{'token' if tokens == 1 else 'tokens'}, {free} of {self.pool.total} are free"
        )

    def _copy_on_write(self, source: int, target: int) -> None:
        if source in self._copies:  # itself still to be filled: copy from where its content comes
            origin = self._copies[source]
            self.pool.retain([origin])
            self._release([source])
            source = origin
        self._copies[target] = source

    def _release(self, pages: Sequence[int]) -> None:
        freed = self.pool.release(pages)
        if self._copies:  # nobody will read the copies into these
            self.pool.release([self._copies.pop(page) for page in freed if page in self._copies])

    def _rolled_back(self, seq: int, sequence: PagedSequence, length: int) -> tuple[int, int]:
        """Pages and dropped tokens of the sequence cut to its first `length` tokens."""
        if not 0 <= length <= sequence.length:
            raise ValueError(f"sequence {seq} has {sequence.length} tokens: cannot keep {length}")
        kept = self.sink_pages * self.page_size
        if not self.can_truncate(seq, length):
            if self.states is not None:
                kept_lengths = [tokens for tokens, _ in sequence.state.kept]
                raise RequestError(
                    f"sequence {seq} cannot go back from {sequence.length} to {length} tokens: its "
                    f"recurrent layers keep states after {kept_lengths} tokens. Prefill it again "
                    "from the start"
                )
            raise RequestError(
                f"sequence {seq} cannot go back from {sequence.length} to {length} tokens: "
                f"positions {kept} to {kept + sequence.dropped - 1} have left its window of "
                f"{self.window} tokens. Prefill it again from the start"
            )
        dropped = 0 if length <= kept else sequence.dropped
        return -(-(length - dropped) // self.page_size), dropped
