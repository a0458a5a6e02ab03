"""Texts of several requests share a step, and nobody's failure is another's."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from relaxlm.engine.embedding import EmbeddingJob, EmbeddingQueue
from relaxlm.errors import BusyError, LibraryError, RelaxLMError


class FakeEmbedder:
    """A vector is its text's first token; a step takes 3 texts. Token 0 breaks it."""

    def __init__(self) -> None:
        self.executor = SimpleNamespace(limits=SimpleNamespace(max_batch_size=5))
        self.steps: list[list[int]] = []

    def pages_of(self, ids: Any) -> int:
        return len(ids)

    def together(self, texts: Any) -> int:
        return min(3, len(texts))

    def run(self, texts: Any) -> list[np.ndarray]:
        self.steps.append([ids[0] for ids in texts])
        if any(ids[0] == 0 for ids in texts):
            raise ZeroDivisionError("broken")
        return [np.array([ids[0]]) for ids in texts]


class FakeScheduler:
    free = 9

    def make_room(self, pages: int) -> bool:
        return pages <= self.free


def job(*firsts: int) -> EmbeddingJob:
    return EmbeddingJob([[first] * 2 for first in firsts], lambda result: None)


def go_on(queue: EmbeddingQueue, embedder: Any, scheduler: Any) -> dict[int, Any]:
    return {id(job): result for job, result in queue.go_on(embedder, scheduler)}


def test_texts_go_in_order_and_across_requests() -> None:
    queue, embedder, scheduler = EmbeddingQueue(), FakeEmbedder(), FakeScheduler()
    jobs = [job(1), job(2, 3, 4, 5), job(6)]
    queue.jobs.extend(jobs)
    assert go_on(queue, embedder, scheduler) == {id(jobs[0]): [1]}
    ended = go_on(queue, embedder, scheduler)
    assert list(ended) == [id(jobs[1]), id(jobs[2])]
    assert [vector.tolist() for vector in ended[id(jobs[1])]] == [[2], [3], [4], [5]]
    assert embedder.steps == [[1, 2, 3], [4, 5, 6]]
    assert go_on(queue, embedder, scheduler) == {} and not queue.jobs


def test_without_room_texts_wait() -> None:
    queue, embedder, scheduler = EmbeddingQueue(), FakeEmbedder(), FakeScheduler()
    queue.jobs.append(job(1))
    scheduler.free = 1
    assert go_on(queue, embedder, scheduler) == {} and embedder.steps == []
    scheduler.free = 2
    assert len(go_on(queue, embedder, scheduler)) == 1


def test_a_step_that_fails_ends_those_who_were_in_it() -> None:
    queue, embedder, scheduler = EmbeddingQueue(), FakeEmbedder(), FakeScheduler()
    jobs = [job(1, 0), job(2, 3), job(4)]
    queue.jobs.extend(jobs)
    ended = go_on(queue, embedder, scheduler)
    assert set(ended) == {id(jobs[0]), id(jobs[1])}
    for error in ended.values():
        assert isinstance(error, LibraryError)
        assert str(error) == "embedding failed: ZeroDivisionError: broken"
    assert go_on(queue, embedder, scheduler).keys() == {id(jobs[2])}
    queue.jobs.extend(jobs)
    closed: RelaxLMError = BusyError("the engine has ended", closing=True)
    assert [error for _, error in queue.give_up(closed)] == [closed] * 3 and not queue.jobs
