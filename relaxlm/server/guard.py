"""What every request meets first: its id, who may ask from where, and what is left unread."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import uuid
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relaxlm.openai_api.errors import ApiError
from relaxlm.server.errors import error_response
from relaxlm.server.metrics import Metrics
from relaxlm.server.settings import ServerSettings

# Of a request that is refused: seconds that the rest of its body may take to come. A connection
# that is closed with bytes unread is reset, and the client might not see why it was refused.
_DISCARD_SECONDS = 3.0
_READS_ONLY = ("GET", "HEAD", "OPTIONS")
_COMMON_HEADERS = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


class Guard:
    """Outermost: request ids, headers, counts of responses, and bodies that nobody read."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        body = _Body(scope, receive)

        async def start(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers["x-request-id"] = request_id
                for name, value in _COMMON_HEADERS.items():
                    headers.setdefault(name, value)
                closing = headers.get("connection") == "close"
                if not closing and not await body.discard(self._settings.max_body):
                    headers["connection"] = "close"
                self._metrics.responded(scope, message["status"])
            await send(message)

        await self._app(scope, body.receive, start)


class Access:
    """Lets a request in: by the name it addresses, the page it comes from, and its API key."""

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, open_paths: frozenset[str]
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._open = open_paths | ({"/metrics"} if settings.open_metrics else frozenset())
        self._keys = [_digest(key) for key in settings.api_keys]
        self._origins = frozenset(settings.cors_origins)
        names = (*settings.allowed_hosts, settings.host)
        self._hosts = frozenset(name.lower().rstrip(".") for name in names)
        # With a key, a page from elsewhere that got itself this server's address has no use of it.
        self._any_host = bool(settings.api_keys) and not settings.loopback
        self._any_host &= not settings.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                self._metrics.failed(refusal)
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not self._host_allowed(host):
            return ApiError(
                f"this server is not known as {host[:100]!r}: address it by its IP address or as "
                "localhost, or start it with --allowed-host NAME",
                403,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if scope["method"] not in _READS_ONLY and origin is not None:
            if not self._origin_allowed(origin, host):
                return ApiError(
                    f"pages of {origin[:100]!r} may not use this server; start it with "
                    "--cors-origin to let them",
                    403,
                    code="origin_not_allowed",
                )
        if self._keys and scope["path"] not in self._open:
            return self._key_refusal(headers)
        return None

    def _host_allowed(self, host: str) -> bool:
        if self._any_host:
            return True
        name = _host_name(host)
        if name in self._hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:  # an address is not looked up, so no other site can stand behind it
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _origin_allowed(self, origin: str, host: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        return urlsplit(origin).netloc.lower() == host.lower() != ""

    def _key_refusal(self, headers: Headers) -> ApiError | None:
        given = headers.get("authorization", "")
        scheme, _, key = given.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "this server needs an API key: send the header Authorization: Bearer KEY"
            return ApiError(message, 401, "authentication_error", code="missing_api_key")
        digest = _digest(key.strip())
        # Every key is compared, so that the time does not tell which one is close.
        if any([hmac.compare_digest(digest, known) for known in self._keys]):
            return None
        return ApiError("wrong API key", 401, "authentication_error", code="invalid_api_key")


class _Body:
    """Knows whether a request's body has been read to its end."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._asked = False
        self._ended = False
        headers = Headers(scope=scope)
        # The client waits to be asked for its body; discarding it would ask.
        self._waits = headers.get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        self._asked = True
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._ended = True
        return message

    async def discard(self, limit: int) -> bool:
        """Read what is left, up to a limit; whether that was all."""
        if not self._ended and (self._asked or not self._waits):
            try:
                await asyncio.wait_for(self._discard(limit), _DISCARD_SECONDS)
            except asyncio.TimeoutError:
                return False
        return self._ended

    async def _discard(self, limit: int) -> None:
        left = limit
        while not self._ended and left >= 0:
            left -= len((await self.receive()).get("body", b""))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_name(host: str) -> str:
    """A Host header without its port, and without the brackets of IPv6."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0].rstrip(".") if ":" in name else name.rstrip(".")
