"""A server in a process of its own, for as long as it is measured."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from relaxlm.errors import RequestError

HOST = "127.0.0.1"
_START_LIMIT = 600.0  # seconds: a library may be compiled first
_STOP_LIMIT = 10.0
_POLL = 0.05
_SHOWN = 5  # lines of a server's output that explain its end


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def relaxlm_command(folder: str, port: int, options: Sequence[str] = ()) -> list[str]:
    """`relaxlm serve`, under this Python."""
    program = [sys.executable, "-m", "relaxlm", "serve", folder]
    return [*program, "--host", HOST, "--port", str(port), *options]


@contextmanager
def running(
    command: Sequence[str], ready: str, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """Start a server, wait until it answers, and end it when the block is left.

    Args:
        ready: a URL that answers with status 200 once the server is ready.
        environment: variables to set in addition to this process's own.

    Raises:
        RequestError: it ended, or does not get ready.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {})},
        )
        try:
            limit = time.monotonic() + _START_LIMIT
            while not _answers(ready):
                if process.poll() is not None or time.monotonic() > limit:
                    log.seek(0)
                    last = [line for line in log.read().splitlines() if line.strip()][-_SHOWN:]
                    ended = process.returncode
                    what = "does not get ready" if ended is None else f"ended with status {ended}"
                    raise RequestError(f"the server {what}:\n" + "\n".join(last))
                time.sleep(_POLL)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=1):
            return True
    except HTTPError as error:  # it answers, and is not ready
        error.close()
    except (URLError, OSError):
        pass
    return False
