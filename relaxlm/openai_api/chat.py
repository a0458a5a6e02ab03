"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal

from relaxlm.engine.replies import Delta
from relaxlm.openai_api.chat_prompt import plan_chat
from relaxlm.openai_api.chat_request import ChatCompletionRequest
from relaxlm.openai_api.chat_run import ChatPiece, ChatRun
from relaxlm.openai_api.context import ServiceContext, new_id, now
from relaxlm.openai_api.replies import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
    ChoiceLogprobs,
    FunctionCall,
    FunctionCallDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from relaxlm.openai_api.stream import ReplyStream


async def chat(
    context: ServiceContext, request: ChatCompletionRequest
) -> ChatCompletion | ReplyStream[ChatCompletionChunk]:
    """
    Raises:
        RelaxLMError: whatever is wrong with the request.
    """
    context.check_model(request.model)
    context.check_writes()
    plan = await context.in_thread(plan_chat, context, request)
    reply = _Reply(ChatRun(context, plan), request)
    if request.stream:
        return ReplyStream(reply.chunks(), reply.run.cancel)
    return await reply.whole()


class _Reply:
    """Writes one chat completion, whole or in chunks."""

    def __init__(self, run: ChatRun, request: ChatCompletionRequest) -> None:
        self.run, self._request = run, request
        self._id, self._created = new_id("chatcmpl-"), now()
        # As OpenAI has it: told only to those who asked for one.
        self._tier: Literal["default"] | None = None if request.service_tier is None else "default"

    async def whole(self) -> ChatCompletion:
        last: dict[int, ChatPiece] = {}
        logprobs: dict[int, list[TokenLogprob]] = {}
        async for piece in self.run.pieces():
            last[piece.index] = piece
            logprobs.setdefault(piece.index, []).extend(piece.logprobs)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self.run.context.name,
            choices=[self._choice(last[index], logprobs[index]) for index in sorted(last)],
            usage=self.run.count.usage(),
            system_fingerprint=self.run.context.fingerprint,
            service_tier=self._tier,
        )

    def _choice(self, last: ChatPiece, logprobs: list[TokenLogprob]) -> ChatChoice:
        assert last.finish_reason is not None
        message = self.run.message(last.index)
        calls = [
            ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in message.tool_calls
        ]
        return ChatChoice(
            index=last.index,
            message=ChatMessage(
                content=message.content,
                tool_calls=calls or None,
                reasoning_content=message.reasoning_content,
            ),
            finish_reason=last.finish_reason,
            logprobs=self._logprobs(logprobs),
            stop_reason=last.stop_reason,
        )

    async def chunks(self) -> AsyncGenerator[ChatCompletionChunk, None]:
        options = self._request.stream_options
        begun: set[int] = set()
        pieces = self.run.pieces()
        try:
            async for piece in pieces:
                if piece.index not in begun:
                    begun.add(piece.index)
                    yield self._chunk(piece.index, ChatDelta(role="assistant", content=""))
                for choice in self._parts(piece):
                    yield self._completion([choice])
        finally:
            await pieces.aclose()
        if options is not None and options.include_usage:
            yield self._completion([], self.run.count.usage())

    def _parts(self, piece: ChatPiece) -> list[ChatChunkChoice]:
        """One for each delta, and one for the end; the first has the tokens' probabilities."""
        parts = [ChatChunkChoice(index=piece.index, delta=_delta(delta)) for delta in piece.deltas]
        if piece.logprobs:
            if not parts:
                parts.append(ChatChunkChoice(index=piece.index, delta=ChatDelta(content="")))
            parts[0].logprobs = self._logprobs(piece.logprobs)
        if piece.finish_reason is not None:
            parts.append(
                ChatChunkChoice(
                    index=piece.index,
                    delta=ChatDelta(),
                    finish_reason=piece.finish_reason,
                    stop_reason=piece.stop_reason,
                )
            )
        return parts

    def _chunk(self, index: int, delta: ChatDelta) -> ChatCompletionChunk:
        return self._completion([ChatChunkChoice(index=index, delta=delta)])

    def _completion(
        self, choices: list[ChatChunkChoice], usage: Usage | None = None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id,
            created=self._created,
            model=self.run.context.name,
            choices=choices,
            usage=usage,
            system_fingerprint=self.run.context.fingerprint,
            service_tier=self._tier,
        )

    def _logprobs(self, tokens: list[TokenLogprob]) -> ChoiceLogprobs | None:
        return ChoiceLogprobs(content=tokens) if self._request.logprobs else None


def _delta(delta: Delta) -> ChatDelta:
    call = delta.tool_call
    if call is None:
        return ChatDelta(
            content=delta.content or None, reasoning_content=delta.reasoning_content or None
        )
    return ChatDelta(
        tool_calls=[
            ToolCallDelta(
                index=call.index,
                id=call.id,
                type=None if call.id is None else "function",
                function=FunctionCallDelta(name=call.name, arguments=call.arguments),
            )
        ]
    )
