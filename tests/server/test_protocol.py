"""Clients that are slow, wrong or too many, on raw sockets."""

import json
import socket
import time
from collections.abc import AsyncGenerator, Iterator

import pytest

from tests.server.serving import (
    FakeService,
    Running,
    fake_api,
    post,
    read_all,
    running,
    wait_until,
)

QUICK = 0.15  # seconds of every timeout here
ENOUGH = 2_000  # bytes that `max_body` allows


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    api = fake_api(
        header_timeout=QUICK,
        body_timeout=QUICK,
        idle_timeout=1,
        reader_timeout=QUICK,
        max_body=ENOUGH,
        max_connections=8,
    )
    with running(api) as started:
        yield started


@pytest.fixture(autouse=True)
def all_connections_end(server: Running) -> Iterator[None]:
    yield
    wait_until(lambda: not server.server.server_state.connections)
    wait_until(lambda: not server.server.server_state.tasks)


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


def message(response: bytes) -> str:
    return json.loads(response.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_request_is_answered(server: Running) -> None:
    response = server.say(post(b'{"prompt": "a"}'))
    assert status(response) == 200 and b'"text_completion"' in response


def test_silence_ends_a_connection(server: Running) -> None:
    with server.connect() as client:
        assert read_all(client) == b""


@pytest.mark.parametrize("start", [b"P", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_does_not_end_is_given_up(server: Running, start: bytes) -> None:
    response = server.say(start)
    assert status(response) == 408 and "no whole request head" in message(response)


def test_a_head_that_comes_a_byte_at_a_time_gets_no_more_time(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        client.settimeout(QUICK / 10)
        for _ in range(100):
            try:
                client.sendall(b"a: b\r\n")
                assert status(client.recv(1000)) == 408
                return
            except TimeoutError:
                pass
    raise AssertionError("the connection goes on")


def test_the_second_request_of_a_connection_has_the_same_time(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he")
        response = read_all(client)
    assert response.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in response


def test_requests_may_follow_each_other_without_waiting(server: Running) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    response = server.say(request * 3 + post(b'{"prompt": "a"}'))
    assert response.count(b"HTTP/1.1 200") == 4


def test_a_body_that_does_not_end_is_given_up(server: Running) -> None:
    response = server.say(post(b'{"prompt":', Content_Length="100"))
    assert status(response) == 408 and "body did not come" in message(response)


def test_a_chunked_body_that_is_too_large_is_given_up_at_once(server: Running) -> None:
    head = post(b"", Content_Length="", Transfer_Encoding="chunked")
    with server.connect() as client:
        client.sendall(head)
        sent = 0
        client.settimeout(5)
        try:
            while sent < 100 * ENOUGH:
                client.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
                sent += 1000
        except OSError:
            pass
        response = read_all(client)
    assert not response or status(response) == 413
    assert sent < 100 * ENOUGH or response


def test_a_declared_length_that_is_too_large_is_answered_before_the_body(server: Running) -> None:
    request = post(b"", Content_Length="1000000", Expect="100-continue")
    response = server.say(request)
    assert status(response) == 413 and b"100 Continue" not in response
    assert b"connection: close" in response.lower()


def test_the_reason_reaches_a_client_whose_body_fills_all_buffers() -> None:
    with running(fake_api(api_keys=("k",))) as server:
        response = server.say(post(b" " * 6_000_000))
        assert status(response) == 401 and "API key" in message(response)


def test_the_reason_reaches_a_client_that_sends_its_body_first(server: Running) -> None:
    body = b" " * (2 * ENOUGH)
    for request, code in ((post(body), 413), (post(body[:ENOUGH], "/nowhere"), 404)):
        assert status(server.say(request)) == code


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"\r\n\r\n\r\nHELO there\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        post(b"zz\r\n", Content_Length="", Transfer_Encoding="chunked"),
        post(b"{}", Transfer_Encoding="gzip, chunked"),
        b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 1_000_000 + b"\r\n\r\n",
    ],
)
def test_garbage_gets_an_error_and_no_more(server: Running, garbage: bytes) -> None:
    response = server.say(garbage)
    assert not response or (400 <= status(response) < 500 and message(response)), response


def test_a_client_that_has_said_all_and_closed_its_side_is_gone(server: Running) -> None:
    with server.connect() as client:
        client.sendall(post(b'{"prompt": "a"}'))
        client.shutdown(socket.SHUT_WR)
        read_all(client)


def test_connections_beyond_the_limit_are_told_so(server: Running) -> None:
    clients = [server.connect() for _ in range(8)]
    try:
        wait_until(lambda: len(server.server.server_state.connections) == 8)
        response = server.say(b"")
        assert status(response) == 503 and "8 connections" in message(response)
        assert b"retry-after: 1" in response
    finally:
        for client in clients:
            client.close()
    wait_until(lambda: not server.server.server_state.connections)
    assert status(server.say(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")) == 200


def test_a_reader_that_stops_is_cut_off_and_its_request_cancelled() -> None:
    sent = 0

    async def endless() -> AsyncGenerator[str, None]:
        nonlocal sent
        while True:
            sent += 1
            yield "x" * 50_000

    service = FakeService(pieces=endless)
    with running(fake_api(service, reader_timeout=QUICK)) as server:
        with server.connect() as client:
            client.sendall(post(b'{"prompt": "a", "stream": true}'))
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            wait_until(lambda: service.cancelled == 1)
            wait_until(lambda: not server.server.server_state.connections)
    assert sent * 50_000 < 50e6  # what the system's buffers take, and no more


SMALL = 4096  # bytes that the system holds on each side, and about as many again


async def answer() -> str:
    return "x" * 60_000  # less than what asyncio holds without asking its protocol to wait


def test_a_reader_that_stops_near_the_end_is_cut_off_too() -> None:
    with running(fake_api(FakeService(answer), reader_timeout=QUICK), SMALL) as server:
        with server.connect(SMALL) as client:
            client.sendall(post(b'{"prompt": "a"}'))
            wait_until(lambda: len(server.server.server_state.connections) == 1)
            wait_until(lambda: not server.server.server_state.connections)
            assert len(read_all(client)) < 60_000


def test_a_slow_reader_that_goes_on_reading_gets_everything() -> None:
    with running(fake_api(FakeService(answer), reader_timeout=QUICK), SMALL) as server:
        with server.connect(SMALL) as client:
            client.sendall(post(b'{"prompt": "a"}'))
            received = b""
            while part := client.recv(500):
                received += part
                time.sleep(QUICK / 30)
    assert received.count(b"x") >= 60_000
