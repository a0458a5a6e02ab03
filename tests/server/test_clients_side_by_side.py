"""Clients in processes of their own are served together, not one after the other."""

import json
import multiprocessing
import time
import urllib.request
from typing import Any

from relaxlm.engine.loop import EngineLoop
from tests.server.serving import Running, wait_until

PROCESSES, REQUESTS, TOKENS = 3, 5, 200
BODY = {
    "model": "any",
    "messages": [{"role": "user", "content": "hello world"}],
    "temperature": 0,
    "max_tokens": TOKENS,
    "stop": "never in a reply of this model",
}

_start: Any = None  # a barrier, in the processes


def get_ready(barrier: Any) -> None:
    global _start
    _start = barrier


def ask(url: str) -> list[tuple[float, str]]:
    """What one client does: REQUESTS times the same prompt; seconds and text of each reply."""
    replies = []
    _start.wait(30)
    for _ in range(REQUESTS):
        started = time.perf_counter()
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(BODY).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            reply = json.load(response)
        text = reply["choices"][0]["message"]["content"]
        replies.append((time.perf_counter() - started, text))
    return replies


def test_three_processes_with_five_requests_each_share_steps(
    engine: EngineLoop, tiny_server: Running
) -> None:
    before = engine.stats().batch_sizes
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    ready = (context.Barrier(PROCESSES),)
    with context.Pool(PROCESSES, get_ready, ready) as pool:
        replies = pool.map(ask, [tiny_server.url] * PROCESSES, chunksize=1)
    wall = time.perf_counter() - started
    for number, mine in enumerate(replies):
        print(f"process {number}:", " ".join(f"{1000 * seconds:.0f}" for seconds, _ in mine), "ms")
    print(f"wall {wall:.2f} s, start of the processes included")
    assert len({text for mine in replies for _, text in mine}) == 1
    wait_until(lambda: engine.stats().running == 0)
    after = engine.stats().batch_sizes
    steps = {size: after[size] - before.get(size, 0) for size in after}
    print("steps by batch size:", steps)
    shared = sum(size * count for size, count in steps.items() if size > 1)
    assert max(size for size, count in steps.items() if count) == PROCESSES
    # Processes do not end at the same moment, but most tokens are made in steps for several.
    assert shared > PROCESSES * REQUESTS * TOKENS / 2
