"""A chat request in the engine, and what its replies gain."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from relaxlm.engine.replies import Delta, ReplyMessage, ReplyParser
from relaxlm.openai_api.chat_prompt import ChatPlan
from relaxlm.openai_api.completions import reported_stop
from relaxlm.openai_api.context import ServiceContext
from relaxlm.openai_api.replies import FinishReason, TokenLogprob
from relaxlm.openai_api.submission import ChoiceNews, Submission
from relaxlm.openai_api.token_logprobs import chat_logprobs
from relaxlm.openai_api.usage import UsageCount


@dataclass(frozen=True)
class ChatPiece:
    """What reply number `index` has gained.

    Attributes:
        logprobs: of its new tokens, if they were asked for.
        finish_reason: set with the last piece.
        stop_reason: the client's own stop string or token that ended it.
    """

    index: int
    deltas: list[Delta]
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class _Choice:
    """One reply while it grows."""

    def __init__(self, context: ServiceContext, plan: ChatPlan, index: int) -> None:
        self.index = index
        self.parser: ReplyParser = plan.new_parser()
        self._context, self._plan = context, plan
        self._answering = False  # whether anything but reasoning has come
        self.reasoning_tokens = 0

    def go_on(self, news: ChoiceNews) -> ChatPiece | None:
        """What is new, or None if nothing to show is."""
        deltas: list[Delta] = []
        # Token by token, so that those of the reasoning can be counted.
        for token in news.tokens:
            deltas += self.parser.push(token.text)
            self._answering |= any(not delta.reasoning_content for delta in deltas)
            self.reasoning_tokens += not self._answering
        finish: FinishReason | None = None
        if news.finish_reason is not None:
            deltas += self.parser.finish()
            message = self.parser.message()
            if message.reasoning_content is None:
                self.reasoning_tokens = 0
            finish = "length" if news.finish_reason == "length" else "stop"
            if message.tool_calls and finish == "stop":
                finish = "tool_calls"
        logprobs = self._logprobs(news)
        if not (deltas or logprobs or finish):
            return None
        stop_reason = reported_stop(news, self._plan.asked)
        return ChatPiece(self.index, merged(deltas), logprobs, finish, stop_reason)

    def _logprobs(self, news: ChoiceNews) -> list[TokenLogprob]:
        if not self._plan.asked.logprobs:
            return []
        tokens = [token.sampled for token in news.tokens]
        if news.finish_reason == "stop" and isinstance(news.stopped_by, int):
            tokens.pop()  # the end itself is no text
        return chat_logprobs(self._context.token_bytes, tokens)


class ChatRun:
    """One chat request, submitted when it is made."""

    def __init__(self, context: ServiceContext, plan: ChatPlan) -> None:
        """
        Raises:
            RelaxLMError: as the engine's `submit`.
        """
        self.context, self.plan = context, plan
        replies = plan.request.config.n
        self._choices = [_Choice(context, plan, index) for index in range(replies)]
        self.count = UsageCount(len(plan.request.prompt), replies)
        self._submission = Submission(
            context.engine, [plan.request], bool(plan.asked.stream), context.on_update
        )

    def cancel(self) -> None:
        self._submission.cancel()

    def message(self, index: int) -> ReplyMessage:
        """The whole of a reply that has ended."""
        return self._choices[index].parser.message()

    async def pieces(self) -> AsyncGenerator[ChatPiece, None]:
        """What the replies gain, to the end. Cancels the request if it is not read to the end.

        Raises:
            RelaxLMError: the request failed.
        """
        try:
            while found := await self._submission.news():
                for news in found:
                    self.count.add(news)
                    for index in sorted(news.choices):
                        piece = self._choices[index].go_on(news.choices[index])
                        self.count.reasoning_tokens = sum(
                            choice.reasoning_tokens for choice in self._choices
                        )
                        if piece is not None:
                            yield piece
        finally:
            self._submission.cancel()


def merged(deltas: list[Delta]) -> list[Delta]:
    """The same, with neighbours of a kind in one."""
    found: list[Delta] = []
    for delta in deltas:
        last = found[-1] if found else None
        if last is not None and last.content and delta.content:
            found[-1] = Delta(content=last.content + delta.content)
        elif last is not None and last.reasoning_content and delta.reasoning_content:
            found[-1] = Delta(reasoning_content=last.reasoning_content + delta.reasoning_content)
        else:
            found.append(delta)
    return found
