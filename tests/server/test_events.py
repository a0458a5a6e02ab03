"""Streams: silence, errors, clients that leave, and the end of their time."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator

import httpx
import pytest

from relaxlm.errors import BusyError
from relaxlm.openai_api.errors import ApiError
from tests.server.serving import (
    FakeService,
    Running,
    fake_api,
    post,
    read_all,
    running,
    wait_until,
)

STREAM = {"prompt": "a", "stream": True}


async def silent() -> AsyncGenerator[str, None]:
    await asyncio.sleep(60)
    yield ""


async def slow() -> AsyncGenerator[str, None]:
    yield "one"
    await asyncio.sleep(0.35)
    yield "two"


async def failing() -> AsyncGenerator[str, None]:
    yield "one"
    raise ApiError("the grammar failed", code="grammar_error")


async def crashing() -> AsyncGenerator[str, None]:
    yield "one"
    raise ZeroDivisionError("what only a log should show")


async def asleep() -> str:
    await asyncio.sleep(60)
    return ""


def lines(server: Running, path: str = "/v1/completions") -> list[str]:
    response = httpx.post(server.url + path, json=STREAM, timeout=20)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    return [line for line in response.text.split("\n\n") if line]


def test_comments_fill_the_silence_and_do_not_cut_events() -> None:
    with running(fake_api(FakeService(pieces=slow), keep_alive=0.1)) as server:
        received = lines(server)
    comments = [line for line in received if line == ": keep-alive"]
    data = [line for line in received if line.startswith("data: ")]
    assert len(comments) >= 2 and len(data) == 3 and len(comments) + 3 == len(received)
    assert data[-1] == "data: [DONE]"


def test_an_error_in_a_stream_is_told_before_its_end() -> None:
    api = fake_api(FakeService(pieces=failing))
    with running(api) as server:
        received = lines(server)
        metrics = httpx.get(server.url + "/metrics").text
    error = json.loads(received[-2].removeprefix("data: "))["error"]
    assert error["message"] == "the grammar failed" and len(received) == 3
    assert received[-1] == "data: [DONE]"
    assert 'relaxlm_errors_total{code="grammar_error",type="invalid_request_error"} 1.0' in metrics


@pytest.mark.parametrize("stream", [True, False])
def test_a_crash_is_told_without_details_and_logged(
    stream: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    async def crash() -> str:
        raise ZeroDivisionError("what only a log should show")

    with running(fake_api(FakeService(pieces=crashing, answer=crash))) as server:
        response = httpx.post(f"{server.url}/v1/completions", json={**STREAM, "stream": stream})
        assert httpx.get(server.url + "/health").status_code == 200
    assert response.status_code == (200 if stream else 500)
    assert "internal_error" in response.text and "only a log" not in response.text
    assert "ZeroDivisionError: what only a log should show" in capfd.readouterr().err


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request_at_once(stream: bool) -> None:
    service = FakeService(pieces=silent, answer=asleep)
    with running(fake_api(service)) as server:
        for end in ("close", "half"):
            client = server.connect()
            client.sendall(post(json.dumps({**STREAM, "stream": stream}).encode()))
            wait_until(lambda: len(service.seen) == 1)
            assert service.cancelled == 0
            if end == "half":
                client.shutdown(1)
            else:
                client.close()
            wait_until(lambda: service.cancelled == 1)
            client.close()
            service.cancelled = 0
            service.seen.clear()
        wait_until(lambda: not server.server.server_state.tasks)
        if not stream:
            assert 'status="499"' in httpx.get(server.url + "/metrics").text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_a_stream_that_takes_too_long_ends_with_an_error(path: str) -> None:
    service = FakeService(pieces=silent)
    with running(fake_api(service, request_timeout=0.2)) as server:
        if path == "/v1/completions":
            last, end = lines(server)
            assert end == "data: [DONE]"
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            response = httpx.post(server.url + path, json={"input": "a", "stream": True})
            name, _, last = response.text.partition("\n")
            assert name == "event: error"
            error = json.loads(last.removeprefix("data: "))
            assert error.pop("type") == "error"
        assert error["code"] == "request_timeout" and "0.2 seconds" in error["message"]
        assert service.cancelled == 1


def test_an_answer_that_takes_too_long_is_an_error() -> None:
    service = FakeService(answer=asleep)
    with running(fake_api(service, request_timeout=0.2)) as server:
        response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
    assert response.status_code == 504 and service.cancelled == 1
    assert response.json()["error"]["code"] == "request_timeout"


def test_the_end_of_the_server_waits_for_streams() -> None:
    with running(fake_api(FakeService(pieces=slow), drain=20)) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=STREAM) as response:
            parts = response.iter_text()
            first = next(parts)
            threading.Thread(target=server.stop).start()
            wait_until(lambda: server.api.lifetime.closing)
            text = first + "".join(parts)
    assert "two" in text and text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_the_end_of_the_server_does_not_wait_for_ever(stream: bool) -> None:
    service = FakeService(pieces=silent, answer=asleep)
    with running(fake_api(service, drain=0.2)) as server:
        with server.connect() as client:
            client.sendall(post(json.dumps({**STREAM, "stream": stream}).encode()))
            wait_until(lambda: len(service.seen) == 1)
            server.stop()
            text = read_all(client).decode()
    assert "shutting_down" in text and service.cancelled == 1
    assert text.startswith("HTTP/1.1 200" if stream else "HTTP/1.1 503")


def test_requests_on_open_connections_are_refused_while_the_server_ends() -> None:
    api = fake_api()
    with running(api) as server:
        api.lifetime.closing = True
        for response in (
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}),
            httpx.get(server.url + "/health"),
        ):
            assert response.status_code == 503 and response.headers["retry-after"] == "5"


def test_a_full_queue_says_when_to_come_back() -> None:
    async def full() -> str:
        raise BusyError("3 requests wait", retry_after=2.2)

    with running(fake_api(FakeService(answer=full))) as server:
        response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
    assert response.status_code == 429 and response.headers["retry-after"] == "3"
    assert response.json()["error"]["type"] == "rate_limit_error"
