import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from relaxlm.engine.types import GenerationRequest
from relaxlm.errors import LibraryError
from relaxlm.openai_api.submission import Submission
from relaxlm.runtime.generation import GenerationConfig
from tests.openai_api.scripted_engine import Player, ScriptedEngine, say

REQUEST = GenerationRequest([1], GenerationConfig())


def run(
    script: Callable[[GenerationRequest, Player], None],
    test: Callable[[Submission, ScriptedEngine], Coroutine[Any, Any, None]],
) -> None:
    async def main() -> None:
        engine = ScriptedEngine(script)
        await asyncio.wait_for(test(Submission(engine, [REQUEST], True), engine), 10)  # type: ignore[arg-type]

    asyncio.run(main())


def test_a_slow_reader_gets_everything_at_once() -> None:
    async def read_late(submission: Submission, engine: ScriptedEngine) -> None:
        await asyncio.sleep(0.05)
        (news,) = await submission.news()
        assert news.choices[0].text == "abc" * 100
        assert len(news.choices[0].tokens) == 301
        assert news.choices[0].finish_reason == "stop"
        assert news.choices[0].stopped_by == 2
        assert news.prompt is not None
        assert news.timings is not None
        assert news.finished
        assert await submission.news() == []

    run(say(*("abc" * 100)), read_late)


def test_news_arrive_one_by_one_if_they_are_awaited() -> None:
    gate = asyncio.Event()

    def script(request: GenerationRequest, player: Player) -> None:
        player.send("a", prompt=player.report())
        asyncio.run_coroutine_threadsafe(gate.wait(), loops[0]).result()
        player.send("b", finish="length", finished=True)

    loops: list[asyncio.AbstractEventLoop] = []

    async def read(submission: Submission, engine: ScriptedEngine) -> None:
        assert (await submission.news())[0].choices[0].text == "a"
        gate.set()
        assert (await submission.news())[0].choices[0].text == "b"
        assert await submission.news() == []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        engine = ScriptedEngine(script)
        await asyncio.wait_for(read(Submission(engine, [REQUEST], True), engine), 10)  # type: ignore[arg-type]

    asyncio.run(main())


def test_a_reader_in_no_hurry_is_told_of_the_end_alone() -> None:
    async def main() -> None:
        engine = ScriptedEngine(say(*"abc"))
        submission = Submission(engine, [REQUEST], False)  # type: ignore[arg-type]
        (news,) = await asyncio.wait_for(submission.news(), 10)
        assert news.finished
        assert news.choices[0].text == "abc"

    asyncio.run(main())


def test_a_reader_that_waits_learns_of_a_cancellation() -> None:
    def script(request: GenerationRequest, player: Player) -> None:
        while not player.engine.cancelled:
            pass
        player.send(finish="cancelled", finished=True)

    async def cancel(submission: Submission, engine: ScriptedEngine) -> None:
        waiting = asyncio.create_task(submission.news())
        await asyncio.sleep(0)
        submission.cancel()
        submission.cancel()
        assert await waiting == []
        assert engine.cancelled == [1]

    run(script, cancel)


def test_a_failure_is_raised_after_which_nothing_runs() -> None:
    async def read(submission: Submission, engine: ScriptedEngine) -> None:
        with pytest.raises(LibraryError):
            await submission.news()
        assert await submission.news() == []

    run(lambda request, player: player.fail(LibraryError("NaN")), read)


def test_a_request_whose_event_loop_is_gone_is_cancelled() -> None:
    players: list[Player] = []

    async def submit() -> ScriptedEngine:
        engine = ScriptedEngine(lambda request, player: players.append(player))
        Submission(engine, [REQUEST], True)  # type: ignore[arg-type]
        while not players:
            await asyncio.sleep(0.001)
        return engine

    engine = asyncio.run(submit())
    players[0].send("a")
    assert engine.cancelled == [1]
