"""PagedSequences: slots, forks, copies, windows and messages, case by case."""

import re

import pytest

from relaxlm.errors import ContextOverflowError, RequestError
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sequence_table import PagedSequences
from tests.runtime.sequence_model import make, state


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
        "state_sources": [],
        "state_targets": [],
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
