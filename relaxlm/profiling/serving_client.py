"""A client for servers that speak OpenAI's API, small enough to measure with.

Every request has a connection of its own. Replies come as server-sent events; what counts is when
the event loop saw them, in seconds of its clock.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from relaxlm.errors import RequestError

Route = Literal["chat", "completions"]
_PATHS: dict[Route, str] = {"chat": "/chat/completions", "completions": "/completions"}

_JSON = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
_OK = 200
_READ = 1 << 16  # bytes
_ERROR_SHOWN = 300  # characters of an error's body


class ServerError(Exception):
    """An answer that is not what was asked for. `status` is HTTP's, 0 if there was none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Server:
    """Where a server is.

    Attributes:
        path: where OpenAI's routes begin, such as "/v1".
        headers: sent with every request.
    """

    host: str
    port: int
    path: str = "/v1"
    tls: bool = False
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> "Server":
        """From a base URL such as http://127.0.0.1:8000/v1; without a path, /v1 is meant.

        Raises:
            RequestError: not such a URL.
        """
        parts = urlsplit(url)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise RequestError(f"{url!r} is no server's address: expected http://HOST:PORT")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        path = parts.path.rstrip("/") or "/v1"
        return cls(parts.hostname, port, path, parts.scheme == "https", headers)

    @property
    def root(self) -> str:
        return f"http{'s' if self.tls else ''}://{self.authority}"

    @property
    def url(self) -> str:
        return self.root + self.path

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to a request.

        Raises:
            ServerError: a status other than 200, or an answer that is not JSON.
            OSError: no connection.
        """
        async with self._request(method, path, body) as chunks:
            content = b"".join([chunk async for chunk in chunks])
        try:
            return json.loads(content)
        except ValueError:
            raise ServerError(f"{path}: the answer is not JSON") from None

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[str]:
        """The data of each event of a stream, as it comes.

        Raises:
            ServerError: a status other than 200, or a stream that is cut off.
            OSError: no connection.
        """
        async with self._request("POST", path, body) as chunks:
            data: list[bytes] = []
            async for line in _lines(chunks):
                if line.startswith(b"data:"):
                    data.append(line[5:].removeprefix(b" "))
                elif not line and data:
                    yield b"\n".join(data).decode()
                    data = []

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        content = b"" if body is None else json.dumps(body).encode()
        headers = {"Host": self.authority, **_JSON, **self.headers}
        headers |= {"Content-Length": str(len(content)), "Connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        context = ssl.create_default_context() if self.tls else None
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=context)
        try:
            writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content)
            await writer.drain()
            status, answered = await _read_head(reader)
            chunks = _body(reader, answered)
            if status != _OK:
                text = b"".join([chunk async for chunk in chunks]).decode(errors="replace")
                raise ServerError(f"HTTP {status}: {_error_message(text)}", status)
            yield chunks
        except (asyncio.IncompleteReadError, ValueError) as error:
            raise ServerError(f"the answer was cut off or is not HTTP: {error}") from None
        finally:
            writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    line = await reader.readline()
    if not line.startswith(b"HTTP/1."):
        raise ServerError("the connection was closed without an answer")
    headers = {}
    while text := (await reader.readline()).decode("latin-1").strip():
        name, _, value = text.partition(":")
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        return
    left = int(headers["content-length"]) if "content-length" in headers else None
    while left != 0:
        chunk = await reader.read(_READ if left is None else min(left, _READ))
        if not chunk:
            if left:
                raise asyncio.IncompleteReadError(b"", left)
            return
        left = None if left is None else left - len(chunk)
        yield chunk


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")


def _error_message(text: str) -> str:
    """What OpenAI's error object says; the text itself if it is none."""
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:_ERROR_SHOWN]


@dataclass
class Exchange:
    """A request, and when its reply came: seconds of the event loop's clock.

    Attributes:
        prompt_tokens, output_tokens: as the server counted them; where it does not, the prompt's
            planned length, and one token for each piece of text or the limit that was reached.
        cached_tokens: of the prompt, found in the server's prefix cache; None if it does not say.
        queued: seconds before the server began with it; None if it does not say.
        start: when the request was due. end: when the reply was complete, or had failed.
        pieces: when each piece of text came. Several tokens can make up one piece: the bytes of a
            character, or tokens that came while the reader was busy.
        error: what went wrong, or "".
    """

    prompt_tokens: int
    max_tokens: int
    start: float
    output_tokens: int = 0
    cached_tokens: int | None = None
    queued: float | None = None
    pieces: list[float] = field(default_factory=list)
    end: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Dialect:
    """What a server is asked with.

    Attributes:
        extensions: fields beside OpenAI's that it understands.
        counts_stream: it takes `stream_options`, and counts the tokens of a stream.
    """

    model: str
    route: Route = "chat"
    extensions: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    counts_stream: bool = True

    def body(self, text: str, max_tokens: int) -> dict[str, Any]:
        fields: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": 0}
        if self.route == "chat":
            fields["messages"] = [{"role": "user", "content": text}]
        else:
            fields["prompt"] = text
        fields["stream"] = True
        if self.counts_stream:
            fields["stream_options"] = {"include_usage": True}
        return fields | self.extensions


async def exchange(
    server: Server, dialect: Dialect, text: str, planned: int, max_tokens: int, limit: float
) -> Exchange:
    """Ask once and read the reply as it comes; what fails is told in the result.

    Args:
        planned: tokens that the prompt should have.
        limit: seconds that all of it may take.
    """
    clock = asyncio.get_running_loop().time
    made = Exchange(planned, max_tokens, clock())
    try:
        await asyncio.wait_for(_read_reply(server, dialect, text, made), limit)
    except ServerError as error:
        made.error = str(error)
    except asyncio.TimeoutError:  # not TimeoutError in Python 3.10
        made.error = f"no complete reply within {limit:g} s"
    except OSError as error:
        made.error = f"no connection: {error.strerror or error}"
    made.end = clock()
    return made


async def _read_reply(server: Server, dialect: Dialect, text: str, made: Exchange) -> None:
    clock = asyncio.get_running_loop().time
    finish, usage = None, None
    path = server.path + _PATHS[dialect.route]
    async for data in server.events(path, dialect.body(text, made.max_tokens)):
        if data == "[DONE]":
            continue
        event = _parse(data)
        for choice in event.get("choices") or ():
            if _text_of(choice):
                made.pieces.append(clock())
            finish = choice.get("finish_reason") or finish
        usage = event.get("usage") or usage
    if finish is None:
        raise ServerError("the stream ended before the reply did")
    if usage is None:
        made.output_tokens = made.max_tokens if finish == "length" else len(made.pieces)
        return
    made.prompt_tokens, made.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    made.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    made.queued = (usage.get("extra") or {}).get("queue_s")  # relaxlm's


def _parse(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise ServerError(f"an event is not JSON: {data[:_ERROR_SHOWN]}") from None
    if "error" in event:
        raise ServerError(f"in the stream: {_error_message(data)}")
    return event


def _text_of(choice: dict[str, Any]) -> bool:
    """Whether a choice of a stream brings something to read."""
    delta = choice.get("delta") or choice
    fields = ("content", "reasoning_content", "tool_calls", "text")
    return any(delta.get(name) for name in fields)
