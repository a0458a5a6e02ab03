"""Vectors of texts, between the steps of other requests: texts of several requests share a step."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from relaxlm.engine.scheduler import Scheduler
from relaxlm.errors import LibraryError, RelaxLMError
from relaxlm.runtime.embedding import Embedder

Vectors = Callable[[list[np.ndarray] | RelaxLMError], None]


@dataclass(eq=False)
class EmbeddingJob:
    """Some texts of one request.

    Attributes:
        deliver: called once, with the pooled states or with what went wrong.
    """

    prompts: Sequence[Sequence[int]]
    deliver: Vectors
    vectors: list[np.ndarray] = field(default_factory=list)
    submitted_at: float = field(default_factory=time.perf_counter)


# A job that has ended, and what to deliver.
Ended = tuple[EmbeddingJob, list[np.ndarray] | RelaxLMError]


class EmbeddingQueue:
    """Jobs in the order they came."""

    def __init__(self) -> None:
        self.jobs: deque[EmbeddingJob] = deque()

    def go_on(self, embedder: Embedder, scheduler: Scheduler) -> list[Ended]:
        """Compute the vectors of the next texts that go together, if there are pages for them now.

        Returns:
            The jobs that have ended.
        """
        waiting = self._next_texts(embedder.executor.limits.max_batch_size)
        texts = [job.prompts[index] for job, index in waiting]
        if not texts or not scheduler.make_room(embedder.pages_of(texts[0])):
            return []
        count = embedder.together(texts)
        try:
            found = embedder.run(texts[:count])
        except Exception as error:  # nobody's request may end the engine
            failure: RelaxLMError = LibraryError(
                f"embedding failed: {type(error).__name__}: {error}"
            )
            if isinstance(error, RelaxLMError):
                failure = error
            jobs = dict.fromkeys(job for job, _ in waiting[:count])
            self.jobs = deque(job for job in self.jobs if job not in jobs)
            return [(job, failure) for job in jobs]
        for (job, _), vector in zip(waiting, found, strict=False):
            job.vectors.append(vector)
        ended: list[Ended] = []
        while self.jobs and len(self.jobs[0].vectors) == len(self.jobs[0].prompts):
            job = self.jobs.popleft()
            ended.append((job, job.vectors))
        return ended

    def give_up(self, error: RelaxLMError) -> list[Ended]:
        """Forget all jobs."""
        ended: list[Ended] = [(job, error) for job in self.jobs]
        self.jobs.clear()
        return ended

    def _next_texts(self, count: int) -> list[tuple[EmbeddingJob, int]]:
        """The first texts that have no vector yet, at most so many: jobs and places in them."""
        found: list[tuple[EmbeddingJob, int]] = []
        for job in self.jobs:
            for index in range(len(job.vectors), len(job.prompts)):
                if len(found) == count:
                    return found
                found.append((job, index))
        return found
