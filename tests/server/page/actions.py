"""What a reader does with the page."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING

from playwright.sync_api import expect

from tests.server.page.scripted import Answer, Delta

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from tests.server.page.scripted import PageServer


def field(page: Page) -> Locator:
    return page.get_by_label("Message", exact=True)


def send(page: Page, message: str) -> None:
    field(page).fill(message)
    field(page).press("Enter")


def finished(page: Page) -> None:
    """Waits for the end of the reply."""
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator(".live")).to_have_count(0)


def ask(page: Page, message: str) -> None:
    send(page, message)
    finished(page)


def reload(page: Page) -> None:
    """Loads the page anew when the browser has stored what the page has given it."""
    page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.open("relaxlm").onsuccess = ({ target: { result } }) => {
                const stores = result.transaction(["conversations", "summaries"], "readwrite");
                stores.oncomplete = () => result.close() || resolve();
            };
        })"""
    )
    page.reload()


def last_reply(page: Page) -> Locator:
    return page.locator(".reply").last


def live_answer(server: PageServer) -> queue.Queue[Delta | None]:
    """The next answer is what the test puts here."""
    live: queue.Queue[Delta | None] = queue.Queue()
    server.answers.append(Answer(live=live))
    return live


def titles(page: Page) -> list[str]:
    return page.locator(".conversation-open").all_inner_texts()
