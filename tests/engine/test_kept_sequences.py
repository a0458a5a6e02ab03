"""Requests go on from kept sequences: how many of their tokens are there, and what they say."""

import pytest

from relaxlm.engine.kept_sequences import KeptSequences
from relaxlm.runtime.cache_size import slots_for
from tests.engine.test_core import KEPT, LIMITS, Engine, alone
from tests.remembering_executor import PAGE, RecurrentExecutor, WindowedExecutor

PAGES = 64
PROMPT = list(range(40, 52))
TAIL = 2


@pytest.fixture(params=["recurrent", "windowed"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return make(request.param)


def make(kind: str = "recurrent", pages: int = PAGES) -> Engine:
    if kind == "windowed":
        return Engine(pages, WindowedExecutor(pages))
    return Engine(pages, RecurrentExecutor(pages, slots_for(LIMITS.sequences, KEPT)))


def said(engine: Engine, prompt: list[int], **settings) -> tuple[int, list[int]]:
    """How many of a prompt's tokens were there; and the reply, as that of the prompt alone."""
    job = engine.add(prompt, **settings)
    engine.finish()
    windowed = isinstance(engine.executor, WindowedExecutor)
    assert engine.tokens(job) == alone(prompt, windowed=windowed, **settings)
    return job.cached_tokens, engine.tokens(job)


def test_the_next_turn_goes_on_where_the_reply_has_ended(engine: Engine) -> None:
    held, reply = said(engine, PROMPT)
    assert held == 0
    turn = [*PROMPT, *reply, 30, 31]
    assert said(engine, turn)[0] == len(PROMPT) + len(reply) - 1  # its last token has not run


def test_another_reply_goes_on_in_front_of_its_own_beginning(engine: Engine) -> None:
    said(engine, PROMPT)
    computed = sum(map(sum, engine.executor.steps))
    assert said(engine, PROMPT, max_tokens=2)[0] == len(PROMPT) - TAIL
    assert sum(map(sum, engine.executor.steps)) - computed == TAIL + 1


def test_the_third_request_goes_on_where_the_first_two_began_to_differ(engine: Engine) -> None:
    system, most = list(range(60, 69)), 2
    held = [
        said(engine, [*system, *range(first, first + 8)], max_tokens=most)[0]
        for first in (30, 80, 90, 100)
    ]
    assert held == [0, 0, len(system), len(system)]


def test_short_beginnings_are_not_worth_to_be_kept(engine: Engine) -> None:
    said(engine, [40, 41], max_tokens=1)
    assert engine.core.reuse.held_sequences() == 0
    assert said(engine, [40, 41, 42], max_tokens=1)[0] == 0


def test_the_least_recently_used_one_goes_first(engine: Engine) -> None:
    # Each leaves two: before its tail, and where its reply ends.
    first, second, third = ([n, *PROMPT[1:]] for n in (30, 31, 32))
    settings = {"max_tokens": 1}
    said(engine, first, **settings)
    said(engine, second, **settings)
    assert engine.core.reuse.held_sequences() == KEPT
    assert said(engine, second, **settings)[0] == len(PROMPT) - TAIL
    assert said(engine, first, **settings)[0] == 0
    said(engine, third, **settings)
    assert engine.core.reuse.held_sequences() == KEPT


def test_the_first_of_several_replies_is_kept_and_no_other(engine: Engine) -> None:
    job = engine.add(PROMPT, n=3, temperature=1.0, seed=4)
    engine.finish()
    replies = [engine.tokens(job, index) for index in range(3)]
    assert len(set(map(tuple, replies))) == 3
    held = [said(engine, [*PROMPT, *reply, 30], max_tokens=1)[0] for reply in replies]
    assert held == [len(PROMPT) + len(replies[0]) - 1, len(PROMPT) - TAIL, len(PROMPT) - TAIL]


def test_kept_sequences_give_their_pages_to_those_who_run() -> None:
    engine = make(pages=10)  # as many as the second request needs
    said(engine, PROMPT, max_tokens=1)
    # Of the two kept sequences, one ends within the prompt's last page, and the other has a copy.
    assert engine.core.stats().pages_cached == len(PROMPT) // PAGE + 1
    assert engine.core.stats().pages_used == 0
    held, _ = said(engine, [30] * 30, max_tokens=10)
    assert held == 0 and engine.core.scheduler.preemptions == 0
    assert said(engine, PROMPT, max_tokens=1)[0] == 0


def test_what_a_failed_step_has_written_is_not_kept() -> None:
    engine = make()
    forward = engine.executor.forward

    def broken(tables, ids, rows):
        logits = forward(tables, ids, rows)
        if 66 in ids:
            raise RuntimeError("out of order")
        return logits

    engine.executor.forward = broken
    engine.add([*PROMPT, 66, 30, 31])
    engine.finish()
    kept = engine.core.reuse
    assert isinstance(kept, KeptSequences)
    assert all(66 not in sequence.ids for sequence in kept.kept)
    kept.clear()
    assert engine.core.sequences.pool.used == 0
    assert engine.core.sequences.states.pool.used == 0
