"""A request inside the engine, and its replies."""

from __future__ import annotations

import time
from array import array
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from relaxlm.engine.prefix_cache import Node
from relaxlm.engine.types import GenerationRequest
from relaxlm.runtime.generation import SamplingState
from relaxlm.runtime.sampling import Sampled

if TYPE_CHECKING:
    from relaxlm.engine.grammar import Matcher


@dataclass(eq=False, slots=True)
class Branch:
    """One reply: the prompt's tokens and its own so far, and what the cache holds of them.

    Attributes:
        ids: int32; prompt and reply.
        seq: the sequence that holds the first `computed` of them; None while it waits.
        node, registered: the prefix cache has the first `registered` pages, the last at `node`.
        marks: places in the prompt after which its sequence is kept for others, in order.
        mask: the grammar's mask for the next token, being computed.
        misses: drafts in a row of which nothing was accepted; `rest`: steps without drafts.
    """

    job: Job
    index: int
    ids: array
    state: SamplingState
    seq: int | None = None
    computed: int = 0
    node: Node | None = None
    registered: int = 0
    marks: list[int] = field(default_factory=list)
    matcher: Matcher | None = None
    mask: Future[np.ndarray] | None = None
    ended: bool = False
    misses: int = 0
    rest: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """First come, first served."""
        return self.job.id, self.index

    @property
    def sequence(self) -> int:
        """The sequence of a reply that runs."""
        assert self.seq is not None, "this reply waits"
        return self.seq

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.ids) - self.computed

    @property
    def generated(self) -> int:
        return len(self.ids) - self.job.prompt_tokens


@dataclass(eq=False, slots=True)
class Job:
    """A request, its replies, and when what happened.

    Attributes:
        room: the most tokens each reply may have.
        forked: whether the prompt is computed, and all replies run.
        prompt_logprobs: of the tokens from the second on, as far as they are computed.
    """

    id: int
    request: GenerationRequest
    prompt_tokens: int
    end_tokens: frozenset[int]
    room: int
    branches: list[Branch] = field(default_factory=list)
    forked: bool = False
    cached_tokens: int = 0
    prompt_logprobs: list[Sampled] = field(default_factory=list)
    submitted_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None

    @property
    def ended(self) -> bool:
        return all(branch.ended for branch in self.branches)


def make_job(job_id: int, request: GenerationRequest, room: int, vocab_size: int) -> Job:
    """
    Raises:
        RequestError: token ids outside the vocabulary.
    """
    config = request.config
    own = frozenset() if config.ignore_eos else request.stop_token_ids
    room = min(config.max_tokens or room, room)
    end_tokens = own | frozenset(config.stop_token_ids)
    job = Job(job_id, request, len(request.prompt), end_tokens, room)
    for index in range(config.n):
        state = SamplingState(config, request.prompt, vocab_size, index)
        job.branches.append(Branch(job, index, array("i", request.prompt), state))
    return job
