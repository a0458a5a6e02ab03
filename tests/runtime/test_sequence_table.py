"""PagedSequences against a model that keeps every sequence as a plain list of tokens.

The model writes the tokens of each step into a simulated page memory through the slots, performs
the copies, and reads every sequence back through its page table.
"""

import copy
import random
import re

import numpy as np
import pytest

from relaxlm.errors import ContextOverflowError, RequestError
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sequence_table import BatchTables, PagedSequences, pages_per_sequence


def state(table: PagedSequences) -> object:
    pool = table.pool
    return copy.deepcopy(
        (table._sequences, table._copies, table._next_id, pool._holders, sorted(pool._free))
    )


class Model:
    """Every sequence as (all its tokens, the positions that are cached)."""

    def __init__(self, pages: int, page_size: int, window: int, sinks: int, most: int) -> None:
        self.page_size, self.window, self.sinks = page_size, window, sinks
        self.table = PagedSequences(PagePool(pages), page_size, window, sinks, most)
        self.memory = np.full(pages * page_size, -1)
        self.tokens: dict[int, list[int]] = {}
        self.cached: dict[int, list[int]] = {}
        self.next_token = 1
        self.cache: list[tuple[list[int], list[int]]] = []  # pages that it holds, tokens in them

    def visible(self, q: int, k: int) -> bool:
        return k <= q and (self.window == 0 or q - k < self.window or k < self.sinks)

    def after_dropping(self, seq: int) -> list[int]:
        """The positions cached when the next step begins: blocks that nobody will see leave."""
        size, length = self.page_size, len(self.tokens[seq])
        keep = []
        for start in range(0, length, size):
            block = range(start, start + size)
            holds_sinks = start < self.sinks
            # Later queries see a subset of what the query at `length` sees, and their own keys.
            if holds_sinks or block[-1] >= length or any(self.visible(length, k) for k in block):
                keep += [k for k in block if k in self.cached[seq]]
        return keep

    def run_copies(self) -> None:
        sources, targets = self.table.take_copies()
        assert len(set(targets)) == len(targets) and not set(sources) & set(targets)
        pages = self.memory.reshape(-1, self.page_size)
        pages[targets] = pages[sources]

    def step(self, steps: list[tuple[int, int]]) -> BatchTables:
        before = {seq: self.after_dropping(seq) for seq, _ in steps}
        tables = self.table.batch(steps)
        self.run_copies()
        for name, array in tables._asdict().items():
            assert array.dtype == np.int32 and array.ndim == 1, name
        positions, slots = [], []
        for i, (seq, n) in enumerate(steps):
            first = len(self.tokens[seq])
            rows = slice(tables.row_offsets[i], tables.row_offsets[i + 1])
            new = list(range(self.next_token, self.next_token + n))
            self.next_token += n
            self.memory[tables.slots[rows]] = new
            positions += range(first, first + n)
            slots += list(tables.slots[rows])
            self.tokens[seq] += new
            self.cached[seq] = before[seq] + list(range(first, first + n))
            pages = tables.page_ids[tables.page_offsets[i] : tables.page_offsets[i + 1]]
            assert tables.kv_lengths[i] == len(self.cached[seq])
            self.read(seq, pages, tables.dropped[i])
        assert list(tables.positions) == positions
        assert len(set(slots)) == len(slots)
        assert tables.page_offsets[-1] == len(tables.page_ids)
        return tables

    def abandon(self, steps: list[tuple[int, int]]) -> None:
        """A step that fails after its tables were made: no copy and no write takes place."""
        before = {seq: self.after_dropping(seq) for seq, _ in steps}
        self.table.batch(steps)
        for seq, _ in steps:
            self.table.truncate(seq, len(self.tokens[seq]))
            self.cached[seq] = before[seq]

    def read(self, seq: int, pages: np.ndarray, dropped: int) -> None:
        """Each cached token is found through the page table, at the position the contract names."""
        size = self.page_size
        kept = -(-self.sinks // size) * size
        assert dropped == len(self.tokens[seq]) - len(self.cached[seq])
        assert len(pages) == -(-len(self.cached[seq]) // size)
        for j, position in enumerate(self.cached[seq]):
            assert position == (j if j < kept else j + dropped)
            page = int(pages[j // size])
            page = self.table._copies.get(page, page)  # a copy that the next step will perform
            assert self.memory[page * size + j % size] == self.tokens[seq][position]
        length = len(self.tokens[seq])
        for k in range(length):  # a query of the next step finds what it may see
            assert k in self.cached[seq] or not self.visible(length, k)

    def keep(self, seq: int, length: int) -> None:
        """Let the cache hold the first tokens of a sequence that has dropped none."""
        pages = self.table.pages(seq)[: -(-length // self.page_size)]
        self.table.pool.retain(pages)
        self.cache.append((pages, self.tokens[seq][:length]))

    def evict(self, index: int) -> None:
        self.table.pool.release(self.cache.pop(index)[0])

    def check(self) -> None:
        self.table.check([page for pages, _ in self.cache for page in pages])
        for pages, tokens in self.cache:
            held = self.memory.reshape(-1, self.page_size)[pages].ravel()
            assert held[: len(tokens)].tolist() == tokens
        assert len(self.table) == len(self.tokens)
        for seq, tokens in self.tokens.items():
            assert self.table.length(seq) == len(tokens)
            assert self.table.cached(seq) == len(self.cached[seq])
            self.read(seq, self.table.pages(seq), len(tokens) - self.table.cached(seq))

    def cut(self, seq: int, length: int) -> list[int] | None:
        """The cached positions of the first `length` tokens; None if one that is needed is gone."""
        cached = [k for k in self.cached[seq] if k < length]
        needed = [k for k in range(length) if self.visible(length, k)]
        return cached if set(needed) <= set(cached) else None


def random_traffic(model: Model, rng: random.Random, steps: int) -> set[str]:
    """Returns what happened, so that a test can insist that it did."""
    table, seen = model.table, set()
    for _ in range(steps):
        actions = ["add", "batch", "batch", "batch", "append", "fork", "truncate", "free"]
        actions += ["keep", "adopt", "evict"]
        action = rng.choice(actions) if table._decoding is None else rng.choice(["again", *actions])
        seqs = list(model.tokens)
        full = len(seqs) == table.max_sequences
        before = state(table)
        if action == "add":
            if full:
                with pytest.raises(RequestError):
                    table.add()
                assert state(table) == before
                seen.add("too many")
            else:
                seq = table.add()
                assert seq not in model.tokens
                model.tokens[seq], model.cached[seq] = [], []
        elif action == "evict":
            if model.cache:
                model.evict(rng.randrange(len(model.cache)))
        elif action == "adopt":
            if not model.cache:
                continue
            pages, tokens = rng.choice(model.cache)
            if not table.can_adopt(len(tokens)):
                with pytest.raises(ValueError, match="has dropped some of them"):
                    table.adopt(pages, len(tokens))
                assert state(table) == before
                seen.add("too long to adopt")
            elif full:
                with pytest.raises(RequestError):
                    table.adopt(pages, len(tokens))
                assert state(table) == before
            else:
                seq = table.adopt(pages, len(tokens))
                assert seq not in model.tokens
                model.tokens[seq], model.cached[seq] = tokens[:], list(range(len(tokens)))
                seen.add("adopted" if len(tokens) % model.page_size else "adopted full pages")
        elif not seqs:
            continue
        elif action == "keep":
            seq = rng.choice(seqs)
            whole = table.length(seq) == table.cached(seq)
            if whole and len(model.cache) < 3 and not table._copies.keys() & set(table.pages(seq)):
                model.keep(seq, rng.randint(0, table.length(seq)))
        elif action in ("again", "batch", "append"):
            chosen = rng.sample(seqs, rng.randint(1, len(seqs)) if action == "batch" else 1)
            most = rng.choice([1, 1, 3, 3 * model.page_size])
            request = [(seq, rng.randint(1, most)) for seq in chosen]
            if action == "again":
                assert table._decoding is not None
                request = list(table._decoding.steps)
            # Without what is kept of the last step, tables are made anew.
            again = table._decoding is not None and table._decoding.fits(request, table.pool)
            roomy = copy.deepcopy(table, {id(table._decoding): None})
            roomy.pool._free[:0] = range(table.pool.total, table.pool.total + 1000)
            roomy.pool._holders += [0] * 1000
            roomy.pool.total += 1000
            anew = roomy.batch(request)
            fits = roomy.pool.used <= table.pool.total
            assert (table.pages_needed(request) <= table.pool.free) == fits
            assert state(table) == before
            if fits and rng.random() < 0.25:
                model.abandon(request)
                seen.add("abandoned with copies" if table._copies else "abandoned")
            elif fits:
                copies = len(roomy._copies)
                tables = model.step(request)
                for found, expected in zip(tables, anew, strict=True):
                    np.testing.assert_array_equal(found, expected)
                seen.add("copy" if copies else "no copy")
                if again:
                    seen.add("repeated")
                if any(table.length(seq) != table.cached(seq) for seq in chosen):
                    seen.add("dropped")
            else:
                with pytest.raises(ContextOverflowError):
                    table.batch(request)
                assert state(table) == before
                seen.add("exhausted")
        elif action == "free":
            seq = rng.choice(seqs)
            table.free(seq)
            del model.tokens[seq], model.cached[seq]
            seen.add("free")
        else:
            seq = rng.choice(seqs)
            length = rng.randint(0, len(model.tokens[seq]))
            if rng.random() < 0.3:
                length = len(model.tokens[seq])
            cached = model.cut(seq, length)
            assert table.can_truncate(seq, length) == (cached is not None)
            if cached is None:
                with pytest.raises(RequestError):
                    table.truncate(seq, length)
                with pytest.raises(RequestError):
                    table.fork(seq, length)
                assert state(table) == before
                seen.add("left the window")
            elif action == "truncate":
                table.truncate(seq, length)
                model.tokens[seq], model.cached[seq] = model.tokens[seq][:length], cached
            elif not full:
                new = table.fork(seq, length)
                assert new not in model.tokens
                model.tokens[new], model.cached[new] = model.tokens[seq][:length], cached
                seen.add("fork")
        model.check()
    return seen


@pytest.mark.parametrize(
    ("pages", "page_size", "window", "sinks"),
    [
        (24, 1, 0, 0),
        (24, 4, 0, 0),
        (24, 16, 0, 0),
        (12, 1, 3, 2),
        (12, 4, 2, 0),
        (12, 4, 5, 0),
        (16, 4, 8, 4),
        (20, 4, 9, 5),
        (16, 3, 7, 1),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_reads_back_what_was_written(
    pages: int, page_size: int, window: int, sinks: int, seed: int
) -> None:
    rng = random.Random(f"{page_size} {window} {sinks} {seed}")
    model = Model(pages, page_size, window, sinks, most=6)
    seen = random_traffic(model, rng, 1000)
    assert {"too many", "no copy", "exhausted", "free", "fork"} <= seen
    assert page_size == 1 or {"copy", "abandoned with copies", "repeated"} <= seen
    assert not window or {"dropped", "left the window"} <= seen
    assert page_size == 1 or "adopted" in seen
    assert "adopted full pages" in seen
    for seq in list(model.tokens):
        model.table.free(seq)
    while model.cache:
        model.evict(0)
    model.table.check()
    assert model.table.pool.free == pages


def make(pages: int = 8, page_size: int = 4, **options) -> tuple[PagedSequences, int]:
    table = PagedSequences(PagePool(pages), page_size, **options)
    return table, table.add()


def test_a_step_of_a_prefill_and_two_decodes() -> None:
    table, a = make()
    b, c = table.add(), table.add()
    table.append(a, 3)
    table.append(b, 4)
    tables = table.batch([(a, 1), (c, 6), (b, 1)])
    assert {name: array.tolist() for name, array in tables._asdict().items()} == {
        "positions": [3, 0, 1, 2, 3, 4, 5, 4],
        "slots": [3, 8, 9, 10, 11, 12, 13, 16],
        "row_offsets": [0, 1, 7, 8],
        "page_offsets": [0, 1, 3, 5],
        "page_ids": [0, 2, 3, 1, 4],
        "kv_lengths": [4, 6, 5],
        "dropped": [0, 0, 0],
    }


def test_append_gives_slots_and_positions() -> None:
    table, seq = make()
    table.append(seq, 3)
    slots, positions = table.append(seq, 2)
    assert slots.tolist() == [3, 4] and positions.tolist() == [3, 4]


def test_a_fork_shares_full_pages_and_copies_the_last_one_when_either_writes() -> None:
    table, a = make()
    table.append(a, 6)
    b = table.fork(a)
    assert table.pages(b) == table.pages(a) == [0, 1] and table.pool.used == 2
    tables = table.batch([(a, 1), (b, 1)])
    assert tables.page_ids.tolist() == [0, 2, 0, 1]  # one copy: the last holder keeps the page
    sources, targets = table.take_copies()
    assert (sources.tolist(), targets.tolist()) == ([1], [2])
    assert [len(array) for array in table.take_copies()] == [0, 0]
    table.check()


def test_a_fork_at_the_end_of_a_page_needs_no_copy() -> None:
    table, a = make()
    table.append(a, 6)
    b = table.fork(a, 4)
    table.append(b, 1)
    assert table.pages(b) == [0, 2] and len(table.take_copies()[0]) == 0


def test_an_adopted_page_that_is_partly_filled_is_copied_once_its_sequence_appends() -> None:
    table, a = make()
    table.append(a, 6)
    pages = table.pages(a)
    table.pool.retain(pages)  # a cache
    table.free(a)
    b, c = table.adopt(pages, 6), table.adopt(pages[:1], 4)
    assert table.pages(b) == [0, 1] and table.pages_needed([(b, 1), (c, 1)]) == 2
    tables = table.batch([(b, 1), (c, 1)])
    assert tables.positions.tolist() == [6, 4] and tables.page_ids.tolist() == [0, 2, 0, 3]
    assert [array.tolist() for array in table.take_copies()] == [[1], [2]]
    table.check(pages)
    assert table.pages_needed([(b, 1), (c, 1)]) == 0
    table.pool.release(pages)
    assert table.pool.free == 5  # the cache was the last holder of page 1
    table.check()


def test_pages_needed_counts_what_leaves_the_window() -> None:
    table, seq = make(pages=3, window=4)
    table.append(seq, 12)
    assert table.pages_needed([(seq, 8)]) == 0
    assert table.pages_needed([(seq, 9)]) == 1
    table.pool.retain([1])
    assert table.pages_needed([(seq, 8)]) == 1


def test_a_page_waits_for_the_copy_that_will_read_it() -> None:
    table, a = make(pages=3)
    table.append(a, 2)
    b = table.fork(a)
    table.append(b, 1)
    table.free(a)
    table.check()
    assert table.pool.free == 1
    with pytest.raises(ContextOverflowError):
        table.append(b, 6)
    assert [array.tolist() for array in table.take_copies()] == [[0], [1]]
    table.append(b, 6)
    table.check()


def test_a_copy_into_a_freed_page_is_forgotten() -> None:
    table, a = make()
    table.append(a, 2)
    b = table.fork(a)
    table.append(b, 1)
    table.free(b)
    table.check()
    assert len(table.take_copies()[0]) == 0 and table.pool.used == 1


def test_a_copy_of_a_copy_reads_the_original() -> None:
    table, a = make()
    table.append(a, 2)
    b = table.fork(a)
    table.append(b, 1)
    c = table.fork(b, 2)
    table.append(c, 1)
    table.check()
    assert [array.tolist() for array in table.take_copies()] == [[0, 0], [1, 2]]
    assert [table.pages(seq) for seq in (a, b, c)] == [[0], [1], [2]]
    table.check()


def test_the_sole_holder_of_a_copied_page_writes_into_it() -> None:
    table, a = make()
    table.append(a, 2)
    b = table.fork(a)
    table.append(a, 1)  # its copy holds page 0 until it is taken
    table.append(b, 1)
    assert table.pages(b) == [0] and len(table.take_copies()[0]) == 1


def test_pages_that_leave_the_window_serve_the_same_step() -> None:
    table, seq = make(pages=3, window=4)
    table.append(seq, 12)
    tables = table.batch([(seq, 8)])
    assert tables.page_ids.tolist() == [2, 0, 1] and tables.dropped.tolist() == [8]
    assert tables.positions.tolist() == list(range(12, 20)) and tables.kv_lengths.tolist() == [12]
    table.check()


def test_a_long_chunk_keeps_what_its_first_query_sees() -> None:
    table, seq = make(pages=64, window=6, sinks=3)
    table.append(seq, 20)
    tables = table.batch([(seq, 40)])
    assert tables.dropped.tolist() == [8]  # position 20 sees 15 and later; 4 .. 11 leave
    assert table.batch([(seq, 1)]).dropped.tolist() == [48]


def test_truncating_into_the_sinks_forgets_what_was_dropped() -> None:
    table, seq = make(pages=16, window=4, sinks=2)
    for _ in range(20):
        table.append(seq, 1)
    assert table.cached(seq) == 8
    table.truncate(seq, 3)
    assert (table.length(seq), table.cached(seq), table.pages(seq)) == (3, 3, [0])
    table.check()


def test_messages() -> None:
    table, a = make(pages=4, window=4, max_sequences=2)
    b = table.add()

    def fails(error: type[Exception], message: str, call, *arguments) -> None:
        before = state(table)
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            call(*arguments)
        assert state(table) == before

    fails(
        RequestError,
        "2 of 2 sequences are in use: finish one first, or make the KV cache for more",
        table.add,
    )
    table.append(a, 12)
    fails(
        ContextOverflowError,
        "sequence 1 needs 2 more pages for 5 tokens, 1 of 4 are free",
        table.append,
        b,
        5,
    )
    fails(
        ContextOverflowError,
        "2 sequences need 5 more pages for 17 tokens, 3 of 4 are free",
        table.batch,
        [(a, 1), (b, 16)],
    )
    table.append(a, 1)
    fails(
        RequestError,
        "sequence 0 cannot go back from 13 to 10 tokens: positions 0 to 7 have left its window of "
        "4 tokens. Prefill it again from the start",
        table.truncate,
        a,
        10,
    )
    fails(ValueError, "sequence 0 has 13 tokens: cannot keep 14", table.truncate, a, 14)
    fails(ValueError, "sequence 0 has 13 tokens: cannot keep -1", table.fork, a, -1)
    fails(ValueError, "sequence 1: cannot append 0 tokens, expected at least 1", table.append, b, 0)
    fails(ValueError, "a sequence is twice in one step: [1, 1]", table.batch, [(b, 1), (b, 1)])
    fails(ValueError, "a step needs at least one sequence", table.batch, [])
    fails(ValueError, "there is no sequence 7: never added, or freed", table.free, 7)
    fails(ValueError, "a step needs at least one sequence", table.pages_needed, [])
    table.free(b)
    fails(ValueError, "there is no sequence 1: never added, or freed", table.length, b)
    page = table.pages(a)[-1]
    fails(
        ValueError,
        "1 pages of 4 tokens for a sequence of 5: expected 2",
        table.adopt,
        [page],
        5,
    )
    fails(
        ValueError,
        f"a page is twice in one sequence: [{page}, {page}]",
        table.adopt,
        [page, page],
        7,
    )
    fails(
        ValueError,
        "a sequence of 7 tokens has dropped some of them: its window is 4",
        table.adopt,
        [page, page + 1],
        7,
    )
    free = table.pool._free[0]
    fails(
        ValueError,
        f"page {free} cannot be shared: it is not in use",
        table.adopt,
        [free],
        3,
    )


def test_a_table_refuses_sizes_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"^page_size 0, window 0, sinks 0: expected at least"):
        PagedSequences(PagePool(1), 0)
    with pytest.raises(ValueError, match=r"^65536 pages of 65536 tokens: more slots than an int32"):
        PagedSequences(PagePool(2**16), 2**16)


def test_check_finds_a_page_in_two_tables() -> None:
    table, a = make()
    table.append(a, 4)
    b = table.add()
    table.append(b, 4)
    table._sequences[b].pages[0] = table._sequences[a].pages[0]
    with pytest.raises(AssertionError, match="holders"):
        table.check()


@pytest.mark.parametrize(
    ("tokens", "chunk", "page_size", "window", "sinks"),
    [(50, 7, 4, 0, 0), (100, 1, 4, 9, 3), (100, 7, 4, 9, 3), (6, 7, 4, 9, 3), (100, 30, 4, 5, 0)],
)
def test_pages_per_sequence_is_the_most_that_traffic_needs(
    tokens: int, chunk: int, page_size: int, window: int, sinks: int
) -> None:
    most = 0
    for seed in range(200):
        rng = random.Random(seed)
        table, seq = make(100, page_size, window=window, sinks=sinks)
        while (length := table.length(seq)) < tokens:
            table.append(seq, min(rng.choice([1, chunk]), tokens - length))
            most = max(most, len(table.pages(seq)))
    assert most == pages_per_sequence(tokens, chunk, page_size, window, sinks)
