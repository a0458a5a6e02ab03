"""Chat completions that fail, are cancelled or end early."""

import asyncio

import pytest

from relaxlm.engine.types import GenerationRequest
from relaxlm.errors import BusyError, LibraryError, RequestError
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.service import ApiService
from tests.openai_api.asking import answer, ask, chunks, serve, stream
from tests.openai_api.scripted_engine import Player, ScriptedEngine, say


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("the grammar hit a limit"), 400, None),
        (LibraryError("NaN"), 500, "engine_error"),
        (BusyError("closing", closing=True), 503, "shutting_down"),
    ],
    ids=["request", "library", "closing"],
)
def test_an_error_of_the_engine_has_its_status(
    error: Exception, status: int, code: str | None
) -> None:
    def script(request: GenerationRequest, player: Player) -> None:
        player.send("a", prompt=player.report())
        player.fail(error)  # type: ignore[arg-type]

    with pytest.raises(ApiError) as info:
        ask(script=script)
    assert (info.value.status, info.value.code) == (status, code)
    with pytest.raises(ApiError, match=str(error)):
        chunks(script)


def test_a_full_queue_is_told_before_the_stream_begins() -> None:
    async def ask_full(service: ApiService, engine: ScriptedEngine) -> None:
        engine.refuse_after = (0, BusyError("256 wait", retry_after=7.0))
        with pytest.raises(ApiError) as info:
            await stream(service)
        assert (info.value.status, info.value.retry_after) == (429, 7.0)

    serve(say("a"), ask_full)


def test_an_engine_that_ends_early_is_an_error_and_no_short_reply() -> None:
    def script(request: GenerationRequest, player: Player) -> None:
        player.send("a", prompt=player.report())
        player.send(finish="cancelled", finished=True)

    with pytest.raises(ApiError) as info:
        ask(script=script)
    assert info.value.status == 503


def endless(request: GenerationRequest, player: Player) -> None:
    player.send("a", prompt=player.report())


def test_a_closed_stream_cancels_its_request() -> None:
    async def leave(service: ApiService, engine: ScriptedEngine) -> None:
        reading = await stream(service)
        await anext(reading)
        await reading.aclose()
        assert engine.cancelled == [1]
        unread = await stream(service)
        await unread.aclose()
        assert engine.cancelled == [1, 2]
        forgotten = await stream(service)
        del forgotten
        assert engine.cancelled == [1, 2, 3]

    serve(endless, leave)


def test_a_cancelled_task_cancels_its_request() -> None:
    async def leave(service: ApiService, engine: ScriptedEngine) -> None:
        task = asyncio.create_task(answer(service))
        while not engine.submitted:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.cancelled == [1]

    serve(endless, leave)


def test_a_finished_request_is_not_cancelled() -> None:
    async def finish(service: ApiService, engine: ScriptedEngine) -> list[int]:
        await answer(service)
        reading = await stream(service)
        async for _ in reading:
            pass
        await reading.aclose()
        return engine.cancelled

    assert serve(say("a"), finish) == []
