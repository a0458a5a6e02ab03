"""`relaxlm bench serve`: what is measured of a scripted server, in a clock that its delays move."""

import asyncio
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from relaxlm.errors import RequestError
from relaxlm.profiling import serving, serving_plot, serving_process
from relaxlm.profiling.serving import Job, Load, Range, Traffic, run_load
from relaxlm.profiling.serving_client import Dialect, Exchange, Server, ServerError, exchange
from relaxlm.profiling.serving_prompts import Prompts, get_to_know
from relaxlm.profiling.serving_report import Spread, jain, measure, tables
from tests.profiling.scripted_server import (
    HOST,
    Reply,
    Scripted,
    chunk,
    head,
    piece,
    run_virtual,
    usage,
)

DIALECT = Dialect("m")
LIMIT = 60.0


def ask(reply: Reply, dialect: Dialect = DIALECT, limit: float = LIMIT) -> Exchange:
    """What comes of one request that is answered like this."""

    async def main() -> Exchange:
        async with Scripted(lambda *_: reply) as server:
            return await exchange(server, dialect, "words", 7, 3, limit)

    return run_virtual(main())


def call(reply: Reply):
    async def main():
        async with Scripted(lambda *_: reply) as server:
            return await server.call("GET", "/v1/models")

    return run_virtual(main())


# The client


def test_times_are_those_of_the_pieces() -> None:
    made = ask(
        Reply.of_events(
            [
                (0.5, piece("")),  # the role: nothing to read
                (0.25, piece("a")),
                (0.125, piece("b")),
                (2.0, piece("c")),
                (0.5, piece("", "length")),
                (0.25, usage(11, 4, 8)),
            ]
        )
    )
    assert made.error == ""
    assert [time - made.start for time in made.pieces] == pytest.approx([0.75, 0.875, 2.875])
    assert made.end - made.start == pytest.approx(3.625)
    assert (made.prompt_tokens, made.output_tokens, made.cached_tokens) == (11, 4, 8)
    assert made.queued == 0.25


def test_tokens_of_a_server_that_does_not_count() -> None:
    made = ask(Reply.of_events([(0, piece("a")), (0, piece("b", "stop"))]))
    assert (made.prompt_tokens, made.output_tokens, made.cached_tokens) == (7, 2, None)
    made = ask(Reply.of_events([(0, piece("a")), (0, piece("", "length"))]))
    assert made.output_tokens == 3  # max_tokens: two of them gave no text


def test_thoughts_calls_and_completions_are_pieces() -> None:
    deltas = [{"reasoning_content": "x"}, {"tool_calls": [{}]}, {"content": None}]
    events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    events.append({"choices": [{"text": "x", "finish_reason": "stop"}]})
    assert len(ask(Reply.of_events([(0, event) for event in events])).pieces) == 3


def test_a_stream_that_is_cut_anywhere() -> None:
    """Events across chunks, two in one, CRLF, comments; a body that ends with the connection."""
    first, last = (json.dumps(piece(*text)) for text in (("a",), ("b", "stop")))
    text = f": ping\r\n\r\nevent: x\r\ndata:{first}\r\n\r\ndata: {last}\n\ndata: [DONE]\n\n"
    whole = text.encode()
    for size in (1, 7, len(whole)):
        cut = [whole[i : i + size] for i in range(0, len(whole), size)]
        chunked = [(0, head(200, "Transfer-Encoding: chunked")), *((0, chunk(c)) for c in cut)]
        assert len(ask(Reply([*chunked, (0, chunk(b""))])).pieces) == 2
        assert len(ask(Reply([(0, head(200)), *((0, c) for c in cut)])).pieces) == 2


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply.of_json({"error": {"message": "too\nbusy"}}, 429), "HTTP 429: too busy"),
        (Reply.of_json({"error": "odd"}, 500), "HTTP 500: odd"),
        (Reply.of_json(["odd"], 404), 'HTTP 404: ["odd"]'),
        (Reply([]), "the connection was closed without an answer"),
        (Reply([(0, b"SSH-2.0\r\n\r\n")]), "the connection was closed without an answer"),
        (Reply([(0, head(200, "Content-Length: 9") + b"data")]), "cut off"),
        (Reply([(0, head(200, "Transfer-Encoding: chunked") + b"5\r\nda")]), "cut off"),
        (Reply([(0, head(200, "Transfer-Encoding: chunked") + b"x\r\n")]), "is not HTTP"),
        (Reply.of_events([(0, piece("a"))]), "the stream ended before the reply did"),
        (Reply.of_events([(0, {"error": {"message": "lost"}})]), "in the stream: lost"),
        (Reply([(0, head(200) + b"data: {x\n\n")]), "an event is not JSON: {x"),
        (Reply.of_events([(9, piece("a", "stop"))]), "no complete reply within 8 s"),
    ],
)
def test_what_fails_is_told(reply: Reply, error: str) -> None:
    made = ask(reply, limit=8)
    assert error in made.error
    assert made.end >= made.start


def test_no_server() -> None:
    port = serving_process.free_port()
    made = run_virtual(exchange(Server(HOST, port), DIALECT, "", 1, 1, LIMIT))
    assert made.error.startswith("no connection: ")


def test_an_answer_that_is_not_json() -> None:
    assert call(Reply.of_json({"data": []})) == {"data": []}
    with pytest.raises(ServerError, match="/v1/models: the answer is not JSON"):
        call(Reply([(0, head(200) + b"<html>")]))


def test_what_is_sent() -> None:
    scripted = Scripted(lambda *_: Reply.of_events([(0, piece("a", "stop"))]))

    async def main() -> None:
        async with scripted as server:
            keyed = Server.parse(f"http://{HOST}:{server.port}", "secret")
            await exchange(keyed, DIALECT, "wörter", 7, 3, LIMIT)
            plain = Dialect("m", "completions", {}, counts_stream=False)
            await exchange(keyed, plain, "wörter", 7, 3, LIMIT)

    run_virtual(main())
    common = {"model": "m", "max_tokens": 3, "temperature": 0, "stream": True}
    chat = {"messages": [{"role": "user", "content": "wörter"}], "ignore_eos": True}
    counting = {"stream_options": {"include_usage": True}}
    assert scripted.asked == [
        ("POST", "/v1/chat/completions", {**common, **chat, **counting}),
        ("POST", "/v1/completions", {**common, "prompt": "wörter"}),
    ]
    assert "Authorization: Bearer secret" in scripted.headers


def test_addresses() -> None:
    assert Server.parse("http://[::1]:80/").url == "http://[::1]:80/v1"
    server = Server.parse("https://example.org/api/v3/")
    assert (server.port, server.tls, server.url) == (443, True, "https://example.org:443/api/v3")
    for wrong in ("localhost:8000", "ftp://x", "http://", "http://x:99999"):
        with pytest.raises(RequestError, match="is no server's address"):
            Server.parse(wrong)


# Loads


def asked_after(load: Load, seconds: list[float]) -> list[tuple[float, float]]:
    """Start and end of requests that take so long each."""

    async def main() -> list[tuple[float, float]]:
        clock = asyncio.get_running_loop().time
        begin = clock()

        async def one(job: Job) -> Exchange:
            made = Exchange(1, 1, clock() - begin)
            await asyncio.sleep(float(job.text))
            return replace(made, end=clock() - begin)

        jobs = [Job(str(time), 1, 1) for time in seconds]
        made = await run_load(load, jobs, one, random.Random(5))
        return [(one.start, one.end) for one in made]

    return run_virtual(main())


def test_clients_ask_one_request_after_another() -> None:
    times = asked_after(Load(concurrency=2), [3, 1, 1, 1, 1])
    expected = [(0, 3), (0, 1), (1, 2), (2, 3), (3, 4)]
    assert times == [pytest.approx(pair, abs=1e-6) for pair in expected]


def test_requests_at_random_moments_do_not_wait_for_replies() -> None:
    times = asked_after(Load(rate=4), [100] * 60)
    rng, due = random.Random(5), 0.0
    for start, end in times:
        assert (start, end) == pytest.approx((due, due + 100), abs=1e-6)
        due += rng.expovariate(4)
    assert due == pytest.approx(15, rel=0.3)


def test_all_at_once() -> None:
    assert asked_after(Load(rate=math.inf), [1] * 3) == [pytest.approx((0, 1))] * 3


def test_names_of_loads() -> None:
    loads = (Load(concurrency=4), Load(rate=0.5), Load(rate=math.inf))
    assert [load.name for load in loads] == ["4 at a time", "0.5 per second", "all at once"]


def test_ranges() -> None:
    assert (Range.parse("256"), Range.parse("1:3")) == ((256, 256), (1, 3))
    assert (str(Range.parse("256")), str(Range.parse("1:3"))) == ("256", "1 to 3")
    for wrong in ("", "0", "3:2", "1:2:3", "x"):
        with pytest.raises(RequestError, match="expected a number of tokens"):
            Range.parse(wrong)


# Prompts


def count(costs: dict[str, int], text: str) -> int:
    return sum(costs[word] for word in text.split()[1:])


def test_prompts_have_the_wanted_length_and_differ() -> None:
    costs = {"a": 1, "be": 2, "see": 3}
    prompts = Prompts(costs, 10, True, random.Random(0))
    texts = [prompts.make(tokens) for tokens in range(12, 80)]
    assert [10 + count(costs, text) for text in texts] == list(range(12, 80))
    assert len({prompts.make(60) for _ in range(20)}) == 20
    assert count(costs, prompts.make(1)) == 1  # no room: one word all the same


def test_lengths_that_no_words_give_come_out_shorter() -> None:
    prompts = Prompts({"be": 4, "see": 6}, 0, True, random.Random(0))
    for tokens in range(4, 40):
        assert count({"be": 4, "see": 6}, prompts.make(tokens)) == tokens - tokens % 2


def test_a_shared_prefix() -> None:
    prompts = Prompts({"a": 1, "b": 1}, 2, True, random.Random(0))
    prompts.share(50)
    texts = [prompts.make(80) for _ in range(9)]
    assert {len(text.split()) for text in texts} == {1 + 78}
    assert len({tuple(text.split()[:51]) for text in texts}) == 1 < len(set(texts))


def known(server: Scripted) -> tuple[Dialect, Prompts]:
    async def main() -> tuple[Dialect, Prompts]:
        async with server as at:
            return await get_to_know(at, None, "chat", LIMIT, random.Random(0))

    return run_virtual(main())


def content_of(body) -> str:
    return body["messages"][0]["content"]


@pytest.mark.parametrize("field", ["prompt", "content", "input"])
def test_words_are_counted_by_the_servers_tokenizer(field: str) -> None:
    """Its tokens are letters, and a text begins with one of its own."""

    def answer(method: str, path: str, body) -> Reply:
        if path == "/v1/models":
            return Reply.of_json({"data": [{"id": "letters"}]})
        if path.endswith("/tokenize"):
            if field not in body:
                return Reply.of_json({"error": {"message": "?"}}, 400)
            return Reply.of_json({"tokens": [0, *range(len(body[field]))]})
        return Reply.of_events([(0, piece("a", "length")), (0, usage(*count_of(body), 0))])

    def count_of(body) -> tuple[int, int]:
        return 5 + len(content_of(body)), body["max_tokens"]

    dialect, prompts = known(Scripted(answer))
    assert (dialect.model, prompts.exact, prompts.overhead) == (
        "letters",
        True,
        5 + len("Continue"),
    )
    assert {5 + len(prompts.make(tokens)) for tokens in range(80, 90)} == set(range(80, 90))


def test_a_server_without_extensions_and_without_a_tokenizer() -> None:
    def answer(method: str, path: str, body) -> Reply:
        if path == "/v1/models":
            return Reply.of_json({"data": [{"id": "m"}]})
        if path.endswith("/tokenize"):
            return Reply.of_json({"detail": "Not Found"}, 404)
        for field in ("ignore_eos", "stream_options"):
            if field in body:
                return Reply.of_json({"error": {"message": f"unknown field {field}"}}, 400)
        return Reply.of_events([(0, piece("a", "length"))])

    dialect, prompts = known(Scripted(answer))
    assert dialect == Dialect("m", "chat", {}, counts_stream=False)
    assert (prompts.exact, prompts.overhead) == (False, 1)
    assert len(prompts.make(40).split()) == 40


def test_a_server_that_does_not_reply() -> None:
    nothing = Scripted(lambda *_: Reply.of_json({"error": {"message": "no key"}}, 401))
    with pytest.raises(RequestError, match=r"gives no model's name \(HTTP 401: no key\)"):
        known(nothing)

    def answer(method: str, path: str, body) -> Reply:
        listed = Reply.of_json({"data": [{"id": "m"}]})
        return listed if path == "/v1/models" else Reply.of_json({"error": {"message": "no"}}, 400)

    with pytest.raises(RequestError, match="no reply to a short prompt: HTTP 400: no"):
        known(Scripted(answer))


# What it amounts to


def test_spread_and_fairness() -> None:
    spread = Spread.of([float(i) for i in range(101)])
    assert spread == Spread(50, 50, 90, 99, 100)
    assert Spread.of([]) is None
    assert jain([3, 3, 3]) == pytest.approx(1)
    assert jain([1, 0, 0, 0]) == pytest.approx(1 / 4)
    assert jain([]) is None


def synthetic() -> list[Exchange]:
    """Two replies, one twice as fast as the other, and a failure."""
    return [
        Exchange(100, 5, 10.0, 5, 60, 0.25, [10.5, 10.6, 10.7, 10.8, 10.9], 10.9),
        Exchange(300, 5, 10.0, 5, 20, None, [11.0, 11.4], 11.8),
        Exchange(100, 5, 10.0, end=14.0, error="HTTP 500: x"),
    ]


def test_a_load_is_summed_up() -> None:
    found = measure("x", synthetic())
    assert (found.requests, found.succeeded, found.errors) == (3, 2, {"HTTP 500: x": 1})
    assert found.seconds == pytest.approx(4)
    assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (400, 10, 80)
    assert found.cached_share == pytest.approx(0.2)
    assert found.first is not None and found.first.mean == pytest.approx(0.75)
    assert found.gaps is not None and found.gaps.max == pytest.approx(0.4)
    # Five tokens in two pieces: four steps of 0.2 s.
    assert found.per_token is not None and found.per_token.max == pytest.approx(0.2)
    assert found.whole is not None and found.whole.max == pytest.approx(1.8)
    assert found.fairness == pytest.approx(225 / 250)


def test_tables() -> None:
    lines = tables([measure("x", synthetic())])
    assert lines[0].split("  ")[-3:] == ["from cache", "fairness", "errors"]
    assert lines[1].split() == ["x", "0.50", "100.0", "2.5", "20%", "0.900", "1"]
    assert [line.split()[1] for line in lines[4:9]] == ["in", "first", "between", "per", "whole"]
    assert lines[4].split()[3:] == ["250.0"] * 5
    assert lines[5].split()[3:] == ["750.0", "750.0", "950.0", "995.0", "1000.0"]
    assert lines[9] == "x: 1 x HTTP 500: x"


def test_nothing_but_errors() -> None:
    found = measure("x", synthetic()[2:])
    assert (found.first, found.fairness, found.cached_share) == (None, None, None)
    assert len(tables([found])) == 5


def test_a_whole_run() -> None:
    """Replies that take 1 s and 3 more: two clients make half a request per second."""

    def answer(method: str, path: str, body) -> Reply:
        if path == "/v1/models":
            return Reply.of_json({"data": [{"id": "m"}]})
        if path.endswith("/tokenize"):
            return Reply.of_json({"tokens": body["prompt"].split()})
        events = [(1, piece("a")), *[(1, piece("a"))] * 2, (1, piece("a", "length"))]
        words = len(content_of(body).split())
        return Reply.of_events([*events, (0, usage(3 + words, body["max_tokens"], 3))])

    scripted, said = Scripted(answer), list[str]()
    traffic = Traffic(4, Range(20, 30), Range(4, 4), 8, 1, LIMIT)

    async def main() -> serving.ServingBenchmark:
        loads = [Load(concurrency=2), Load(rate=math.inf)]
        async with scripted as server:
            return await serving.run(server, loads, traffic, progress=said.append)

    found = run_virtual(main())
    assert found.title == "4 requests of 20 to 30 tokens, 8 of them shared, replies of 4; seed 1"
    (pairs, _), (together, made) = found.loads
    assert (pairs.seconds, together.seconds) == (pytest.approx(8), pytest.approx(4))
    assert pairs.first == together.first == Spread(*[pytest.approx(1)] * 5)
    assert pairs.gaps == Spread(*[pytest.approx(1)] * 5) and pairs.output_tokens == 16
    assert all(20 <= one.prompt_tokens <= 30 for one in made)
    prompts = [content_of(body) for _, path, body in scripted.asked if path.endswith("completions")]
    assert len(set(prompts)) == len(prompts) == 2 + 2 * 4
    assert len({tuple(prompt.split()[:9]) for prompt in prompts[1:]}) == 1
    assert said[-1] == "all at once: 4 of 4"
    content = json.loads(json.dumps(found.as_json()))
    assert content["loads"][1]["exchanges"][0]["pieces"] == pytest.approx([1, 2, 3, 4])


@pytest.mark.parametrize("loads", [1, 3])
def test_a_picture(loads: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = synthetic()
    # A load of which every request failed is drawn, too.
    found = [(measure(f"load {i}", made[i:]), made[i:]) for i in range(loads)]
    serving_plot.draw(found, tmp_path / "x.png", "title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# A server's process


def test_a_server_that_ends_says_why() -> None:
    import sys

    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with (
        pytest.raises(RequestError, match="ended with status 1:\nno such model"),
        serving_process.running(command, f"http://{HOST}:{serving_process.free_port()}/health"),
    ):
        pass


def test_a_server_is_ended_after_use() -> None:
    import sys

    port = serving_process.free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", HOST]
    with serving_process.running(command, f"http://{HOST}:{port}/") as process:
        assert process.poll() is None
    assert process.returncode is not None
