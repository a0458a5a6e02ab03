"""What an operator may set of the HTTP server; `relaxlm serve` has an option for each."""

from __future__ import annotations

import ipaddress
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from relaxlm.errors import ConfigError

MIB = 2**20
API_KEY_VARIABLE = "RELAXLM_API_KEY"


@dataclass(frozen=True)
class ServerSettings:
    """Limits and who may use the server. Times are in seconds, sizes in bytes.

    Attributes:
        api_keys: any of these lets a request in; none: no key is needed.
        open_metrics: /metrics needs no key.
        model_name: what the model is called; None: as its folder.
        strict_model_name: requests that name another model are refused.
        cors_origins: other web pages that may use the server; "*": all.
        allowed_hosts: names by which the server may be addressed, apart from IP addresses,
            localhost and `host`.
        host: the address that it is bound to.
        max_body: of a request.
        max_tokens_limit: the most that `max_tokens` may ask for; None: what the context takes.
        max_connections: at one time.
        header_timeout: until the head of a request has come.
        body_timeout: until its body has come.
        idle_timeout: until an unused connection is closed.
        reader_timeout: that a client may take nothing of what was sent to it.
        request_timeout: of one request's work; None: no limit.
        keep_alive: of silence in a stream until a comment is sent.
        drain: that running requests may go on after the server was told to end.
    """

    api_keys: tuple[str, ...] = ()
    open_metrics: bool = False
    model_name: str | None = None
    strict_model_name: bool = False
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    max_body: int = 8 * MIB
    max_tokens_limit: int | None = None
    max_connections: int = 512
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    idle_timeout: float = 30.0
    reader_timeout: float = 60.0
    request_timeout: float | None = 3600.0
    keep_alive: float = 10.0
    drain: float = 30.0

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    def check_exposure(self, allow_unauthenticated: bool) -> None:
        """Refuse to let a network use the server without a key.

        Raises:
            ConfigError: `host` is more than this machine, and there is no key.
        """
        if self.api_keys or self.loopback or allow_unauthenticated:
            return
        raise ConfigError(
            f"--host {self.host} lets other machines use the server, and there is no API key: set "
            f"{API_KEY_VARIABLE}, --api-key-file or --api-key; or say --allow-unauthenticated"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`, a name or an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def check_origin(origin: str) -> str:
    """An origin as browsers spell it.

    Raises:
        ConfigError: it has a path, no scheme, or nothing at all.
    """
    parts = urlsplit(origin)
    spelled = f"{parts.scheme}://{parts.netloc}".lower()
    if origin in ("*", "null") or (parts.scheme and parts.netloc and spelled == origin.lower()):
        return origin.lower()
    raise ConfigError(
        f"--cors-origin {origin}: expected scheme, host and port as https://example.com:8443, "
        "without a path or a last slash; * for all"
    )


def gather_api_keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """Keys of --api-key, of --api-key-file (one a line; # begins a comment) and RELAXLM_API_KEY.

    Raises:
        ConfigError: a key that no header can carry, a file without keys or for all to read.
        OSError: the file can't be read.
    """
    keys = [("--api-key", key) for key in given]
    if (variable := os.environ.get(API_KEY_VARIABLE)) is not None:
        keys.append((API_KEY_VARIABLE, variable))
    if file is not None:
        keys += [(str(file), key) for key in _keys_of(file)]
    for place, key in keys:
        if not key or not key.isascii() or not key.isprintable() or key != key.strip():
            raise ConfigError(
                f"{place} has a key that is empty, or has spaces around it or other than printable "
                "ASCII characters in it; make one with: openssl rand -hex 24"
            )
    return tuple(dict.fromkeys(key for _, key in keys))


def _keys_of(file: Path) -> list[str]:
    if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & stat.S_IROTH:
        raise ConfigError(f"every user of this machine can read {file}: chmod 600 {file}")
    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{file} has no API key: expected one in a line")
    return keys
