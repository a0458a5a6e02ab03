"""Thousands of requests of every kind leave nothing behind: no memory, no pages, no connections.

The suite runs a short version. RELAXLM_SOAK=5000 runs so many requests and prints what it found:

    RELAXLM_SOAK=5000 python -m pytest -s tests/server/test_soak.py
"""

import asyncio
import gc
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from relaxlm.engine.config import EngineConfig
from relaxlm.engine.loop import EngineLoop
from relaxlm.profiling.serving_client import Server, ServerError
from relaxlm.server.app import ApiServer
from relaxlm.server.settings import ServerSettings
from tests.server.serving import Running, running, wait_until
from tests.tiny_model import CONTEXT, TinyModel

REQUESTS = int(os.environ.get("RELAXLM_SOAK", "300"))
CLIENTS = 12
# Of all requests, after which memory is compared: all caches are full by then.
WARM = 0.4
# Bytes of memory that may be lost to fragments that allocators leave. They are lost at once, now
# and then; what grows with the number of requests is lost in both halves of those that follow.
LOST = 6e6
# Objects that Python may have more: caches of a few kinds of values, such as urlsplit's.
MORE_OBJECTS = 500
PAGES = Path("/proc/self/statm")
WORDS = (
    "the cat sat on the mat and the dog ran to the house hello world naïve größer 日本語 🙂".split()
)

Ask = Callable[[Server, random.Random], Awaitable[None]]


@pytest.fixture(scope="module")
def server(tiny: TinyModel) -> Iterator[Running]:
    """With few pages: replies are put back and computed again, and cached pages are evicted.

    Fewer requests may wait than there are clients.
    """
    config = EngineConfig(
        mode="server", max_batch_size=6, max_waiting=CLIENTS - 8, kv_cache_tokens=CONTEXT
    )
    with EngineLoop.load(tiny.folder, tiny.library, config=config, threads=1) as engine:
        with running(ApiServer(engine, ServerSettings())) as started:
            started.engine = engine  # type: ignore[attr-defined]
            yield started


def text(rng: random.Random, most: int = 25) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def chat(rng: random.Random, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text(rng)}]
    return {"model": "m", "messages": messages, "max_tokens": rng.randint(1, 80), **fields}


async def whole_chat(server: Server, rng: random.Random) -> None:
    fields = rng.choice(
        [
            {"temperature": 0},
            {"n": 2, "seed": 3, "temperature": 1.0},
            {"stop": ["a", "the"], "top_p": 0.9},
            {"logprobs": True, "top_logprobs": 3},
            {"frequency_penalty": 0.5, "logit_bias": {"5": 4}},
        ]
    )
    answer = await server.call("POST", "/v1/chat/completions", chat(rng, **fields))
    assert len(answer["choices"]) == fields.get("n", 1)


async def stream(server: Server, rng: random.Random) -> None:
    body = chat(rng, stream=True, stream_options={"include_usage": True}, ignore_eos=True)
    events = [data async for data in server.events("/v1/chat/completions", body)]
    assert events[-1] == "[DONE]" and '"usage":{' in events[-2]


async def leave(server: Server, rng: random.Random) -> None:
    """Go away before the reply is complete."""
    body = chat(rng, stream=True, n=rng.randint(1, 2)) | {"max_tokens": 100, "ignore_eos": True}
    async with aclosing(server.events("/v1/chat/completions", body)) as events:
        for _ in range(rng.randint(0, 10)):
            await anext(events, "")


async def leave_without_a_stream(server: Server, rng: random.Random) -> None:
    body = chat(rng) | {"max_tokens": 100, "ignore_eos": True}
    call = server.call("POST", "/v1/chat/completions", body)
    try:
        await asyncio.wait_for(call, rng.random() / 50)
    except asyncio.TimeoutError:  # not TimeoutError in Python 3.10
        pass


async def complete(server: Server, rng: random.Random) -> None:
    body = {"prompt": text(rng), "max_tokens": rng.randint(1, 30), "echo": True, "logprobs": 2}
    answer = await server.call("POST", "/v1/completions", body)
    assert answer["choices"][0]["text"].startswith(body["prompt"][:3])


async def structured(server: Server, rng: random.Random) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y", 1, 2, 3]}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    given = {"name": "s", "schema": schema, "strict": True}
    body = chat(rng, response_format={"type": "json_schema", "json_schema": given})
    answer = await server.call("POST", "/v1/chat/completions", body | {"max_tokens": 60})
    assert answer["choices"][0]["message"]["content"].startswith("{")


async def embed(server: Server, rng: random.Random) -> None:
    answer = await server.call("POST", "/v1/embeddings", {"input": [text(rng), text(rng)]})
    assert len(answer["data"]) == 2


async def refused(server: Server, rng: random.Random) -> None:
    """Requests that are wrong in ways of their own."""
    path, body = rng.choice(
        [
            ("/v1/chat/completions", chat(rng, temperature=-1)),
            ("/v1/chat/completions", chat(rng, no_such_field=text(rng))),
            ("/v1/chat/completions", chat(rng) | {"messages": []}),
            ("/v1/chat/completions", chat(rng, response_format={"type": "regex"})),
            ("/v1/completions", {"prompt": "the cat " * 400}),
            ("/v1/completions", {"prompt": [100000]}),
            ("/v1/embeddings", {"input": []}),
            (f"/v1/{rng.random()}", {}),
        ]
    )
    with pytest.raises(ServerError) as refusal:
        await server.call("POST", path, body)
    assert refusal.value.status in (400, 404), refusal.value


KINDS: dict[Ask, int] = {
    stream: 6,
    whole_chat: 6,
    leave: 4,
    leave_without_a_stream: 2,
    complete: 3,
    structured: 1,
    embed: 1,
    refused: 4,
}


def test_nothing_is_left_behind(server: Running) -> None:
    engine: EngineLoop = server.engine  # type: ignore[attr-defined]
    at = Server.parse(server.url)
    fixed = {"prompt": "the cat sat", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    done, busy = Counter[str](), 0

    async def run(count: int, seed: int) -> str:
        """So many requests; returns the text of one that is always the same."""
        nonlocal busy
        left = iter(range(count))

        async def client(rng: random.Random) -> None:
            nonlocal busy
            for _ in left:
                [kind] = rng.choices(list(KINDS), list(KINDS.values()))
                while True:
                    try:
                        await kind(at, rng)
                        break
                    except ServerError as error:
                        assert error.status == 429, error
                        busy += 1
                    await asyncio.sleep(0.02)
                done[kind.__name__] += 1

        clients = [client(random.Random(f"{seed} {i}")) for i in range(CLIENTS)]
        await asyncio.gather(*clients)
        return (await at.call("POST", "/v1/completions", fixed))["choices"][0]["text"]

    warm = int(REQUESTS * WARM)
    first = asyncio.run(run(warm, 0))
    quiet(server, engine)
    objects, memory = len(gc.get_objects()), [resident()]
    for half in (1, 2):
        assert asyncio.run(run((REQUESTS - warm) // 2, half)) == first
        quiet(server, engine)
        memory.append(resident())
    more = len(gc.get_objects()) - objects
    lost = min(after - before for before, after in pairwise(memory))
    stats = engine.stats()
    if "RELAXLM_SOAK" in os.environ:
        print(f"\n{dict(done)}, {busy} times busy\n{stats}")
        sizes = ", ".join(f"{size / 1e6:.1f}" for size in memory)
        print(f"{sizes} MB after {warm} and after each half of the rest, {more:+d} objects")
    assert min(stats.preemptions, stats.cancelled, stats.prefix_hits) > 0
    assert set(done) == {kind.__name__ for kind in KINDS} and busy > 0
    assert stats.failed == 0
    assert more < MORE_OBJECTS
    assert lost < LOST


def quiet(server: Running, engine: EngineLoop) -> None:
    """Wait until all is over; pages are free then, or in the prefix cache alone."""

    def over() -> bool:
        stats = engine.stats()
        return (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)

    wait_until(over)
    wait_until(lambda: not server.server.server_state.connections)
    assert engine.stats().pages_cached <= engine.stats().pages_total
    gc.collect()


def resident() -> float:
    """Bytes of memory that this process has; 0 where the system doesn't tell."""
    if not PAGES.exists():
        return 0.0
    return int(PAGES.read_text().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))
