"""Sockets, signals, and the end of a server."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from relaxlm.errors import ConfigError
from relaxlm.server.app import ApiServer
from relaxlm.server.protocol import limited_protocol

# Seconds for the last words of streams, after which connections are cut.
_LAST_WORDS = 5.0
# Heads larger than this are refused. In bytes.
_LARGEST_HEAD = 32768
_BACKLOG = 512

_log = logging.getLogger("relaxlm.server")


def bind(host: str, port: int) -> list[socket.socket]:
    """Take a port before a model is loaded; nobody can connect yet.

    Args:
        port: 0 for any that is free.

    Raises:
        ConfigError: the host is not of this machine, or the port is in use.
    """
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: {error}") from None
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            one = socket.socket(family, kind, protocol)
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port, *address[2:]))
            port = one.getsockname()[1]
    except OSError as error:
        for one in sockets:
            one.close()
        raise ConfigError(
            f"--host {host} --port {port}: {error.strerror or error}; choose another --port, or "
            "end the program that has this one"
        ) from None
    return sockets


class Server(uvicorn.Server):
    """uvicorn with our connections, our log, and our end:

    A first SIGINT or SIGTERM stops taking requests; running ones may go on for `drain` seconds and
    are told then that the server ends. A second signal ends the process as if nobody had caught it.
    """

    def __init__(self, api: ApiServer, log_level: str = "info", access_log: bool = True) -> None:
        settings = api.settings
        config = uvicorn.Config(
            api.app,
            http=limited_protocol(settings),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=_logging(log_level),
            access_log=access_log,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=max(1, round(settings.idle_timeout)),
            timeout_graceful_shutdown=max(1, round(settings.drain + _LAST_WORDS)),
            h11_max_incomplete_event_size=_LARGEST_HEAD,
        )
        super().__init__(config)
        self._api = api
        api.metrics.connections.set_function(lambda: len(self.server_state.connections))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        running, drain = len(self.server_state.tasks), self._api.settings.drain
        if running:
            _log.info("shutting down; up to %g s for %d running requests", drain, running)
        self._api.lifetime.closing = True
        end = asyncio.get_running_loop().call_later(drain, self._api.lifetime.end)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        for one in HANDLED_SIGNALS:
            signal.signal(one, signal.SIG_DFL)


def connection_limit(wanted: int) -> int:
    """`wanted`, or as many connections as the system lets this process have."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft // 2))


def _logging(level: str) -> dict[str, Any]:
    """To standard error, a line each. Nothing of what is asked or answered is logged."""
    ours = {"handlers": ["stderr"], "level": level.upper(), "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "line",
                "stream": "ext://sys.stderr",
            }
        },
        "loggers": {
            "relaxlm.server": ours,
            # Its own news of starting and ending are told elsewhere.
            "uvicorn.error": {**ours, "level": "WARNING"},
            "uvicorn.access": ours,
        },
    }
