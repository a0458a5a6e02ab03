"""A model of PagedSequences that keeps every sequence as a plain list of tokens.

The model writes the tokens of each step into a simulated page memory through the slots, performs
the copies, and reads every sequence back through its page table.
"""

import copy
import random

import numpy as np
import pytest

from relaxlm.errors import ContextOverflowError, RequestError
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sequence_table import BatchTables, PagedSequences


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
            again = table._decoding is not None and table._decoding.fits(
                request, table.pool, table.states
            )
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


def make(pages: int = 8, page_size: int = 4, **options) -> tuple[PagedSequences, int]:
    table = PagedSequences(PagePool(pages), page_size, **options)
    return table, table.add()
