"""The engine's steps over an executor that answers by what its pages hold: exact, and no model."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relaxlm.engine.core import EngineCore, Event
from relaxlm.engine.job import Job, make_job
from relaxlm.engine.kept_sequences import KeptSequences
from relaxlm.engine.reuse import Reuse
from relaxlm.engine.scheduler import StepLimits
from relaxlm.engine.shared_pages import SharedPages
from relaxlm.engine.speculation import NgramDrafts
from relaxlm.engine.types import GenerationRequest
from relaxlm.errors import RequestError
from relaxlm.runtime.cache_size import slots_for
from relaxlm.runtime.generation import GenerationConfig, SamplingState
from relaxlm.runtime.page_pool import PagePool
from relaxlm.runtime.sampling import Sampled, sample
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.state_slots import StateSlots
from tests.remembering_executor import (
    PAGE,
    RecurrentExecutor,
    RememberingExecutor,
    WindowedExecutor,
    logits_after,
    visible,
)
from tests.tiny_model import TOKENS

CONTEXT = 40
LIMITS = StepLimits(tokens=8, sequences=6, rows=6, mixed_prefill_tokens=5)
WORKERS = ThreadPoolExecutor(1)
KEPT = 3
END = 7
# How much larger the logit of the circle's next token is: right most of the time.
CIRCLES = 8.0


class RepeatingExecutor(RememberingExecutor):
    """Its text goes in circles, so that guesses from the text come true."""

    def __init__(self, pages: int, strength: float = CIRCLES) -> None:
        super().__init__(pages)
        self.strength = strength

    def forward(self, tables, ids, rows):
        logits = super().forward(tables, ids, rows)
        for i, row in enumerate(rows):
            logits[i, 20 + int(tables.positions[row]) % 5] += self.strength
        return logits


class Engine:
    """A core, the jobs it was given, and what came of them."""

    def __init__(
        self,
        pages: int = 64,
        executor: Any = None,
        limits: StepLimits = LIMITS,
        prefix_cache: bool = True,
        drafts: NgramDrafts | None = None,
    ) -> None:
        self.executor = executor or RememberingExecutor(pages)
        states = None
        if isinstance(self.executor, RecurrentExecutor):
            states = StateSlots(PagePool(len(self.executor.slots)))
        window, sinks = self.executor.window, self.executor.sinks
        sequences = PagedSequences(PagePool(pages), PAGE, window, sinks, states=states)
        reuse: Reuse = Reuse(sequences)
        if prefix_cache and (states or window):
            reuse = KeptSequences(sequences, KEPT, tail=2, worth=3)
        elif prefix_cache:
            reuse = SharedPages(sequences)
        self.core = EngineCore(self.executor, sequences, limits, WORKERS, reuse, drafts)
        self.jobs: list[Job] = []
        self.events: list[Event] = []
        self.steps = 0

    def add(self, prompt: Sequence[int], **settings) -> Job:
        request = settings.pop("request", {})
        config = GenerationConfig(**{"temperature": 0.0, "max_tokens": 6, **settings})
        wanted = GenerationRequest(prompt, config, frozenset({END}), **request)
        job = make_job(len(self.jobs), wanted, CONTEXT - len(prompt), TOKENS)
        self.jobs.append(job)
        self.core.add(job)
        return job

    def step(self) -> list[Event]:
        events = self.core.step()
        self.core.check()
        self.events += events
        self.steps += 1
        return events

    def finish(self) -> None:
        for _ in range(2000):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError(f"not done after 2000 steps: {self.core.scheduler.running}")

    def tokens(self, job: Job, index: int = 0) -> list[int]:
        mine = [e for e in self.events if e.job is job and e.index == index]
        return [sampled.token for event in mine for sampled in event.tokens]


def alone(
    prompt: Sequence[int], choice: int = 0, circles: float = 0.0, windowed: bool = False, **settings
) -> list[int]:
    """A reply by itself, without cache or engine."""
    return list(_alone(tuple(prompt), choice, circles, windowed, tuple(sorted(settings.items()))))


@cache
def _alone(
    prompt: tuple, choice: int, circles: float, windowed: bool, settings: tuple
) -> list[int]:
    config = GenerationConfig(**{"temperature": 0.0, "max_tokens": 6, **dict(settings)})
    state, tokens = SamplingState(config, prompt, TOKENS, choice), list(prompt)
    room = min(config.max_tokens or CONTEXT, CONTEXT - len(prompt))
    for _ in range(room):
        sees = (WindowedExecutor.window, WindowedExecutor.sinks) if windowed else (CONTEXT, 0)
        logits = logits_after(visible(tokens, *sees))
        logits[20 + (len(tokens) - 1) % 5] += circles
        [sampled] = sample(logits[None], [state])
        assert isinstance(sampled, Sampled)
        tokens.append(sampled.token)
        if sampled.token == END:
            break
    return tokens[len(prompt) :]


STARTS = ([], [11, 12, 13], [11, 12, 13, 14, 15, 16, 17, 18, 19], [9] * 13)


@st.composite
def prompts(draw) -> list[int]:
    rest = draw(st.lists(st.integers(30, 33), min_size=1, max_size=14))
    return draw(st.sampled_from(STARTS)) + rest


SETTINGS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 16), "n": st.sampled_from([1, 1, 1, 2, 3])},
    optional={
        "temperature": st.sampled_from([0.7, 1.3]),
        "repetition_penalty": st.just(1.3),
        "top_k": st.just(40),
    },
)
ACTIONS = st.one_of(
    st.tuples(st.just("add"), prompts(), SETTINGS),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("end"), st.integers(0, 9)),
)


@given(
    actions=st.lists(ACTIONS, min_size=3, max_size=24),
    pages=st.sampled_from([11, 12, 15, 30, 64]),
    shared=st.booleans(),
    model=st.sampled_from(["plain", "guessed", "recurrent", "windowed"]),
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mix_of_requests_gives_the_tokens_of_each_alone(actions, pages, shared, model):
    guessed = model == "guessed"
    executor = RepeatingExecutor(pages) if guessed else None
    if model == "recurrent":
        executor = RecurrentExecutor(pages, slots_for(LIMITS.sequences, KEPT))
    if model == "windowed":
        executor = WindowedExecutor(pages)
    drafts = NgramDrafts(tokens=3) if guessed else None
    engine = Engine(pages, executor, prefix_cache=shared, drafts=drafts)
    given_up: set[int] = set()
    cut: set[int] = set()
    for kind, *values in actions:
        if kind == "add":
            prompt, config = values
            engine.add(prompt, seed=len(engine.jobs), **config)
        elif kind == "step":
            for _ in range(values[0]):
                engine.step()
        elif engine.jobs:
            job = engine.jobs[values[0] % len(engine.jobs)]
            if kind == "cancel":
                given_up.add(job.id)
                engine.core.cancel(job.id)
            elif job.forked:
                cut.add(job.id)
                engine.core.end_reply(job.id, 0)
    engine.finish()

    for job in engine.jobs:
        config = job.request.config
        chosen = {name: getattr(config, name) for name in config.model_fields_set}
        for index in range(config.n):
            found = engine.tokens(job, index)
            expected = alone(
                job.request.prompt, index, CIRCLES * guessed, model == "windowed", **chosen
            )
            if job.id in given_up or (job.id in cut and index == 0):
                assert found == expected[: len(found)]
            else:
                assert found == expected, f"job {job.id}, reply {index}"
    core = engine.core
    assert not core.jobs and not core.scheduler.waiting and not core.scheduler.running
    core.reuse.clear()
    assert core.sequences.pool.free == pages
    if core.sequences.states is not None:
        assert core.sequences.states.pool.used == 0


def test_a_long_prompt_is_cut_and_others_are_written_meanwhile():
    engine = Engine()
    short = engine.add([30, 31], max_tokens=12)
    engine.step()
    long = engine.add(list(range(40, 70)), max_tokens=2)
    while not engine.tokens(long):
        before = len(engine.tokens(short))
        engine.step()
        assert len(engine.tokens(short)) == before + 1
        assert sum(engine.executor.steps[-1]) <= LIMITS.tokens
    # 30 tokens beside one that is written: 5, 5, 5, ...
    assert engine.executor.steps[1:] == [[1, 5]] * 6


def test_prompts_go_first_come_first_served():
    engine = Engine()
    first, second = engine.add(list(range(40, 60))), engine.add([30])
    while not engine.tokens(second):
        engine.step()
    assert engine.tokens(first), "the later, shorter prompt was served first"


def test_a_common_prefix_is_computed_once():
    engine = Engine()
    prompt = list(range(40, 56))
    engine.add([*prompt, 30], max_tokens=3)
    engine.finish()
    computed = sum(sum(step) for step in engine.executor.steps)
    later = engine.add([*prompt, 31], max_tokens=3)
    engine.finish()
    assert sum(sum(step) for step in engine.executor.steps) - computed == 1 + 2
    assert later.cached_tokens == 16
    stats = engine.core.stats()
    assert (stats.prefix_tokens, stats.prefix_hits) == (17 + 17, 16)


def test_a_prefix_may_end_within_a_page_and_the_page_is_copied():
    engine = Engine()
    engine.add([40, 41, 42, 43, 44, 45, 46], max_tokens=2)
    engine.finish()
    later = engine.add([40, 41, 42, 43, 44, 45, 33, 34], max_tokens=4)
    engine.finish()
    assert later.cached_tokens == 6
    assert engine.tokens(later) == alone(later.request.prompt, max_tokens=4)


def test_a_reply_that_comes_back_in_the_next_prompt_is_cached():
    engine = Engine()
    first = engine.add([40, 41, 42], max_tokens=6)
    engine.finish()
    history = [40, 41, 42, *engine.tokens(first)]
    later = engine.add([*history, 33], max_tokens=2)
    engine.finish()
    assert later.cached_tokens == len(history) - 1  # the last token was never computed


def test_when_pages_run_out_the_latest_waits_and_nothing_is_lost():
    engine = Engine(pages=11)
    jobs = [engine.add([40 + i, 30], max_tokens=30) for i in range(4)]
    engine.finish()
    assert engine.core.scheduler.preemptions > 0
    for job in jobs:
        assert engine.tokens(job) == alone(job.request.prompt, max_tokens=30)
    ends = [[e.job for e in engine.events if e.tokens][::-1].index(job) for job in jobs]
    assert ends == sorted(ends, reverse=True), "the first to come was not the first to end"


def test_a_cancelled_job_gives_its_pages_back_before_the_next_step():
    engine = Engine(prefix_cache=False)
    job = engine.add(list(range(40, 60)), n=3, max_tokens=9)
    for _ in range(5):
        engine.step()
    assert engine.core.sequences.pool.used > 0
    engine.core.cancel(job.id)
    assert engine.core.sequences.pool.used == 0
    assert [event.cancelled for event in engine.step()] == [True]
    engine.core.cancel(job.id)  # nothing to do any more
    assert not engine.core.has_work


def test_right_guesses_save_steps_and_change_nothing():
    plain = Engine(executor=RepeatingExecutor(64, 30.0))
    guessing = Engine(executor=RepeatingExecutor(64, 30.0), drafts=NgramDrafts())
    prompt = [24, 20, 21, 22, 23] * 3  # in step with the circle
    for engine in (plain, guessing):
        job = engine.add(prompt, max_tokens=20)
        engine.finish()
        assert engine.tokens(job) == alone(prompt, circles=30.0, max_tokens=20)
    assert guessing.steps < plain.steps / 3
    stats = guessing.core.stats()
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens


class BrokenExecutor(RememberingExecutor):
    def forward(self, tables, ids, rows):
        logits = super().forward(tables, ids, rows)
        if 66 in ids:
            raise RuntimeError("out of order")
        if 77 in ids:
            logits[np.searchsorted(rows, np.flatnonzero(ids == 77)[0])] = np.nan
        return logits


def test_a_step_that_fails_fails_its_requests_and_no_later_ones():
    engine = Engine(executor=BrokenExecutor(64))
    bad = engine.add([66, 30])
    engine.step()
    [event] = [event for event in engine.events if event.job is bad]
    assert event.error is not None and "out of order" in str(event.error)
    good = engine.add([40, 30])
    engine.finish()
    assert engine.tokens(good) == alone([40, 30])
    assert engine.core.stats().failed == 1


def test_a_row_that_is_not_a_number_fails_its_own_request_only():
    engine = Engine(executor=BrokenExecutor(64))
    good, bad = engine.add([40, 30]), engine.add([31, 77], n=2)
    engine.finish()
    assert engine.tokens(good) == alone([40, 30])
    errors = [event for event in engine.events if event.error is not None]
    assert [event.job for event in errors] == [bad] and "nan" in str(errors[0].error)


def test_log_probabilities_of_the_prompt():
    engine = Engine(limits=StepLimits(8, 6, 3, 5))  # rows bound the chunks
    prompt = [40, 41, 42, 30, 31, 32, 33, 34]
    engine.add(prompt, max_tokens=2)
    engine.finish()
    job = engine.add(
        prompt, max_tokens=2, logprobs=True, top_logprobs=2, request={"prompt_logprobs": True}
    )
    engine.finish()
    assert job.cached_tokens == 0 and len(job.prompt_logprobs) == len(prompt) - 1
    for i, found in enumerate(job.prompt_logprobs):
        logits = logits_after(prompt[: i + 1]).astype(np.float64)
        expected = logits - np.log(np.exp(logits[:TOKENS] - 50).sum()) - 50
        assert found.token == prompt[i + 1]
        assert found.logprob == pytest.approx(expected[prompt[i + 1]], abs=1e-5)
        best = np.argsort(-logits[:TOKENS])[:2]
        assert [token for token, _ in found.top] == best.tolist()


class Counting:
    """A grammar: tokens count up from `first`, and a reply ends after `length` of them."""

    def __init__(self, first: int, length: int, fails_at: int = -1) -> None:
        self.first, self.length, self.fails_at = first, length, fails_at

    def matcher(self) -> "Counting":
        matcher = Counting(self.first, self.length, self.fails_at)
        matcher.at = 0
        return matcher

    def mask(self) -> np.ndarray:
        bits = np.zeros(-(-TOKENS // 32) * 32, np.uint8)
        bits[END if self.at == self.length else self.first + self.at] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        if self.at == self.fails_at:
            raise RequestError("the grammar takes too long")
        self.at += 1


def test_a_grammar_decides_each_of_its_replies_and_no_others():
    engine = Engine(drafts=NgramDrafts())
    free = engine.add([40, 30], max_tokens=5)
    bound = engine.add([41, 30], n=2, temperature=1.0, request={"grammar": Counting(100, 4)})
    engine.finish()
    for index in range(2):
        assert engine.tokens(bound, index) == [100, 101, 102, 103, END]
    assert engine.tokens(free) == alone([40, 30], max_tokens=5)


def test_a_grammar_that_fails_fails_its_own_request_only():
    engine = Engine()
    free = engine.add([40, 30], max_tokens=5)
    bound = engine.add([41, 30], request={"grammar": Counting(100, 4, fails_at=2)})
    engine.finish()
    assert engine.tokens(bound) == [100, 101, 102]
    errors = [event for event in engine.events if event.error is not None]
    assert [event.job for event in errors] == [bound] and "too long" in str(errors[0].error)
    assert engine.tokens(free) == alone([40, 30], max_tokens=5)
