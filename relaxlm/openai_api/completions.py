"""/v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from relaxlm.engine.types import GenerationRequest
from relaxlm.openai_api.context import ServiceContext, new_id, now
from relaxlm.openai_api.replies import Completion, CompletionChoice, CompletionLogprobs
from relaxlm.openai_api.requests import DEFAULT_MAX_TOKENS, CompletionRequest, Prompts
from relaxlm.openai_api.stream import ReplyStream
from relaxlm.openai_api.submission import ChoiceNews, Submission
from relaxlm.openai_api.token_logprobs import LogprobWriter, join_logprobs
from relaxlm.openai_api.usage import UsageCount


@dataclass(frozen=True)
class TextPrompt:
    """A prompt to continue.

    Attributes:
        text: as `echo` gives it back.
        hidden: how many tokens in front of it, such as BOS, are no part of the text.
    """

    ids: list[int]
    text: str
    hidden: int = 0


def read_prompts(context: ServiceContext, given: Prompts) -> list[TextPrompt]:
    """Texts or token ids, one or several, as token ids.

    Raises:
        RequestError: a text that is not valid Unicode.
    """
    if isinstance(given, str):
        return [_from_text(context, given)]
    if isinstance(given[0], int):
        return [_from_ids(context, cast(list[int], given))]
    return [
        _from_text(context, item) if isinstance(item, str) else _from_ids(context, item)
        for item in cast(list[Any], given)
    ]


def _from_text(context: ServiceContext, text: str) -> TextPrompt:
    ids = context.model.prompts.encode_text(text)
    plain = context.model.tokenizer.encode(text, add_special_tokens=False)
    return TextPrompt(ids, text, len(ids) - len(plain))


def _from_ids(context: ServiceContext, ids: list[int]) -> TextPrompt:
    return TextPrompt(ids, context.model.tokenizer.decode(ids, skip_special_tokens=False))


class _Choice:
    """One reply while it grows: makes news into pieces of a completion's choice."""

    def __init__(
        self, context: ServiceContext, request: CompletionRequest, prompt: TextPrompt, index: int
    ) -> None:
        self.index = index
        self._request, self._prompt = request, prompt
        self._writer: LogprobWriter | None = None
        if request.logprobs is not None:
            self._writer = LogprobWriter(
                context.model.tokenizer, context.token_bytes, request.logprobs > 0
            )
        self._begun = False

    def begin(self, prompt_logprobs: Sequence[Any]) -> CompletionChoice | None:
        """The echoed prompt, if it was asked for."""
        if self._begun or not self._request.echo:
            return None
        self._begun = True
        entries = None
        if self._writer is not None:
            entries = self._writer.prompt(self._prompt.ids, prompt_logprobs, self._prompt.hidden)
        return CompletionChoice(index=self.index, text=self._prompt.text, logprobs=entries)

    def go_on(self, news: ChoiceNews) -> CompletionChoice | None:
        """What is new, or None if nothing to show is."""
        finish = "length" if news.finish_reason == "length" else news.finish_reason and "stop"
        if self._request.max_tokens == 0:  # one token was computed, for there is no less
            return _piece(self.index, "", "length", None, None) if finish else None
        entries = None
        if self._writer is not None and news.tokens:
            tokens = [token.sampled for token in news.tokens]
            if news.finish_reason == "stop" and isinstance(news.stopped_by, int):
                tokens.pop()  # the end itself is no text
            entries = self._writer.reply(tokens)
        if not (news.text or entries or finish):
            return None
        return _piece(self.index, news.text, finish, entries, reported_stop(news, self._request))


def _piece(
    index: int,
    text: str,
    finish: Any,
    logprobs: CompletionLogprobs | None,
    stop_reason: int | str | None,
) -> CompletionChoice:
    return CompletionChoice(
        index=index, text=text, finish_reason=finish, logprobs=logprobs, stop_reason=stop_reason
    )


def reported_stop(news: ChoiceNews, request: Any) -> int | str | None:
    """What of the client's own `stop` or `stop_token_ids` has ended a reply."""
    stopped = news.stopped_by
    own = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if stopped in own or stopped in (request.stop_token_ids or ()):
        return stopped
    return None


class CompletionRun:
    """One request to /v1/completions, in the engine."""

    def __init__(
        self, context: ServiceContext, request: CompletionRequest, prompts: list[TextPrompt]
    ) -> None:
        """
        Raises:
            RelaxLMError: as the engine's `submit`.
        """
        self._context, self._request = context, request
        self._id, self._created = new_id("cmpl-"), now()
        n = request.n or 1
        self._choices = [
            [_Choice(context, request, prompt, slot * n + i) for i in range(n)]
            for slot, prompt in enumerate(prompts)
        ]
        self._count = UsageCount(sum(len(prompt.ids) for prompt in prompts), n)
        self._submission = Submission(
            context.engine,
            [engine_request(context, request, prompt) for prompt in prompts],
            bool(request.stream),
            context.on_update,
        )

    def cancel(self) -> None:
        self._submission.cancel()

    async def pieces(self) -> AsyncGenerator[CompletionChoice, None]:
        try:
            while found := await self._submission.news():
                for news in found:
                    self._count.add(news)
                    choices = self._choices[news.slot]
                    if news.prompt is not None:
                        for choice in choices:
                            if piece := choice.begin(news.prompt.logprobs):
                                yield piece
                    for index in sorted(news.choices):
                        if piece := choices[index].go_on(news.choices[index]):
                            yield piece
        finally:
            self._submission.cancel()

    async def whole(self) -> Completion:
        parts: dict[int, list[CompletionChoice]] = {}
        async for piece in self.pieces():
            parts.setdefault(piece.index, []).append(piece)
        choices = [
            CompletionChoice(
                index=index,
                text="".join(piece.text for piece in pieces),
                finish_reason=pieces[-1].finish_reason,
                logprobs=join_logprobs([p.logprobs for p in pieces if p.logprobs is not None]),
                stop_reason=pieces[-1].stop_reason,
            )
            for index, pieces in sorted(parts.items())
        ]
        return self._completion(choices, usage=True)

    async def chunks(self) -> AsyncGenerator[Completion, None]:
        pieces = self.pieces()
        try:
            async for piece in pieces:
                yield self._completion([piece])
        finally:
            await pieces.aclose()
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield self._completion([], usage=True)

    def _completion(self, choices: list[CompletionChoice], usage: bool = False) -> Completion:
        if usage and self._request.max_tokens == 0:
            self._count.generated_tokens = 0
        return Completion(
            id=self._id,
            created=self._created,
            model=self._context.name,
            choices=choices,
            usage=self._count.usage() if usage else None,
            system_fingerprint=self._context.fingerprint,
        )


def engine_request(
    context: ServiceContext, request: CompletionRequest, prompt: TextPrompt
) -> GenerationRequest:
    """What the engine is asked for one prompt.

    Raises:
        RequestError: a sampling field outside its range.
    """
    limit = DEFAULT_MAX_TOKENS if request.max_tokens is None else max(request.max_tokens, 1)
    config = request.sampling(
        max_tokens=limit,
        logprobs=request.logprobs is not None or None,
        top_logprobs=request.logprobs or None,
    )
    model = context.model
    return GenerationRequest(
        prompt.ids,
        model.settings(config),
        model.prompts.stop_token_ids,
        model.prompts.stop_strings,
        prompt_logprobs=bool(request.echo and request.logprobs is not None),
        continuing=True,
    )


async def complete(
    context: ServiceContext, request: CompletionRequest
) -> Completion | ReplyStream[Completion]:
    """
    Raises:
        RelaxLMError: whatever is wrong with the request.
    """
    context.check_model(request.model)
    context.check_writes()
    prompts = await context.in_thread(read_prompts, context, request.prompt)
    run = CompletionRun(context, request, prompts)
    if request.stream:
        return ReplyStream(run.chunks(), run.cancel)
    return await run.whole()
