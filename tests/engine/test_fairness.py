"""Nobody starves: replies being written go on in a flood of prompts; late prompts get a turn."""

import random

import pytest

from tests.engine.test_core import LIMITS, Engine

LONG = 30


def flood(engine: Engine, rng: random.Random, count: int = 40) -> None:
    for _ in range(count):
        # No prefix in common: nothing is spared.
        engine.add([rng.randrange(100, 250) for _ in range(LONG)], max_tokens=rng.randint(1, 8))


def test_a_reply_being_written_gets_a_token_in_every_step_of_a_flood() -> None:
    engine = Engine(pages=200)
    early = engine.add([11, 12], max_tokens=30, ignore_eos=True)
    engine.step()
    flood(engine, random.Random(0))
    for written in range(2, 31):
        engine.step()
        assert len(engine.tokens(early)) == written
    assert early.ended
    engine.finish()


@pytest.mark.parametrize("seed", range(5))
def test_a_short_request_waits_for_what_came_before_it_and_no_longer(seed: int) -> None:
    """While it waits, a step gives prompts all that is theirs, or every place writes a token."""
    engine, rng = Engine(pages=200), random.Random(seed)
    flood(engine, rng)
    before = list(engine.jobs)
    for _ in range(3):
        engine.step()
    late = engine.add([11, 12], max_tokens=1)
    engine.steps = 0
    flood(engine, rng)  # those behind it don't count
    while not engine.tokens(late):
        engine.step()
    prompts, replies = LONG * len(before), sum(job.room for job in before)
    share = LIMITS.mixed_prefill_tokens
    # A chunk that ends a prompt, or a place that becomes free, may leave the rest of a step unused.
    assert engine.steps <= prompts / share + replies / LIMITS.sequences + len(before)
    order = list(dict.fromkeys(event.job.id for event in engine.events))
    assert order[: len(before) + 1] == list(range(len(before) + 1))
    engine.finish()


def test_few_pages_let_everybody_end_in_turn() -> None:
    """Replies are put back and computed again, the oldest never."""
    engine, rng = Engine(pages=24), random.Random(1)
    for _ in range(30):
        engine.add([rng.randrange(100, 250) for _ in range(12)], max_tokens=20, ignore_eos=True)
    ends: list[int] = []
    while engine.core.has_work:
        engine.step()
        ends += [job.id for job in engine.jobs if job.ended and job.id not in ends]
    assert engine.core.scheduler.preemptions > 0
    assert ends == sorted(ends)
