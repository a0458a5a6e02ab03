"""Slots of recurrent states under random traffic: a simulated memory holds what each step wrote."""

import copy
import random

import numpy as np
import pytest

from relaxlm.errors import ContextOverflowError, RequestError
from relaxlm.runtime.cache_size import slots_for
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.state_slots import StateSlots

PAGE, KEPT = 4, 2


def make(slots: int, pages: int = 200, **options) -> PagedSequences:
    states = StateSlots(PagePool(slots), most_kept=KEPT)
    return PagedSequences(PagePool(pages), PAGE, states=states, **options)


def now(table: PagedSequences) -> object:
    """All that a failed call may not have changed."""
    pools = (table.pool, table.states.pool)
    held = [(pool._holders, sorted(pool._free)) for pool in pools]
    return copy.deepcopy((table._sequences, table._copies, table._next_id, held))


class Model:
    """Every sequence as its tokens and the lengths it keeps; a slot holds the tokens seen."""

    def __init__(self, slots: int, **options) -> None:
        self.table = make(slots, **options)
        self.memory: list[list[int] | None] = [None] * slots
        self.tokens: dict[int, list[int]] = {}
        self.kept: dict[int, list[int]] = {}
        self.next_token = 1

    def step(self, steps: list[tuple[int, int]]) -> None:
        tables = self.table.batch(steps)
        self.table.take_copies()
        sources, targets = tables.state_sources.tolist(), tables.state_targets.tolist()
        assert tables.state_sources.dtype == tables.state_targets.dtype == np.int32
        assert len(sources) == len(targets) == len(set(targets)) == len(steps)
        written = []
        for i, ((seq, n), source) in enumerate(zip(steps, sources, strict=True)):
            # Sequences of a step run at the same time: none may read what another one writes.
            assert source not in targets[:i] + targets[i + 1 :]
            starts = tables.positions[tables.row_offsets[i]] == 0
            assert starts == (not self.tokens[seq])
            before = [] if starts else self.memory[source]
            assert before == self.tokens[seq]
            new = list(range(self.next_token, self.next_token + n))
            self.next_token += n
            self.tokens[seq] = before + new
            written.append(self.tokens[seq])
        for target, state in zip(targets, written, strict=True):
            self.memory[target] = state

    def lengths(self, seq: int) -> set[int]:
        """Those that the sequence can go back to."""
        return {0, len(self.tokens[seq]), *self.kept[seq]}

    def check(self) -> None:
        self.table.check()
        for seq, tokens in self.tokens.items():
            state = self.table._sequences[seq].state
            assert state.slot is None or self.memory[state.slot] == tokens
            assert [length for length, _ in state.kept] == self.kept[seq]
            for length, slot in state.kept:
                assert self.memory[slot] == tokens[:length]


def random_traffic(model: Model, rng: random.Random, actions: int) -> set[str]:
    """Returns what happened, so that a test can insist that it did."""
    table, seen = model.table, set()
    for _ in range(actions):
        kinds = ["add", "step", "step", "step", "fork", "cut", "cut", "keep", "keep", "free"]
        action = rng.choice(kinds if table._decoding is None else ["again", "again", *kinds])
        seqs, before = list(model.tokens), now(table)
        if action == "add":
            if len(seqs) < 6:
                seq = table.add()
                model.tokens[seq], model.kept[seq] = [], []
        elif not seqs:
            continue
        elif action in ("step", "again"):
            chosen = rng.sample(seqs, rng.randint(1, len(seqs)))
            steps = [(seq, rng.choice([1, 1, 1, 2, 9])) for seq in chosen]
            if rng.random() < 0.5:
                steps = [(seq, 1) for seq, _ in steps]
            if action == "again":
                steps = list(table._decoding.steps)
            states = [table._sequences[seq].state for seq, _ in steps]
            if table.states.needed(states) > table.states.pool.free:
                with pytest.raises(ContextOverflowError, match=r"more states? (is|are) needed"):
                    table.batch(steps)
                assert now(table) == before
                seen.add("exhausted")
                continue
            if table._decoding is not None:
                if table._decoding.fits(steps, table.pool, table.states):
                    seen.add("repeated")
                elif table._decoding.steps == steps:
                    seen.add("not repeated")
            model.step(steps)
        elif action == "keep":
            seq = rng.choice(seqs)
            table.keep_state(seq)
            if (length := len(model.tokens[seq])) and length not in model.kept[seq]:
                model.kept[seq] = [*model.kept[seq], length][-KEPT:]
                seen.add("kept")
        elif action == "free":
            seq = rng.choice(seqs)
            table.free(seq)
            del model.tokens[seq], model.kept[seq]
        else:
            seq = rng.choice(seqs)
            tokens, possible = model.tokens[seq], model.lengths(seq)
            length = rng.choice([*possible, rng.randint(0, len(tokens))])
            assert table.can_truncate(seq, length) == (length in possible)
            if length not in possible:
                for refused in (table.truncate, table.fork):
                    with pytest.raises(RequestError, match="its recurrent layers keep states"):
                        refused(seq, length)
                assert now(table) == before
                seen.add("refused")
            elif action == "cut":
                table.truncate(seq, length)
                model.tokens[seq] = tokens[:length]
                model.kept[seq] = [at for at in model.kept[seq] if at <= length]
                seen.add("back to a kept one" if 0 < length < len(tokens) else "cut")
            elif len(seqs) < 6:
                new = table.fork(seq, length)
                model.tokens[new], model.kept[new] = tokens[:length], []
                seen.add("fork of a kept one" if 0 < length < len(tokens) else "fork")
        model.check()
    return seen


@pytest.mark.parametrize("slots", [4, 8, slots_for(6, 6 * KEPT)])
@pytest.mark.parametrize("seed", range(2))
def test_every_step_reads_the_state_of_its_own_sequence(slots: int, seed: int) -> None:
    model = Model(slots)
    seen = random_traffic(model, random.Random(f"{slots} {seed}"), 1500)
    assert {"kept", "refused", "back to a kept one", "fork", "fork of a kept one", "cut"} <= seen
    assert {"repeated", "not repeated"} <= seen
    assert ("exhausted" in seen) == (slots < slots_for(6, 6 * KEPT))
    for seq in list(model.tokens):
        model.table.free(seq)
    model.table.check()
    assert model.table.states.pool.free == slots


def test_with_a_window_both_pages_and_states_have_to_be_there() -> None:
    table = make(3, window=4)
    seq = table.add()
    table.append(seq, 6)
    table.keep_state(seq)
    table.append(seq, 1)
    assert table.can_truncate(seq, 6)  # token 3, which it sees, is in the first page: still there
    for _ in range(4):
        table.append(seq, 1)
    assert not table.can_truncate(seq, 6)
    table.truncate(seq, 11)


def test_a_fork_shares_the_state_until_either_goes_on() -> None:
    table = make(3)
    a = table.add()
    table.append(a, 5)
    b = table.fork(a)
    assert table.states.pool.used == 1
    tables = table.batch([(a, 1), (b, 1)])
    # Both read it, so that neither may write to it.
    assert (tables.state_sources.tolist(), tables.state_targets.tolist()) == ([0, 0], [1, 2])
    assert table.states.pool.used == 2
    tables = table.batch([(a, 1), (b, 1)])
    assert (tables.state_sources.tolist(), tables.state_targets.tolist()) == ([1, 2], [1, 2])


def test_the_oldest_kept_state_goes_first() -> None:
    table = make(4)
    seq = table.add()
    for _ in range(3):
        table.append(seq, 2)
        table.keep_state(seq)
        table.keep_state(seq)  # the same one again
    assert [table.can_truncate(seq, length) for length in (2, 4, 6)] == [False, True, True]
    table.truncate(seq, 4)
    assert table.length(seq) == 4 and table.states.pool.used == 1
    table.append(seq, 3)
    table.truncate(seq, 4)  # it is still kept


def test_pages_alone_make_no_sequence() -> None:
    table = make(4)
    seq = table.add()
    table.append(seq, PAGE)
    assert not table.can_adopt(PAGE)
    with pytest.raises(ValueError) as raised:
        table.adopt(table.pages(seq), PAGE)
    assert str(raised.value) == "a sequence of 4 tokens needs a state beside its pages"
    table.adopt([], 0)


def test_a_sequence_that_cannot_go_back_says_where_it_can() -> None:
    table = make(4)
    seq = table.add()
    table.append(seq, 3)
    table.keep_state(seq)
    table.append(seq, 4)
    with pytest.raises(RequestError) as raised:
        table.truncate(seq, 5)
    assert str(raised.value) == (
        "sequence 0 cannot go back from 7 to 5 tokens: its recurrent layers keep states after [3] "
        "tokens. Prefill it again from the start"
    )


def test_too_few_slots_are_an_error_that_counts_them() -> None:
    table = make(2)
    seqs = [table.add() for _ in range(3)]
    with pytest.raises(ContextOverflowError) as raised:
        table.batch([(seq, 1) for seq in seqs])
    assert str(raised.value) == "3 more states are needed for 3 sequences, 2 of 2 are free"


@pytest.mark.parametrize(("sequences", "kept"), [(1, 2), (2, 0), (5, 0), (4, 3), (7, 2)])
def test_slots_for_is_what_the_worst_step_needs_and_not_one_more(sequences: int, kept: int) -> None:
    def worst_step(slots: int) -> None:
        table = make(slots)
        table.states.most_kept = kept
        seqs = [table.add() for _ in range(sequences)]
        table.append(seqs[0], 1)
        for _ in range(kept):
            table.keep_state(seqs[0])
            table.append(seqs[0], 1)
        table.batch([(seq, 1) for seq in seqs])
        table.take_copies()
        # Pairs share a slot that the step reads and nobody has afterwards.
        for i in range(1, sequences, 2):
            table.free(seqs[i])
            seqs[i] = table.fork(seqs[i - 1])
        table.batch([(seq, 1) for seq in seqs])
        table.check()

    worst_step(slots_for(sequences, kept))
    with pytest.raises(ContextOverflowError):
        worst_step(slots_for(sequences, kept) - 1)
