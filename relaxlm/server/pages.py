"""The chat page: files that come with the package, read once and served as they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

# Only this server's own files and answers; nothing is loaded from elsewhere, and no other page may
# show this one.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Nothing that a model wrote can become markup.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/vnd.microsoft.icon",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
}
_INDEX = "index.html"


def _read() -> dict[str, tuple[bytes, str]]:
    """Path on the server -> content and type."""
    found = {}
    folder = files("relaxlm.server") / "page"
    for file in folder.iterdir():
        kind = _TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            found["/" if file.name == _INDEX else f"/page/{file.name}"] = (file.read_bytes(), kind)
    return found


_FILES = _read()
# A browser asks for a page without a key; its script sends one with its requests.
OPEN_PATHS = frozenset(_FILES)


def add_pages(app: FastAPI) -> None:
    for path, (content, kind) in _FILES.items():
        handler = _handler(content, kind)
        app.add_route(path, handler, methods=["GET"], include_in_schema=False)


def _handler(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return Response(content, headers={**_HEADERS, "content-type": kind})

    return handle
