"""A connection: uvicorn's HTTP/1.1, with limits on what a client may hold and for how long."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from relaxlm.openai_api.errors import ApiError
from relaxlm.server.errors import error_response
from relaxlm.server.settings import ServerSettings

# A reader that takes less than this is taken for one that stopped. In bytes a second.
_SLOWEST_READER = 500

_log = logging.getLogger("relaxlm.server")


def limited_protocol(settings: ServerSettings) -> type[H11Protocol]:
    """uvicorn's `http` setting for a server with these limits."""
    return type("Connection", (_Connection,), {"settings": settings})


class _Connection(H11Protocol):
    """
    - The head of a request comes within `header_timeout`; the body's time is `body.py`'s concern.
    - At most one chunk of a response is held: the next one waits until this one is with the system.
      A client that takes nothing for `reader_timeout` is cut off, which ends its request.
    - Connections beyond `max_connections` are told so, and closed.
    """

    settings: ServerSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes that were waiting for the client when last looked at
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) >= self.settings.max_connections:
            self._refused = True
            self.transport, self.flow = transport, FlowControl(transport)
            transport.write(_raw_response(_too_many(self.settings.max_connections)))
            transport.close()
            return
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_reader_timer()
        if not self._refused:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._expect_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # The next request may have come with this one: its head in part, or all of it.
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        self._stop_head_timer()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_raw_response(ApiError(msg, code="invalid_http")))
            self.transport.close()
        else:  # in the middle of a response: nothing else can be said
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_reader_timer()
        super().resume_writing()

    def _expect_head(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.settings.header_timeout, self._no_head)

    def _no_head(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            seconds = self.settings.header_timeout
            error = ApiError(f"no whole request head came within {seconds:g} seconds", 408)
            self.transport.write(_raw_response(error))
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_reader(self) -> None:
        self._stop_reader_timer()
        seconds = self.settings.reader_timeout
        self._reader_timer = self.loop.call_later(seconds, self._check_reader)

    def _check_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        taken, self._unread = self._unread - left, left
        if taken >= _SLOWEST_READER * self.settings.reader_timeout:
            self._watch_reader()
            return
        self._reader_timer = None
        _log.warning(
            "a client took %d bytes in %g seconds, with %d more waiting: disconnected",
            max(taken, 0),
            self.settings.reader_timeout,
            left,
        )
        self.transport.abort()

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None


def _too_many(limit: int) -> ApiError:
    return ApiError(
        f"the server has {limit} connections, the most that it takes",
        503,
        "server_error",
        code="too_many_connections",
        retry_after=1.0,
    )


def _raw_response(error: ApiError) -> bytes:
    """An error response where no request is there that uvicorn could answer."""
    response = error_response(error)
    response.headers["connection"] = "close"
    head = b"".join(b"%s: %s\r\n" % pair for pair in response.raw_headers)
    return b"HTTP/1.1 %d \r\n%s\r\n%s" % (response.status_code, head, bytes(response.body))
