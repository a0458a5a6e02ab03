"""A browser, the page, and a server that answers as the test says.

Every page that a test opens is watched: a script error, something that the policy stopped, or a
request to anywhere but its server fails the test.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tests.server.page.scripted import PageServer

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 60_000  # on a machine that is busy with something else
DESKTOP = {"width": 1280, "height": 800}

OpenPage = Callable[..., "Page"]


# Not for the session: while it lasts, nothing else in the process can run an event loop.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is installed")
    sync_api.expect.set_options(timeout=PATIENCE_MS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def running_server() -> Iterator[PageServer]:
    from tests.server.page.scripted import PageServer

    with PageServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running_server: PageServer) -> PageServer:
    running_server.reset()
    return running_server


@pytest.fixture
def watched(browser: Browser) -> Iterator[OpenPage]:
    """Opens a page of an address in a browser of its own; keywords are the browser's settings."""
    problems: list[str] = []
    contexts = []

    def watch(page: Page, origin: str) -> None:
        def console(message: Any) -> None:
            # The browser writes down each answer that is an error, too.
            if message.type == "error" and "Failed to load resource" not in message.text:
                problems.append(message.text)

        def request(request: Any) -> None:
            if not request.url.startswith((origin, f"blob:{origin}")):
                problems.append(f"request to {request.url}")

        page.on("console", console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", request)

    def open_page(url: str, **settings: Any) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, **settings})
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        context.on("page", lambda page: watch(page, url))
        page = context.new_page()
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems, problems


@pytest.fixture
def open_page(watched: OpenPage, server: PageServer) -> OpenPage:
    """Opens the page at the scripted server, and waits until it is ready."""

    def open_ready(**settings: Any) -> Page:
        page = watched(server.url, **settings)
        page.wait_for_selector(".model, .model-place select")
        return page

    return open_ready


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    return open_page()
