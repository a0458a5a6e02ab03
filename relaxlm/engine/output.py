"""From tokens to text: what a thread beside the steps does with their events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from relaxlm.engine.core import Event
from relaxlm.engine.job import Job
from relaxlm.engine.types import (
    ChoiceUpdate,
    PromptReport,
    RequestTimings,
    TokenText,
    Update,
)
from relaxlm.errors import RelaxLMError
from relaxlm.runtime.generator import Reply
from relaxlm.runtime.stop import StopStrings
from relaxlm.runtime.tokenizer import Tokenizer

Deliver = Callable[[Update], None]


@dataclass(eq=False)
class _Outgoing:
    job: Job
    deliver: Deliver
    replies: list[Reply]
    first_at: float = 0.0
    last_at: float = 0.0
    told: bool = False  # of the prompt
    generated: int = field(default=0)


class Output:
    """Writes the replies of all jobs.

    `open` may be called from any thread, `handle` from one.

    Args:
        end_reply: called with a job's number and a reply's when a stop string has ended its text.
        cancel: called with the number of a job whose receiver fails.
        ended: called with the seconds from a job's submission to its last update.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_reply: Callable[[int, int], None],
        cancel: Callable[[int], None],
        ended: Callable[[float], None],
    ) -> None:
        self._tokenizer, self._end_reply = tokenizer, end_reply
        self._cancel, self._ended = cancel, ended
        self._lock = threading.Lock()
        self._open: dict[int, _Outgoing] = {}

    def open(self, job: Job, deliver: Deliver) -> None:
        """Prepare for a job, before its first event.

        Raises:
            RequestError: an empty stop string.
        """
        request, config = job.request, job.request.config
        strings = () if config.ignore_eos else request.stop_strings
        replies = [
            Reply(
                branch.state,
                self._tokenizer.stream(continuing=request.continuing, shown=request.shown_special),
                StopStrings((*strings, *config.stop)),
                job.end_tokens,
                job.room,
            )
            for branch in job.branches
        ]
        with self._lock:
            self._open[job.id] = _Outgoing(job, deliver, replies)

    def discard(self, job_id: int) -> None:
        """Forget a job that was opened and not started after all."""
        with self._lock:
            self._open.pop(job_id, None)

    def fail_all(self, at: float, error: RelaxLMError) -> None:
        """Tell every open job that the engine has failed."""
        with self._lock:
            jobs = list(self._open.values())
        self.handle(at, [Event(outgoing.job, -1, error=error) for outgoing in jobs])

    def handle(self, at: float, events: list[Event]) -> None:
        """Pass on what a step did, one update for each job."""
        by_job: dict[int, list[Event]] = {}
        for event in events:
            by_job.setdefault(event.job.id, []).append(event)
        for job_id, of_job in by_job.items():
            with self._lock:
                outgoing = self._open.get(job_id)
            if outgoing is None:  # its text had ended already
                continue
            update = self._update(outgoing, at, of_job)
            if update is None:
                continue
            try:
                outgoing.deliver(update)
                finished = update.finished
            except Exception:  # its own affair; others get their text
                self._cancel(job_id)
                finished = True
            if finished:
                self.discard(job_id)
                self._ended(at - outgoing.job.submitted_at)

    def _update(self, out: _Outgoing, at: float, events: list[Event]) -> Update | None:
        choices: list[ChoiceUpdate] = []
        error = None
        for event in events:
            if event.error is not None:
                error = event.error
            elif event.cancelled:
                choices += [
                    ChoiceUpdate(i, (), reply.cancel(), "cancelled")
                    for i, reply in enumerate(out.replies)
                    if reply.finish_reason is None
                ]
            elif out.replies[event.index].finish_reason is None:
                choices.append(self._choice(out, event))
        if not choices and error is None:
            return None
        prompt = None
        if not out.told and any(choice.tokens for choice in choices):
            job, out.told, out.first_at = out.job, True, at
            prompt = PromptReport(job.prompt_tokens, job.cached_tokens, tuple(job.prompt_logprobs))
        out.last_at = at
        finished = error is not None or all(reply.finish_reason for reply in out.replies)
        timings = self._timings(out) if finished else None
        return Update(out.job.id, at, tuple(choices), prompt, timings, error, finished)

    def _choice(self, out: _Outgoing, event: Event) -> ChoiceUpdate:
        reply, tokens = out.replies[event.index], []
        stopped_by: int | str | None = None
        for sampled in event.tokens:
            tokens.append(TokenText(sampled, reply.push(sampled)))
            out.generated += 1
            if reply.finish_reason is not None:
                if reply.stops.matched is not None:
                    stopped_by = reply.stops.matched
                    self._end_reply(out.job.id, event.index)
                elif reply.finish_reason == "stop":
                    stopped_by = sampled.token
                break
        text = "".join(token.text for token in tokens)
        finish = reply.finish_reason
        return ChoiceUpdate(event.index, tuple(tokens), text, finish, stopped_by)

    @staticmethod
    def _timings(out: _Outgoing) -> RequestTimings:
        job = out.job
        started = job.started_at if job.started_at is not None else out.last_at
        first = out.first_at or out.last_at
        return RequestTimings(
            started - job.submitted_at, first - started, out.last_at - first, out.generated
        )
