"""/v1/responses: the same chat, told in items and events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

from relaxlm.engine.replies import Delta, ToolCallDelta
from relaxlm.openai_api.chat_prompt import plan_chat
from relaxlm.openai_api.chat_run import ChatPiece, ChatRun
from relaxlm.openai_api.context import ServiceContext, new_id, now
from relaxlm.openai_api.replies import TokenLogprob
from relaxlm.openai_api.response_chat import as_chat
from relaxlm.openai_api.response_replies import (
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    ReasoningText,
    Response,
    ResponseEvent,
    ResponseUsage,
    Status,
)
from relaxlm.openai_api.response_request import ResponseRequest
from relaxlm.openai_api.stream import ReplyStream


async def respond(
    context: ServiceContext, request: ResponseRequest
) -> Response | ReplyStream[ResponseEvent]:
    """
    Raises:
        RelaxLMError: whatever is wrong with the request.
    """
    context.check_model(request.model)
    context.check_writes()
    plan = await context.in_thread(plan_chat, context, as_chat(request))
    reply = _Reply(ChatRun(context, plan), request)
    if request.stream:
        return ReplyStream(reply.events(), reply.run.cancel, named_events=True)
    return await reply.whole()


class _Reply:
    """Writes one response, whole or in events."""

    def __init__(self, run: ChatRun, request: ResponseRequest) -> None:
        self.run, self._request = run, request
        self._id, self._created = new_id("resp_"), now()
        self._items: list[OutputItem] = []
        self._sequence = 0
        self._cut = False

    async def whole(self) -> Response:
        async for event in self.events():
            last = event
        assert last.response is not None
        return last.response

    async def events(self) -> AsyncGenerator[ResponseEvent, None]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        pieces = self.run.pieces()
        try:
            async for piece in pieces:
                for event in self._piece(piece):
                    yield event
        finally:
            await pieces.aclose()
        status: Status = "incomplete" if self._cut else "completed"
        yield self._event(f"response.{status}", response=self._response(status))

    def _piece(self, piece: ChatPiece) -> Iterator[ResponseEvent]:
        logprobs = piece.logprobs
        for delta in piece.deltas:
            if delta.tool_call is not None:
                yield from self._call(delta.tool_call)
            elif delta.reasoning_content:
                yield from self._reasoning(delta.reasoning_content)
            else:
                yield from self._text(delta, logprobs)
                logprobs = []
        if logprobs and self._items and isinstance(self._items[-1], OutputMessage):
            yield from self._text(Delta(), logprobs)
        if piece.finish_reason is not None:
            self._cut = piece.finish_reason == "length"
            if not self._items:
                yield from self._open(_message())
            yield from self._close("incomplete" if self._cut else "completed")

    def _text(self, delta: Delta, logprobs: list[TokenLogprob]) -> Iterator[ResponseEvent]:
        yield from self._open(_message())
        item = self._items[-1]
        assert isinstance(item, OutputMessage)
        part = item.content[0]
        part.text += delta.content
        part.logprobs += logprobs
        yield self._event(
            "response.output_text.delta",
            item_id=item.id,
            content_index=0,
            delta=delta.content,
            logprobs=logprobs,
        )

    def _reasoning(self, text: str) -> Iterator[ResponseEvent]:
        content = [ReasoningText(text="")]
        yield from self._open(
            OutputReasoning(id=new_id("rs_"), status="in_progress", content=content)
        )
        item = self._items[-1]
        assert isinstance(item, OutputReasoning)
        item.content[0].text += text
        yield self._event(
            "response.reasoning_text.delta", item_id=item.id, content_index=0, delta=text
        )

    def _call(self, call: ToolCallDelta) -> Iterator[ResponseEvent]:
        if call.id is not None:
            item = OutputCall(
                id=new_id("fc_"),
                status="in_progress",
                call_id=call.id,
                name=call.name or "",
                arguments="",
            )
            yield from self._open(item, always=True)
        last = self._items[-1]
        assert isinstance(last, OutputCall)
        if call.arguments:
            last.arguments += call.arguments
            yield self._event(
                "response.function_call_arguments.delta", item_id=last.id, delta=call.arguments
            )

    def _open(self, item: OutputItem, always: bool = False) -> Iterator[ResponseEvent]:
        """Begin an item, if the last one is not of its kind."""
        if self._items and type(self._items[-1]) is type(item) and not always:
            return
        if self._items:
            yield from self._close("completed")
        self._items.append(item)
        # As it is at the start: it will grow.
        yield self._event("response.output_item.added", item=_empty(item))
        if not isinstance(item, OutputCall):
            yield self._event(
                "response.content_part.added",
                item_id=item.id,
                content_index=0,
                part=item.content[0].model_copy(deep=True),
            )

    def _close(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        item = self._items[-1]
        item.status = status
        if isinstance(item, OutputCall):
            yield self._event(
                "response.function_call_arguments.done",
                item_id=item.id,
                name=item.name,
                arguments=item.arguments,
            )
        else:
            part = item.content[0]
            fields: dict[str, Any] = {"item_id": item.id, "content_index": 0, "text": part.text}
            if isinstance(part, OutputText):
                yield self._event("response.output_text.done", logprobs=part.logprobs, **fields)
            else:
                yield self._event("response.reasoning_text.done", **fields)
            yield self._event(
                "response.content_part.done", item_id=item.id, content_index=0, part=part
            )
        yield self._event("response.output_item.done", item=item.model_copy(deep=True))

    def _event(self, type: str, **fields: Any) -> ResponseEvent:
        if "response" not in fields:
            fields["output_index"] = len(self._items) - 1
        event = ResponseEvent(type=type, sequence_number=self._sequence, **fields)
        self._sequence += 1
        return event

    def _response(self, status: Status) -> Response:
        request, config = self._request, self.run.plan.request.config
        ended = status != "in_progress"
        return Response(
            id=self._id,
            created_at=self._created,
            completed_at=now() if status == "completed" else None,
            status=status,
            incomplete_details=IncompleteDetails(reason="max_output_tokens")
            if status == "incomplete"
            else None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=self.run.context.name,
            output=list(self._items) if ended else [],
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning={
                "effort": request.reasoning and request.reasoning.effort,
                "summary": None,
            },
            temperature=config.temperature,
            text=_dumped(request.text) or {"format": {"type": "text"}},
            tool_choice=_dumped(request.tool_choice) or "auto",
            tools=[_dumped(tool) for tool in request.tools or ()],
            top_logprobs=request.top_logprobs or 0,
            top_p=config.top_p,
            usage=self._usage() if ended else None,
            user=request.user,
            safety_identifier=request.safety_identifier,
            prompt_cache_key=request.prompt_cache_key,
        )

    def _usage(self) -> ResponseUsage:
        usage = self.run.count.usage()
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=usage.prompt_tokens_details.cached_tokens
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(
                reasoning_tokens=usage.completion_tokens_details.reasoning_tokens
            ),
            total_tokens=usage.total_tokens,
            extra=usage.extra,
        )


def _message() -> OutputMessage:
    return OutputMessage(id=new_id("msg_"), status="in_progress", content=[OutputText(text="")])


def _empty(item: OutputItem) -> OutputItem:
    copy = item.model_copy(deep=True)
    if not isinstance(copy, OutputCall):
        copy.content = []  # parts are added by events of their own
    return copy


def _dumped(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    return value.model_dump(mode="json", by_alias=True, exclude_none=True)
