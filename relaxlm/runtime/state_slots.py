"""Who has which slot of the recurrent layers' state tensors.

A state is that after a sequence's last token, and there is no way back from it: what a sequence may
go back to, it has to keep (`StateSlots.keep`). A step reads a sequence's state from one slot and
writes it to one, the same if nobody else holds it. A slot that is shared, by a fork or by what is
kept, is never written: the step writes to a fresh one, and the sequence lets go of the shared one.
It may be given out again with the next step, when everybody has read it.

A slot is a number; slots of a pool are given out and counted as pages are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from relaxlm.errors import ContextOverflowError
from relaxlm.runtime.page_pool import PagePool

# Earlier states that a sequence may keep: of the last prompt, and of the one before.
MOST_KEPT = 2


@dataclass(slots=True)
class SequenceState:
    """Where a sequence's state is; `StateSlots` changes it.

    Attributes:
        slot: None before the first step.
        kept: (tokens, slot) of earlier states, the latest last.
    """

    slot: int | None = None
    kept: list[tuple[int, int]] = field(default_factory=list)

    def slots(self) -> list[int]:
        """Every hold on a slot."""
        own = [] if self.slot is None else [self.slot]
        return own + [slot for _, slot in self.kept]


class StateSlots:
    """The slots of a step, and what forks and earlier states need of them.

    Args:
        pool: of slots; nobody else takes any.
        most_kept: earlier states that a sequence may keep; the oldest one goes first.
    """

    def __init__(self, pool: PagePool, most_kept: int = MOST_KEPT) -> None:
        self.pool, self.most_kept = pool, most_kept

    def needed(self, states: Sequence[SequenceState]) -> int:
        """How many slots must be free for a step of these sequences."""
        return sum(not self.is_alone(state) for state in states)

    def is_alone(self, state: SequenceState) -> bool:
        """Whether a step may write the state where it is."""
        return state.slot is not None and self.pool.holders(state.slot) == 1

    def require(self, states: Sequence[SequenceState]) -> None:
        """
        Raises:
            ContextOverflowError: too few slots are free for a step of these sequences.
        """
        needed, free = self.needed(states), self.pool.free
        if needed > free:
            raise ContextOverflowError(
                f"{needed} more {'state is' if needed == 1 else 'states are'} needed for "
                f"{len(states)} {'sequence' if len(states) == 1 else 'sequences'}, {free} of "
                f"{self.pool.total} are free"
            )

    def step(self, states: Sequence[SequenceState]) -> tuple[np.ndarray, np.ndarray]:
        """Give each sequence a slot to write to; there are enough.

        Returns:
            sources, targets: [b] int32. No slot is a target twice, nor a target of one sequence and
            the source of another. A sequence without a state has its target for a source.
        """
        fresh = iter(self.pool.alloc(self.needed(states)))
        shared: list[int] = []
        sources, targets = [], []
        for state in states:
            target = state.slot
            if target is None:
                target = next(fresh)
                sources.append(target)
            else:
                sources.append(target)
                if not self.is_alone(state):
                    shared.append(target)
                    target = next(fresh)
            targets.append(target)
            state.slot = target
        # Not before all fresh ones are taken, for those that are shared are read in this step.
        self.pool.release(shared)
        return np.array(sources, np.int32), np.array(targets, np.int32)

    def can_cut(self, state: SequenceState, now: int, length: int) -> bool:
        """Whether there is a state after the first `length` of a sequence's `now` tokens."""
        return length in (0, now) or any(length == tokens for tokens, _ in state.kept)

    def cut(self, state: SequenceState, now: int, length: int) -> None:
        """Go back to the state after the first `length` tokens, which there is."""
        if length == now:
            return
        slot = self._at(state, length)
        if slot is not None:
            self.pool.retain([slot])
        kept = [(tokens, held) for tokens, held in state.kept if tokens <= length]
        self.release(SequenceState(state.slot, state.kept[len(kept) :]))
        state.slot, state.kept = slot, kept

    def fork(self, state: SequenceState, now: int, length: int) -> SequenceState:
        """The state after the first `length` tokens, which there is, for another sequence."""
        slot = state.slot if length == now else self._at(state, length)
        if slot is not None:
            self.pool.retain([slot])
        return SequenceState(slot)

    def keep(self, state: SequenceState, now: int) -> None:
        """Keep the state of now, after `now` tokens, to come back to."""
        if state.slot is None or any(tokens == now for tokens, _ in state.kept):
            return
        self.pool.retain([state.slot])
        state.kept.append((now, state.slot))
        if len(state.kept) > self.most_kept:
            self.pool.release([state.kept.pop(0)[1]])

    def release(self, state: SequenceState) -> None:
        """Let go of all of a sequence's slots."""
        self.pool.release(state.slots())

    def check(self, states: Iterator[tuple[int, SequenceState]]) -> None:
        """Assert that the sequences and the pool agree.

        Args:
            states: of all sequences, with their lengths.
        """
        holds = []
        for length, state in states:
            assert (state.slot is None) == (length == 0), f"{length} tokens, {state}"
            tokens = [at for at, _ in state.kept]
            assert tokens == sorted(set(tokens)) and all(0 < at <= length for at in tokens), state
            assert len(tokens) <= self.most_kept, state
            holds += state.slots()
        self.pool.check(holds)

    @staticmethod
    def _at(state: SequenceState, length: int) -> int | None:
        return dict(state.kept)[length] if length else None
