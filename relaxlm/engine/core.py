"""The engine's steps: plan, run the model, choose tokens. One thread, no text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor as Workers
from dataclasses import dataclass, replace

import numpy as np

from relaxlm.engine.job import Branch, Job
from relaxlm.engine.reuse import Reuse
from relaxlm.engine.scheduler import Part, Scheduler, StepLimits
from relaxlm.engine.speculation import NgramDrafts
from relaxlm.engine.types import EngineStats
from relaxlm.errors import LibraryError, RelaxLMError
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.sampling import Sampled, logprobs_of, sample
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.step_logits import StepLogits


@dataclass(frozen=True, slots=True)
class Event:
    """What a step did for one reply, or why a whole job ended.

    Attributes:
        index: of the reply; -1 if it is about all of the job's.
        tokens: chosen in this step.
        error: why the job failed; `cancelled` if it was given up.
    """

    job: Job
    index: int
    tokens: tuple[Sampled, ...] = ()
    error: RelaxLMError | None = None
    cancelled: bool = False


class EngineCore:
    """Runs jobs step by step.

    Args:
        executor: called from this thread only.
        sequences: over a pool of the executor's pages.
        limits: of one step.
        reuse: what requests use of each other's work.
        drafts: guesses further tokens, or None.
        workers: where the masks of grammars are computed while the model runs.
    """

    def __init__(
        self,
        executor: Executor,
        sequences: PagedSequences,
        limits: StepLimits,
        workers: Workers,
        reuse: Reuse,
        drafts: NgramDrafts | None = None,
    ) -> None:
        self.executor, self.sequences, self.workers = executor, sequences, workers
        self.reuse = reuse
        assert drafts is None or sequences.states is None, "a wrong guess cannot be taken back"
        self.drafts = drafts
        propose = drafts.propose if drafts is not None else None
        self.scheduler = Scheduler(sequences, reuse, limits, propose)
        self.jobs: dict[int, Job] = {}
        self.counts = EngineStats(pages_total=sequences.pool.total)
        self._events: list[Event] = []

    @property
    def has_work(self) -> bool:
        return bool(self.jobs) or bool(self._events)

    def add(self, job: Job) -> None:
        """Queue a job; takes effect with the next step."""
        self.jobs[job.id] = job
        if job.request.grammar is not None:
            for branch in job.branches:
                branch.mask = self.workers.submit(_first_mask, branch)
        self.scheduler.add(job)

    def cancel(self, job_id: int) -> None:
        """Give a job up; its pages are free at once. No error if it has ended."""
        job = self.jobs.get(job_id)
        if job is not None:
            self.counts.cancelled += 1
            self._drop(job)
            self._events.append(Event(job, -1, cancelled=True))

    def end_reply(self, job_id: int, index: int) -> None:
        """End one reply whose text is complete (a stop string)."""
        job = self.jobs.get(job_id)
        if job is not None:
            branch = next(branch for branch in job.branches if branch.index == index)
            if not branch.ended:
                self._end(branch)

    def fail(self, job_id: int, error: RelaxLMError) -> None:
        job = self.jobs.get(job_id)
        if job is not None:
            self.counts.failed += 1
            self._drop(job)
            self._events.append(Event(job, -1, error=error))

    def step(self) -> list[Event]:
        """Run one step; does nothing but report if there is nothing to compute."""
        parts = self.scheduler.plan()
        if parts:
            self._run(parts)
            self.counts.steps += 1
        events, self._events = self._events, []
        return events

    def stats(self) -> EngineStats:
        """The counters and the state of now."""
        counts, scheduler, pool = self.counts, self.scheduler, self.sequences.pool
        counts.running = len({branch.job.id for branch in scheduler.running})
        counts.waiting = len(self.jobs) - counts.running
        counts.pages_cached = self.reuse.evictable()
        counts.pages_used = pool.used - counts.pages_cached
        counts.preemptions = scheduler.preemptions
        counts.prefix_tokens, counts.prefix_hits = scheduler.prefix_tokens, scheduler.prefix_hits
        return replace(counts, batch_sizes=dict(counts.batch_sizes))

    def check(self) -> None:
        """Assert that pages, tables and what is kept for later requests agree."""
        self.reuse.check()
        self.sequences.check(self.reuse.held_pages())
        held = [b.seq for b in self.scheduler.running]
        assert len(self.sequences) == len(held) + self.reuse.held_sequences() and None not in held

    def _run(self, parts: list[Part]) -> None:
        counts = self.counts
        try:
            tables = self.sequences.batch(
                [(part.branch.sequence, part.count + len(part.draft)) for part in parts]
            )
            ids, rows = _inputs(parts)
            started = time.perf_counter()
            self.executor.copy_pages(*self.sequences.take_copies())
            logits = self.executor.compute(tables, ids, rows)
            counts.forward_seconds += time.perf_counter() - started
        except Exception as error:  # nobody's request may end the engine
            for job in {part.branch.job.id: part.branch.job for part in parts}.values():
                # What the step wrote is unknown.
                self._drop(job, keep=False)
                counts.failed += 1
                self._events.append(Event(job, -1, error=_step_failed(error)))
            return
        counts.batch_sizes[len(parts)] = counts.batch_sizes.get(len(parts), 0) + 1
        for branch, tokens in self._choose(parts, logits):
            self._accept(branch, tokens)

    def _choose(
        self, parts: list[Part], logits: StepLogits
    ) -> list[tuple[Branch, list[Sampled | LibraryError]]]:
        """The next tokens of every reply whose prompt is computed, from the rows of its part."""
        ready: list[tuple[Branch, tuple[int, ...]]] = []
        picked: list[int] = []  # a row for each
        row = 0
        for part in parts:
            branch, job, draft = part.branch, part.branch.job, part.draft
            finished = part.count == branch.remaining
            if not job.forked:
                self.counts.prompt_tokens += part.count
                if job.request.prompt_logprobs:
                    _add_prompt_logprobs(branch, part, logits.all()[row : row + part.rows])
            if not draft:
                self.scheduler.computed(branch, part.count)
            row += part.rows
            if finished:
                for reply in (branch,) if job.forked else self.scheduler.fork(job):
                    if reply.mask is None or self._set_mask(reply):
                        ready.append((reply, draft))
                        picked.append(row - 1 - len(draft))
        if not ready:
            return []
        states = [branch.state for branch, _ in ready]
        chosen: list[tuple[Branch, list[Sampled | LibraryError]]] = []
        seen = logits.seen_by(picked, states)
        results = sample(seen.logits, states, seen.peaks, seen.blocks)
        for (branch, draft), first, result in zip(ready, picked, results, strict=True):
            tokens = [result]
            if draft:
                tokens += self._verify(branch, draft, result, logits, first)
            chosen.append((branch, tokens))
        return chosen

    def _verify(
        self,
        branch: Branch,
        draft: Sequence[int],
        first: Sampled | LibraryError,
        logits: StepLogits,
        picked: int,
    ) -> list[Sampled | LibraryError]:
        """Further tokens, chosen from the rows behind row `picked` as far as the draft was right.

        Each row is sampled as if the step had been its own, so tokens are those of no draft.
        """
        further: list[Sampled | LibraryError] = []
        last, accepted = first, 0
        for row, guess in enumerate(draft, 1):
            if isinstance(last, LibraryError) or last.token != guess or self._is_end(branch, last):
                break
            accepted += 1
            seen = logits.seen_by([picked + row], [branch.state])
            [last] = sample(seen.logits, [branch.state], seen.peaks, seen.blocks)
            further.append(last)
        # The draft is in the pages as far as it was right.
        self.sequences.truncate(branch.sequence, branch.computed + 1 + accepted)
        self.counts.drafted_tokens += len(draft)
        self.counts.accepted_tokens += accepted
        assert self.drafts is not None
        self.drafts.learn(branch, len(draft), accepted)
        return further

    def _accept(self, branch: Branch, tokens: list[Sampled | LibraryError]) -> None:
        if branch.ended:  # its job has failed with another reply's token
            return
        job, kept = branch.job, []
        for token in tokens:
            if isinstance(token, LibraryError):
                self.fail(job.id, token)
                return
            branch.ids.append(token.token)
            kept.append(token)
        self.counts.generated_tokens += len(kept)
        if len(branch.ids) - branch.computed > 1:  # after a draft
            self.scheduler.computed(branch, len(branch.ids) - branch.computed - 1)
        self._events.append(Event(job, branch.index, tuple(kept)))
        if self._is_end(branch, kept[-1]) or branch.generated >= job.room:
            self._end(branch)
        elif branch.matcher is not None:
            branch.mask = self.workers.submit(_next_mask, branch, kept[-1].token)

    def _is_end(self, branch: Branch, token: Sampled) -> bool:
        return token.token in branch.job.end_tokens

    def _set_mask(self, branch: Branch) -> bool:
        """Wait for the mask of a reply's grammar; False if that, or another reply's, has failed."""
        assert branch.mask is not None
        if branch.ended:
            return False
        try:
            branch.state.mask = branch.mask.result()
        except Exception as error:  # whatever a grammar does is its own request's affair
            self.fail(branch.job.id, _as_error(error))
        return not branch.ended

    def _end(self, branch: Branch) -> None:
        self.scheduler.end(branch)
        job = branch.job
        if job.ended:
            self.counts.finished += 1
            del self.jobs[job.id]

    def _drop(self, job: Job, keep: bool = True) -> None:
        for branch in job.branches:
            if not branch.ended:
                self.scheduler.end(branch, keep)
            if branch.mask is not None:
                branch.mask.cancel()
        del self.jobs[job.id]


def _inputs(parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n] int32 and the rows whose logits are wanted [m] int32, at least one."""
    ids: list[int] = []
    rows: list[int] = []
    for part in parts:
        start = part.branch.computed
        ids += part.branch.ids[start : start + part.count]
        ids += part.draft
        rows += range(len(ids) - part.rows, len(ids))
    # The model always computes one row; a step of unfinished prompts does not look at it.
    return np.array(ids, np.int32), np.array(rows or [0], np.int32)


def _add_prompt_logprobs(branch: Branch, part: Part, logits: np.ndarray) -> None:
    """Log probabilities of the tokens behind the part's, as far as the prompt goes.

    Args:
        logits: [rows, vocab] float32, of the part's last tokens.
    """
    job = branch.job
    prompt, found, top = job.request.prompt, job.prompt_logprobs, job.request.config.top_logprobs
    logits = logits[:, : branch.state.vocab_size]  # behind it is padding
    for position, row in enumerate(logits, branch.computed + part.count - part.rows):
        following = position + 1
        # After a preemption the beginning comes again.
        if following < len(prompt) and following == len(found) + 1:
            token = prompt[following]
            found.append(Sampled(token, *logprobs_of(row, token, top)))


def _first_mask(branch: Branch) -> np.ndarray:
    grammar = branch.job.request.grammar
    assert grammar is not None
    branch.matcher = grammar.matcher()
    return branch.matcher.mask()


def _next_mask(branch: Branch, token: int) -> np.ndarray:
    assert branch.matcher is not None
    branch.matcher.accept(token)
    return branch.matcher.mask()


def _as_error(error: Exception) -> RelaxLMError:
    if isinstance(error, RelaxLMError):
        return error
    return LibraryError(f"the request failed inside the engine: {type(error).__name__}: {error}")


def _step_failed(error: Exception) -> RelaxLMError:
    if isinstance(error, RelaxLMError):
        return error
    return LibraryError(
        f"a step of the model failed: {type(error).__name__}: {error}. The requests in it are "
        "lost, later ones are not; if it happens again, check the library with `relaxlm doctor`"
    )
