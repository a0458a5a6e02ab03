"""Which replies take part in the next step, and with how many tokens.

First come, first served, by these rules:

1. Every reply that is being written gets its next token (with a draft behind it, if somebody
   proposed one).
2. What is left of the step goes to prompts, the oldest first, in chunks: all of it if nothing is
   being written, and `mixed_prefill_tokens` otherwise, so that a long prompt does not hold up the
   others' next token for long.
3. A waiting reply is admitted when all of its prompt has room in pages that are free or only
   cached, with a page to spare for every reply that runs.
4. When pages run out, the latest reply gives up its pages and waits again, with its tokens so far;
   they are computed again later. The oldest one always goes on, and so everyone ends.

Only numbers: no tensors, no threads.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from relaxlm.engine.job import Branch, Job
from relaxlm.engine.reuse import Reuse
from relaxlm.runtime.cache_size import pages_per_sequence
from relaxlm.runtime.sequence_table import PagedSequences

Propose = Callable[[Branch, int], list[int]]


@dataclass(frozen=True)
class StepLimits:
    """Of one step: tokens, sequences, rows of logits; and of prompts' tokens beside replies."""

    tokens: int
    sequences: int
    rows: int
    mixed_prefill_tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """What one reply does in a step.

    Attributes:
        count: tokens of the reply that are computed, from `branch.computed` on.
        draft: further tokens, guessed.
        rows: how many of the last tokens, drafts included, need logits.
    """

    branch: Branch
    count: int
    draft: tuple[int, ...] = ()
    rows: int = 1


class Scheduler:
    """The replies that wait and that run.

    Args:
        reuse: what requests share.
        propose: guesses up to so many tokens that may follow a reply's.
    """

    def __init__(
        self,
        sequences: PagedSequences,
        reuse: Reuse,
        limits: StepLimits,
        propose: Propose | None = None,
    ) -> None:
        self.sequences, self.reuse, self.limits = sequences, reuse, limits
        self.propose = propose
        self.waiting: list[Branch] = []  # by `order`
        self.running: list[Branch] = []  # by `order`
        self.preemptions = 0
        self.prefix_tokens = self.prefix_hits = 0

    def add(self, job: Job) -> None:
        self._insert(self.waiting, job.branches[0])

    def fork(self, job: Job) -> list[Branch]:
        """Start the other replies of a job whose prompt has just been computed."""
        first, *others = job.branches
        job.forked = True
        for branch in others:
            self.reuse.fork(first, branch)
            self._insert(self.running, branch)
        return job.branches

    def end(self, branch: Branch, keep: bool = True) -> None:
        """A reply has ended or failed: its pages are free now, or kept for others if `keep`."""
        branch.ended = True
        if branch.seq is not None:
            self.reuse.release(branch, keep)
            self.running.remove(branch)
        elif branch in self.waiting:
            self.waiting.remove(branch)

    def plan(self) -> list[Part]:
        """The next step; empty if there is nothing to do."""
        writing = [branch for branch in self.running if branch.remaining == 1]
        writing = self._with_room(writing)
        parts = [Part(branch, 1) for branch in writing]
        if self.propose is not None and parts:
            parts = self._with_drafts(parts)
        tokens = sum(1 + len(part.draft) for part in parts)
        rows = self.limits.rows - tokens
        left = self.limits.tokens - tokens
        if parts:
            left = min(left, self.limits.mixed_prefill_tokens)
        planned = [(part.branch.sequence, 1 + len(part.draft)) for part in parts]
        for branch in [branch for branch in self.running if branch.remaining > 1]:
            if left < 1 or rows < 1:
                return parts
            if branch.seq is None:  # preempted by an older one in this loop
                continue
            part = self._chunk(branch, left, rows, planned)
            if part is None:
                return parts
            parts.append(part)
            planned.append((branch.sequence, part.count))
            left, rows = left - part.count, rows - part.rows
        while self.waiting and left >= 1 and rows >= 1:
            branch = self.waiting[0]
            if not self._admit(branch, planned):
                break
            part = self._chunk(branch, left, rows, planned)
            if part is None:  # cached pages whose children are in use cannot be evicted
                self._wait(branch)
                break
            parts.append(part)
            planned.append((branch.sequence, part.count))
            left, rows = left - part.count, rows - part.rows
        return parts

    def computed(self, branch: Branch, count: int) -> None:
        """The next `count` tokens of a reply are in its sequence."""
        branch.computed += count
        self.reuse.computed(branch)

    def make_room(self, pages: int) -> bool:
        """Whether so many pages are free, if need be after evicting what nobody uses."""
        missing = pages - self.sequences.pool.free
        if missing > 0:
            self.reuse.evict(missing)
        return pages <= self.sequences.pool.free

    def _preempt(self, branch: Branch) -> None:
        self.preemptions += 1
        self._wait(branch)

    def _wait(self, branch: Branch) -> None:
        self.reuse.release(branch, keep=True, preempted=True)
        self.running.remove(branch)
        self._insert(self.waiting, branch)

    def _with_room(self, writing: list[Branch]) -> list[Branch]:
        """Those of the replies being written that have a page for their next token."""
        if self.sequences.pool.free >= len(writing):  # none needs more than one
            return writing
        while writing:
            needed = self.sequences.pages_needed([(branch.sequence, 1) for branch in writing])
            if self.make_room(needed):
                break
            last = self.running[-1]
            assert len(self.running) > 1, "the pages do not suffice for one reply alone"
            self._preempt(last)
            if last is writing[-1]:
                writing.pop()
        return writing

    def _with_drafts(self, parts: list[Part]) -> list[Part]:
        assert self.propose is not None
        spare = min(self.limits.rows, self.limits.tokens) - len(parts)
        drafted = []
        for part in parts:
            branch = part.branch
            most = min(spare, branch.job.room - branch.generated - 1)
            draft = tuple(self.propose(branch, most)) if most > 0 else ()
            spare -= len(draft)
            drafted.append(Part(branch, 1, draft, 1 + len(draft)))
        if spare == min(self.limits.rows, self.limits.tokens) - len(parts):
            return parts
        steps = [(part.branch.sequence, 1 + len(part.draft)) for part in drafted]
        return drafted if self.make_room(self.sequences.pages_needed(steps)) else parts

    def _chunk(
        self, branch: Branch, left: int, rows: int, planned: list[tuple[int, int]]
    ) -> Part | None:
        """The next piece of a prompt; None if there is no page for it now."""
        count = min(left, self.reuse.most(branch))
        if wants_prompt_logprobs(branch):
            count = min(count, rows)
        while not self.make_room(self.sequences.pages_needed([*planned, (branch.sequence, count)])):
            last = self.running[-1]
            if last is branch:
                return None
            # Only later ones, whose turn in this step has not come.
            if last.order < branch.order or any(last.seq == seq for seq, _ in planned):
                return None
            self._preempt(last)
        wanted = count if wants_prompt_logprobs(branch) else int(count == branch.remaining)
        return Part(branch, count, (), wanted)

    def _admit(self, branch: Branch, planned: list[tuple[int, int]]) -> bool:
        """Give a waiting reply a sequence, with what there is of it."""
        if self._slots() + _slots(branch) > self.limits.sequences:
            return False
        sequences, size = self.sequences, self.sequences.page_size
        found = None if wants_prompt_logprobs(branch) else self.reuse.find(branch)
        matched = 0 if found is None else found.tokens
        pages = -(-(len(branch.ids) + 1) // size) - matched // size
        if sequences.window:
            pages = min(pages, self._window_pages())
        spare = len(self.running)  # a page for each
        needed = pages + spare + (sequences.pages_needed(planned) if planned else 0)
        if needed > sequences.pool.free and self.running:
            if needed > sequences.pool.free + self.reuse.evictable(found):
                return False
        self.reuse.begin(branch, found)
        self.waiting.pop(0)
        self._insert(self.running, branch)
        if branch.job.started_at is None:
            branch.job.started_at = time.perf_counter()
            branch.job.cached_tokens = matched
            self.prefix_tokens += len(branch.ids)
            self.prefix_hits += matched
        return True

    def _window_pages(self) -> int:
        s = self.sequences
        return pages_per_sequence(2**31 - 1, self.limits.tokens, s.page_size, s.window, s.sinks)

    def _slots(self) -> int:
        return sum(_slots(branch) for branch in self.running)

    @staticmethod
    def _insert(branches: list[Branch], branch: Branch) -> None:
        insort(branches, branch, key=lambda other: other.order)


def wants_prompt_logprobs(branch: Branch) -> bool:
    """Whether logits of the prompt's own tokens are still needed."""
    job = branch.job
    return (
        job.request.prompt_logprobs
        and branch is job.branches[0]
        and len(job.prompt_logprobs) < job.prompt_tokens - 1
    )


def _slots(branch: Branch) -> int:
    """Places in a step that a reply takes, those of its siblings to come included."""
    job = branch.job
    if job.forked:
        return 1
    return len(job.branches)
